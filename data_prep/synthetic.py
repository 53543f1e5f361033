"""Embedded cohort: synthetic slides with reports and exact outlines, for the demo and the tests.

    python -m data_prep.synthetic --out cohort --slides 320 --seed 0 --workers 2

Nothing in it comes from a patient. Slides are pyramidal TIFF files that OpenSlide opens (0.5 um/px); each holds one of
five tumour types and two to four of five other tissue concepts as areas a few hundred px across. Everything is a
function of (seed, slide number), so the files are identical byte for byte whatever the number of workers, and a second
run makes only what is missing.

    OUT/<slide_id>.tiff                 OUT/outlines/<slide_id>.geojson   outlines as QuPath writes them
    OUT/slides.csv                      slide_id, patient_id, label, split, width, height, mpp, and for survival and
                                        regression: age, stage, os_months, os_event, immune_score
    OUT/reports.jsonl                   slide_id, case_id, caption, concepts
    OUT/prompts.json, grounding.json    texts for zero-shot classification and for grounding
    OUT/questions.json                  multiple choice about each slide, as conversations of SlideInstruct
    OUT/concepts.json                   phrasings of each concept, to detect the concepts that a text asserts
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep import outcomes
from data_prep.layout import CONCEPTS, TUMORS, Layout, plan, rings
from data_prep.reports import (
    case_facts,
    class_prompts,
    concept_phrasings,
    grounding_texts,
    questions,
    write_report,
)
from data_prep.slide_image import MPP, render, write_slide

EDITION = 5  # increment when the same seed gives other slides, so that old and new are never mixed in one folder
_COLUMNS = ["slide_id", "patient_id", "label", "split", "width", "height", "mpp"]
_COLUMNS += ["age", "stage", "os_months", "os_event", "immune_score"]
_COLORS = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
]  # fmt: skip


class _Slide(NamedTuple):
    """Decisions about a slide made before anything is drawn."""

    number: int
    slide_id: str
    patient_id: str
    patient: int
    tumor: str
    split: str


def generate(
    out: str | Path, slides: int = 320, seed: int = 0, workers: int = 2, progress: bool = True, size: int = 1536
) -> Path:
    """Write a cohort of `slides` slides, about `size` px wide at level 0, under `out`, and return the folder.

    A third of the slides are held out (split "test"), a twelfth are for validation, by patient and balanced over the
    five classes. Files are written atomically; an interrupted run is resumed by the same call. Raises ValueError for
    settings out of range and for a folder that holds a cohort of other settings.
    """
    if slides < 1 or workers < 1 or seed < 0:
        raise ValueError(
            f"slides={slides}, workers={workers}, seed={seed}: slides and workers must be at least 1, seed at least 0"
        )
    if not 512 <= size <= 16384:
        raise ValueError(f"size={size}: expected 512 to 16384 px, so that the areas are larger than a few patches")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out must name a folder")
    (out / "outlines").mkdir(parents=True, exist_ok=True)
    claim_folder(out, {"edition": EDITION, "slides": slides, "seed": seed, "size": size})

    cohort = _patients(slides, seed)
    if _has_tables(out) and all(_finished(out, slide) for slide in cohort):
        return out
    jobs = [(str(out), slide, seed, size) for slide in cohort]
    rows: dict[int, dict] = {}
    with tqdm(total=slides, desc="slides", unit="slide", disable=not progress) as bar:
        if workers == 1:
            for job in jobs:
                rows[job[1].number] = _make_slide(*job)
                bar.update()
        else:
            with _drawing_environment(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                for future in as_completed([pool.submit(_make_slide, *job) for job in jobs]):
                    row = future.result()
                    rows[row["number"]] = row
                    bar.update()
    _write_tables(out, [rows[slide.number] for slide in cohort])
    return out


def claim_folder(out: Path, settings: dict[str, int | str]) -> None:
    """Tie the folder to its settings, so that two cohorts never mix."""
    path = out / "cohort.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(
                f"{out} holds a cohort of {found}, asked for {settings}; choose another folder or delete this one"
            )
    else:
        _write(path, json.dumps(settings))


def _patients(slides: int, seed: int) -> list[_Slide]:
    """Patients, classes and splits: a quarter of the patients have two slides, with balanced classes and splits."""
    rng = np.random.default_rng([seed, 0])
    tumors = list(TUMORS)
    counts, total = [], 0
    while total < slides:
        count = 2 if rng.random() < 0.25 and slides - total > 1 else 1
        counts.append(count)
        total += count
    held = {"test": int(np.ceil(slides / 3)), "val": int(np.ceil(slides / 12))}
    used = {(split, tumor): 0 for split in ("train", "val", "test") for tumor in tumors}
    roster = []
    for patient, count in enumerate(counts):
        tumor = tumors[patient % len(tumors)]
        split = "train"
        for name in ("test", "val"):
            # Fill the splits evenly along the cohort, class by class.
            due = held[name] / slides * (sum(used[s, tumor] for s in ("train", "val", "test")) + count)
            if used[name, tumor] < due - (0.5 if name == "val" else 0):
                split = name
                break
        used[split, tumor] += count
        for letter in "AB"[:count]:
            roster.append(
                _Slide(len(roster), f"SYN-{patient:04d}-{letter}", f"SYN-{patient:04d}", patient, tumor, split)
            )
    return roster


def _has_tables(out: Path) -> bool:
    """Whether the tables of this version are there; an earlier one wrote fewer, and fewer columns."""
    if not all((out / name).exists() for name in ("slides.csv", "concepts.json", "questions.json")):
        return False
    return (out / "slides.csv").read_text(encoding="utf-8").startswith(",".join(_COLUMNS) + "\n")


def _finished(out: Path, slide: _Slide) -> bool:
    return (out / f"{slide.slide_id}.tiff").exists() and (out / "outlines" / f"{slide.slide_id}.geojson").exists()


def _make_slide(out: str, slide: _Slide, seed: int, size: int) -> dict:
    """Plan, describe and (unless it is there already) draw one slide; return its rows of the tables."""
    folder = Path(out)
    layout = plan(np.random.default_rng([seed, 1, slide.number]), slide.tumor, size)
    case = case_facts(np.random.default_rng([seed, 2, slide.patient]))
    label = TUMORS[slide.tumor]
    caption = write_report(np.random.default_rng([seed, 3, slide.number]), layout, label, case, slide.split)
    if not _finished(folder, slide):
        write_slide(folder / f"{slide.slide_id}.tiff", render(layout, np.random.default_rng([seed, 4, slide.number])))
        _write(folder / "outlines" / f"{slide.slide_id}.geojson", json.dumps(_outlines(slide.slide_id, layout)))
    return {
        "number": slide.number,
        "slide_id": slide.slide_id,
        "patient_id": slide.patient_id,
        "label": label,
        "split": slide.split,
        "width": layout.width,
        "height": layout.height,
        "mpp": MPP,
        "caption": caption,
        "concepts": list(layout.extent),
        "extent": layout.extent,
        "case": case,
        # Draws of their own, so that outcomes change nothing else; the first is the same for all slides of a patient.
        "survival_seed": [seed, 5, slide.patient],
        "immune_score": outcomes.immune_score(np.random.default_rng([seed, 6, slide.number]), layout.extent),
    }


def _outlines(slide_id: str, layout: Layout) -> dict:
    """The areas as a GeoJSON FeatureCollection of QuPath annotations, in level-0 px."""
    features = []
    for number, area in enumerate(layout.areas):
        polygons = [[ring.tolist() for ring in polygon] for polygon in rings(area.field)]
        several = len(polygons) > 1
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{slide_id}/{number}")),
                "geometry": {
                    "type": "MultiPolygon" if several else "Polygon",
                    "coordinates": polygons if several else polygons[0],
                },
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": area.concept, "color": list(_COLORS[CONCEPTS.index(area.concept)])},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _write_tables(out: Path, rows: list[dict]) -> None:
    reports = [
        {
            "slide_id": row["slide_id"],
            "case_id": row["patient_id"],
            "caption": row["caption"],
            "concepts": row["concepts"],
        }
        for row in rows
    ]
    _write(out / "reports.jsonl", "".join(json.dumps(report) + "\n" for report in reports))
    _write(out / "prompts.json", json.dumps({"task": "tumor type", "classes": class_prompts()}, indent=1))
    _write(out / "grounding.json", json.dumps(grounding_texts(), indent=1))
    asked = [question for row in rows for question in questions(row["slide_id"], row["concepts"])]
    _write(out / "questions.json", json.dumps(asked, indent=1))
    _write(out / "concepts.json", json.dumps(concept_phrasings(), indent=1))
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_with_survival(rows))
    _write(out / "slides.csv", table.getvalue())  # last: its presence marks the cohort as complete


def _with_survival(rows: list[dict]) -> list[dict]:
    """The rows with age, stage and survival of their patients."""
    extents: dict[str, list[dict]] = {}
    for row in rows:
        extents.setdefault(row["patient_id"], []).append(row["extent"])
    found = []
    for row in rows:
        rng, case = np.random.default_rng(row["survival_seed"]), row["case"]
        known = outcomes.survival(rng, extents[row["patient_id"]], case)
        found.append(row | known | {"age": case["age"], "stage": case["t"]})
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _drawing_environment():
    """Environment of the drawing workers: one numeric thread each, and large arrays kept in the memory of the process.

    Several thread pools on the same cores only wait for each other. By default glibc returns the memory of a large
    array to the system, which clears it page by page for the next one: a tenth of the drawing time.
    """
    settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    settings |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main(argv: list[str] | None = None) -> int:
    """Command line of the cohort generator; the exit code is 0, or 2 for impossible settings."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.synthetic",
        description="Make a cohort of synthetic slides with reports, labels and outlines (research use only).",
        epilog="example: python -m data_prep.synthetic --out cohort --slides 320 --seed 0 --workers 2",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="output folder; a partial cohort of the same settings is completed"
    )
    parser.add_argument("--slides", type=int, default=320, help="number of slides (default 320)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    parser.add_argument(
        "--workers", type=int, default=2, help="number of processes (default 2); the files do not depend on it"
    )
    parser.add_argument(
        "--size", type=int, default=1536, help="approximate width of a slide in px at level 0 (default 1536)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    try:
        generate(args.out, args.slides, args.seed, args.workers, not args.quiet, args.size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.slides} slides in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
