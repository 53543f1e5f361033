"""Mosaic slides: several cases in each blob, outlines that are true, files that depend on the seed alone."""

import csv
import hashlib
import json

import numpy as np
import openslide
import pytest
from PIL import Image, ImageDraw

SLIDES = {"train": 5, "val": 4, "test": 4}


@pytest.fixture
def mosaics(benchmark_modules):
    return benchmark_modules("real_tissue_parts.mosaics")


@pytest.fixture
def names(benchmark_modules):
    return benchmark_modules("real_tissue_parts.words").COLON


@pytest.fixture
def collection(benchmark_modules, names, published):
    return benchmark_modules("real_tissue_parts.images").read_collection(published, list(names))


def _digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def test_blobs_are_contiguous_and_apart(mosaics):
    for seed in range(100):
        blobs = mosaics.grow_blobs(np.random.default_rng(seed), [8, 4, 4, 4], 6)
        assert [len(set(blob)) for blob in blobs] == [8, 4, 4, 4]
        for number, blob in enumerate(blobs):
            reached = {blob[0]}
            for _ in blob:
                reached |= {(x, y) for x, y in blob if any(abs(x - a) + abs(y - b) == 1 for a, b in reached)}
            assert reached == set(blob)
            for other in blobs[:number]:
                assert min(max(abs(x - a), abs(y - b)) for x, y in blob for a, b in other) > 1


def test_a_cohort_is_planned_by_case(mosaics, collection):
    plans = mosaics.plan_cohort(collection, mosaics.image_grid(collection.edge), SLIDES | {"train": 40}, 0)
    seen = {}
    for plan in plans:
        taken = np.zeros((plan.height, plan.width), int)
        for tile in (tile for tiles in plan.blobs.values() for tile in tiles):
            taken[tile.y : tile.y + 128, tile.x : tile.x + 128] += 1
        assert taken.max() == 1 and taken.sum() == 128**2 * len(plan.images)
        assert 2 <= len(plan.blobs) <= 4
        assert len(next(iter(plan.blobs.values()))) > len(plan.images) / 2
        for name, tiles in plan.blobs.items():
            assert {collection.images[tile.number].label for tile in tiles} == {name}
            cases = {collection.images[tile.number].case for tile in tiles}
            seen.setdefault(plan.split, set()).update(cases)
            assert len(cases) >= min(2, len(tiles)) or plan.split != "train"
    assert not seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"]
    labels = [next(iter(plan.blobs)) for plan in plans if plan.split == "train"]
    assert {labels.count(name) for name in set(labels)} == {10}


def test_the_files_of_a_cohort(mosaics, names, collection, tmp_path):
    folder = mosaics.write_cohort(tmp_path / "slides", collection, names, SLIDES, 0, workers=1)
    with open(folder / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    reports = [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]
    assert [row["slide_id"] for row in rows] == [report["slide_id"] for report in reports]
    assert [row["split"] for row in rows].count("test") == 4
    assert all(report["concepts"] == row["classes"].split(";") for row, report in zip(rows, reports, strict=True))
    row = rows[0]
    with openslide.OpenSlide(folder / f"{row['slide_id']}.tiff") as slide:
        assert slide.dimensions == (int(row["width"]), int(row["height"]))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    assert mosaics.write_cohort(folder, collection, names, SLIDES, 0, workers=1) == folder  # resumes
    again = mosaics.write_cohort(tmp_path / "again", collection, names, SLIDES, 0, workers=2)
    assert _digest(again) == _digest(folder)
    with pytest.raises(ValueError, match="choose another folder"):
        mosaics.write_cohort(folder, collection, names, SLIDES, 1, workers=1)


def test_outlines_are_the_masks(mosaics, collection):
    plan = mosaics.plan_cohort(collection, mosaics.image_grid(collection.edge), SLIDES, 0)[0]
    drawn = mosaics.outlines(mosaics.coverage(plan, collection.images))
    for name, tiles in plan.blobs.items():
        canvas = Image.new("1", (plan.width, plan.height))
        for polygon in drawn[name]:
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in polygon.ring], fill=1)
            for hole in polygon.holes:
                ImageDraw.Draw(canvas).polygon([tuple(point) for point in hole], fill=0)
        truth = np.zeros((plan.height, plan.width), bool)
        for tile in tiles:
            mask = np.asarray(Image.open(collection.images[tile.number].mask)) > 0
            mask = np.rot90(mask, tile.turn % 4)[:, :: -1 if tile.turn >= 4 else 1]
            truth[tile.y : tile.y + 128, tile.x : tile.x + 128] = mask
        found = np.asarray(canvas)
        assert (found & truth).sum() / (found | truth).sum() > 0.9
