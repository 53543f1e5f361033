"""Alignment on real tissue: mosaic slides of labelled images, scored on cases that training never saw.

Makes a cohort of mosaics (`real_tissue_parts/mosaics.py`) from EBHI-Seg as published (`<Class>/image`, `/label`), or
from a folder with images/, masks/ and labels.csv, and runs the product's own commands on it: prepare, train with and
without the region loss, evaluate. The table sets the runs beside chance, mean colour, attention without a text, probes
that are told classes or outlines, and upper bounds, with intervals by the cases that the mosaics are made of
(`real_tissue_parts/intervals.py`). One cohort serves all seeds of training, and `--out` resumes.

    python benchmarks/real_tissue.py --data EBHI-SEG --out runs/real --seeds 0 1 2
    python benchmarks/real_tissue.py --data EBHI-SEG --out runs/real --name try --split val --without-gain \\
        --seeds 0 --set data.regions=16 --set data.feature_dropout=0.2
    python benchmarks/real_tissue.py --textures FEATURES.npz --out runs/textures

`--split val` scores validation cases, for choosing settings: test cases are scored once, at the end. Arguments after
`--` are passed to `pathflip evaluate`: `-- --window 3`.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from machine import describe
from real_tissue_parts import baselines, mosaics, pictures, scores, steps, textures
from real_tissue_parts.images import read_collection
from real_tissue_parts.words import COLON, TEXTURES

from data_prep.slide_image import MPP
from pathflip_jax.commands.demo_steps import Step, run_steps
from pathflip_jax.data.storage.json_files import read_json, write_json
from pathflip_jax.data.texts.text import read_slide_table
from pathflip_jax.runtime.limits import processors

SLIDES = (240, 60, 100)


class StepError(RuntimeError):
    """A command that failed; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        """Take the exit code."""
        super().__init__(f"a step ended with exit code {code}")
        self.code = code


