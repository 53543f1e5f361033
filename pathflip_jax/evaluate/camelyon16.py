"""Preparation of a CAMELYON16 download for `pathflip`: slide table, outlines, texts and a folder of slides.

    python -m pathflip_jax.evaluate.camelyon16 CAMELYON16 --out camelyon16

Slides (normal_001.tif, tumor_001.tif, test_001.tif) and annotations (tumor_001.xml of ASAP, or tumor_001_mask.tif) are
found anywhere below the folder, in the layouts of GigaDB and of the AWS registry; labels of test slides are in
reference.csv. As the organisers advise, test_049 is left out (a duplicate) and test_114 has no outlines (not all of its
lesions are annotated). Missing files are listed, and the available slides are used.

    OUT/slides/<slide>.tif          links to the slides
    OUT/slides.csv                  slide_id, patient_id, label (Normal, Tumor), split
    OUT/outlines/<slide>.geojson    tumor areas without excluded areas; empty for normal slides
    OUT/grounding.json              texts of the concept "tumor"
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.outlines import Polygon, contains, trace, write_outlines
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.failures import preview

SLIDE = re.compile(r"(normal|tumor|test)_\d{3}", re.IGNORECASE)
TUMOR_GROUPS, CUT_OUT_GROUPS = {"tumor", "_0", "_1", "metastases"}, {"_2", "exclusion", "normal"}
DUPLICATE, PARTLY_ANNOTATED = "test_049", "test_114"
MASK_PIXELS = 2**25  # outlines are traced on a level of a mask with at most this many pixels
TEXTS = {
    "tumor": [
        "metastatic carcinoma",
        "metastatic breast cancer",
        "clusters of atypical epithelial tumor cells",
        "lymph node metastasis of breast carcinoma",
    ]
}


class Found(NamedTuple):
    """The files of a download by slide id in lower case, and the labels of test slides."""

    slides: dict[str, Path]
    annotations: dict[str, Path]
    masks: dict[str, Path]
    labels: dict[str, str]


def find(folder: Path, out: Path) -> Found:
    """The slides, annotations, masks and test labels below a folder, apart from an earlier run's `out`.

    Raises FileNotFoundError if there is no slide.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the CAMELYON16 download")
    slides, masks = {}, {}
    mine = out.absolute()
    for path in sorted(path for path in folder.rglob("*.tif") if mine not in path.absolute().parents):
        name = path.stem.lower()
        if SLIDE.fullmatch(name):
            slides[name] = path
        elif SLIDE.fullmatch(name.removesuffix("_mask")):
            masks[name.removesuffix("_mask")] = path
    if not slides:
        raise FileNotFoundError(
            f"{folder}: no slides in it or its subfolders; expected names such as normal_001.tif, tumor_001.tif, "
            "test_001.tif"
        )
    annotations = {path.stem.lower(): path for path in sorted(folder.rglob("*.xml"))}
    tables = sorted(folder.rglob("reference.csv"))
    return Found(slides, annotations, masks, read_reference(tables[0]) if tables else {})


def read_reference(path: Path) -> dict[str, str]:
    """The labels of test slides, from rows of slide and Normal or Tumor; other columns and headers are ignored."""
    labels = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.reader(file):
            name, label = (cell.strip() for cell in [*row, "", ""][:2])
            name = name.removesuffix(".tif").lower()
            if SLIDE.fullmatch(name) and label.lower() in ("normal", "tumor"):
                labels[name] = label.capitalize()
    if not labels:
        raise ValueError(
            f"{path}: no row like `test_001,Tumor,...`; use the reference.csv that comes with the test slides"
        )
    return labels


def read_asap(path: Path) -> tuple[list[Polygon], list[str]]:
    """The tumor areas of an ASAP file with excluded areas as holes, and the names of unknown groups.

    Groups Tumor, _0 and _1 are tumor, _2 (Exclusion) is excluded. Raises ValueError naming the file if it is not ASAP.
    """
    try:
        root = ElementTree.parse(path).getroot()
        rings, foreign = {True: [], False: []}, set()
        for annotation in root.iter("Annotation"):
            group = annotation.get("PartOfGroup", "")
            points = [(float(c.get("X")), float(c.get("Y"))) for c in annotation.iter("Coordinate")]
            if group.lower() not in TUMOR_GROUPS | CUT_OUT_GROUPS:
                foreign.add(group)
            elif len(points) > 2:
                rings[group.lower() in TUMOR_GROUPS].append(np.array([*points, points[0]]))
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an ASAP annotation file ({error}); download it again") from None
    polygons = [Polygon(ring, tuple(cut for cut in rings[False] if _reaches(ring, cut))) for ring in rings[True]]
    return polygons, sorted(foreign)