class Clock:
    """Seconds that each part of the benchmark took, by name."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Account what runs within to a part."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)


def run(plan: Sequence[Step]) -> None:
    """Run commands; StepError for the first that fails."""
    if code := run_steps(plan, "the benchmark"):
        raise StepError(code)


def make_cohort(options: argparse.Namespace, places: steps.Places, clock: Clock) -> None:
    """Make the slides and their features, unless they are there."""
    sizes = dict(zip(mosaics.SPLITS, options.slides, strict=True))
    if options.textures:
        with clock.part("cohort"):
            tiles = textures.read_textures(options.textures)
            textures.write_texture_cohort(places.slides, tiles, TEXTURES, sizes, options.cohort_seed)
        with clock.part("import"):
            run(steps.import_steps(places, textures.REGION_UM, textures.MPP, textures.ENCODER))
        return
    with clock.part("cohort"):
        collection = read_collection(options.data, list(COLON))
        mosaics.write_cohort(places.slides, collection, COLON, sizes, options.cohort_seed, options.workers)
    patch = collection.edge // mosaics.PATCHES
    with clock.part("prepare"):
        run(steps.prepare_steps(places, patch, collection.edge * MPP, options.workers))


def score(options: argparse.Namespace, places: steps.Places, clock: Clock) -> scores.Scores:
    """The scores of all seeds and baselines."""
    names = list(read_json(places.slides / "prompts.json")["classes"])
    first = read_json(places.scores(options.seeds[0], steps.REGION) / "scores.json")
    with clock.part("baselines"):
        window = first["grounding"]["how"]["window"]
        slides = baselines.read_slides(places.slides, places.records, names, places.split, window)
        ids = slides.cohort.slide_ids
        told = baselines.score_baselines(slides)
    rows = {row["slide_id"]: row for row in read_slide_table(places.slides / "slides.csv")}
    runs: dict[str, scores.Statistics] = {}
    blind: dict[str, scores.Statistics] = {}
    for name, kind in zip((scores.WITH, scores.WITHOUT), options.kinds, strict=False):
        for seed in options.seeds:
            found, others = scores.read_run(places, seed, kind, ids)
            scores.add(runs, {name: found})
            if kind == steps.REGION:
                scores.add(blind, others)
    scores.add(blind, told)
    chance = scores.read_chance(places.scores(options.seeds[0], steps.REGION))
    cases = [rows[slide]["cases"].split() for slide in ids]
    return scores.Scores(runs, blind, chance, cases, scores.class_sizes([rows[slide] for slide in ids], names))


def report(options: argparse.Namespace, places: steps.Places, found: scores.Scores, clock: Clock) -> None:
    """Print the table; write it, the pictures and the JSON."""
    table = scores.make_table(found)
    text = scores.markdown(table, len(found.cases), places.split)
    folder = places.out / places.name
    (folder / f"{places.split}.md").write_text(text + "\n", encoding="utf-8")
    with clock.part("pictures"):
        first = places.scores(options.seeds[0], steps.REGION)
        pictures.draw_classes(places, places.run(options.seeds[0], steps.REGION), first)
        pictures.shrink(first / "figures" / "grounding_typical.png", folder / "median_slide.jpg")
    named = ("seeds", "kinds", "slides", "cohort_seed", "config", "set", "language", "split", "more")
    write_json(
        options.json or places.out / "real_tissue.json",
        {
            "machine": describe("jax", "jaxlib", "numpy", "scikit-learn"),
            "settings": {name: getattr(options, name) for name in named},
            "slides": len(found.cases),
            "cases": len({case for listed in found.cases for case in listed}),
            "classes": found.classes,
            "interval": "95%, by case: cluster-robust over the cases that mosaics share, and over seeds",
            "table": table,
            "seconds": clock.seconds,
        },
    )
    print(f"\n{text}\n\nseconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in clock.seconds.items()))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of images with masks")
    source.add_argument("--textures", type=Path, help="texture features of Kather's tiles, a cohort without pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; continued where it holds a part")
    parser.add_argument("--name", default="runs", help="folder of these runs under --out (default runs)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (default 0 1 2)")
    parser.add_argument("--cohort-seed", type=int, default=0, help="of the cohort and its validation cases (default 0)")
    parser.add_argument("--slides", type=int, nargs=3, default=SLIDES, metavar=("TRAIN", "VAL", "TEST"))
    parser.add_argument("--split", choices=["val", "test"], default="test", help="split to score (default test)")
    parser.add_argument(
        "--without-gain",
        dest="kinds",
        action="store_const",
        const=(steps.REGION,),
        default=(steps.REGION, steps.NO_REGION),
        help="train only with the region loss, to try settings in half the time",
    )
    parser.add_argument("--config", default="small_cohort", help="config of the alignment (default small_cohort)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one of its settings")
    parser.add_argument("--language", action="store_true", help="train and score captions too")
    parser.add_argument("--language-config", default="lm_demo", help="config of the language stage (default lm_demo)")
    parser.add_argument("--language-set", action="append", default=[], metavar="KEY=VALUE", help="one of its settings")
    parser.add_argument(
        "--export", metavar="NAME", help="write the first seed's run as OUT/NAME_OF_RUNS/NAME, with a model card"
    )
    parser.add_argument("--workers", type=int, default=processors(), help="processes (default: cores)")
    parser.add_argument("--json", type=Path, help="file to write (default OUT/real_tissue.json)")
    parser.add_argument("more", nargs="*", metavar="-- OPTION", help="options of pathflip evaluate")
    options = parser.parse_args(arguments)
    if options.export and options.textures:
        parser.error("--export writes a card about EBHI-Seg; leave it out with --textures")
    return options


def main() -> int:
    """Make the cohort, train, score and report; the exit code is 2 for faulty input, a failed command's own else."""
    options = parse()
    places, clock = steps.Places(options.out, options.name, options.split), Clock()
    try:
        (places.out / places.name).mkdir(parents=True, exist_ok=True)
        make_cohort(options, places, clock)
        with clock.part("vocabulary"):
            run(steps.vocabulary_steps(places, options.language))
        for seed in options.seeds:
            with clock.part("train"):
                run(steps.train_steps(places, seed, options))
            with clock.part("evaluate"):
                run(steps.evaluate_steps(places, seed, options))
        if options.export:
            with clock.part("export"):
                run(steps.export_steps(places, options.seeds[0], options))
        report(options, places, score(options, places, clock), clock)
    except StepError as error:
        return error.code
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