def _reaches(ring: np.ndarray, cut: np.ndarray) -> bool:
    return bool(contains([Polygon(ring)], cut).any())


def read_mask(path: Path) -> list[Polygon]:
    """The tumor areas of a mask (the upper half of its values), traced on a level of at most 2^25 pixels."""
    facts, arrays = guarded.parse(
        "pathflip_jax.data.readers.slide_pixels:mask", path, MASK_PIXELS, memory=guarded.SLIDE_MEMORY
    )
    return list(trace(arrays["mask"], np.zeros(2), facts["downsample"]))


def build(folder: Path, out: Path) -> list[str]:
    """Write everything into `out`; returns a summary, line by line.

    Raises ValueError for test slides without a label, because scores of the other slides would hide them.
    """
    found = find(folder, out)
    slides = {name: path for name, path in found.slides.items() if name != DUPLICATE}
    labels = {name: name.partition("_")[0].capitalize() for name in slides if not name.startswith("test")}
    labels |= {name: label for name, label in found.labels.items() if name in slides}
    unlabelled = [name for name in slides if name not in labels]
    if unlabelled:
        raise ValueError(
            f"{folder}: no label for {preview(unlabelled)}; put the reference.csv of the test slides anywhere below "
            "this folder"
        )
    for part in ("slides", "outlines"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for name, path in slides.items():
        link = out / "slides" / f"{name}.tif"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    notes = _write_outlines(found, labels, out / "outlines")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["slide_id", "patient_id", "label", "split"])
    writer.writerows([name, name, labels[name], "test" if name.startswith("test") else "train"] for name in slides)
    _write(out / "grounding.json", json.dumps(TEXTS, indent=1) + "\n")
    _write(out / "slides.csv", table.getvalue())
    tests = sum(name.startswith("test") for name in slides)
    tumors = sum(label == "Tumor" for label in labels.values())
    return [f"{out}: {len(slides) - tests} training and {tests} test slides, {tumors} with tumor", *notes]


def _write_outlines(found: Found, labels: dict[str, str], folder: Path) -> list[str]:
    """Write the outlines of every annotated slide; returns notes on missing annotations."""
    bare, groups = [], set()
    for name, label in tqdm(labels.items(), desc="outlines", unit="slide", leave=False):
        path = folder / f"{name}.geojson"
        polygons: Iterable[Polygon] = ()
        if label == "Tumor":
            if name == PARTLY_ANNOTATED:
                continue
            if name in found.annotations:
                polygons, foreign = read_asap(found.annotations[name])
                groups.update(foreign)
            elif name in found.masks:
                polygons = read_mask(found.masks[name])
            if not polygons:
                bare.append(name)
                continue
        write_outlines(path, {"tumor": list(polygons)} if label == "Tumor" else {})
    notes = [f"annotations of unknown groups are left out: {', '.join(sorted(groups))}"] if groups else []
    if bare:
        notes.append(f"tumor slides without annotations, left out of grounding: {preview(bare)}")
    return notes


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as out:
        out.write(text.encode())


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code is 0, or 2 for faulty input."""
    parser = argparse.ArgumentParser(
        prog="python -m pathflip_jax.evaluate.camelyon16",
        description="Prepare CAMELYON16 for pathflip: slide table, outlines, texts (docs/camelyon16.md).",
        epilog="example: python -m pathflip_jax.evaluate.camelyon16 CAMELYON16 --out camelyon16",
    )
    parser.add_argument(
        "folder", type=Path, metavar="CAMELYON16", help="folder of the download, searched with its subfolders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    options = parser.parse_args(argv)
    try:
        print("\n".join(build(options.folder, options.out)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
