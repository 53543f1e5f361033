"""Regions and texts: an image of one region, a point in a slide of many, and the ranks of both."""

import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import finish_folder, shard_name, write_shard
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.evaluate import run
from pathflip_jax.evaluate.cohort import read_cohort
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.tasks import regions
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Embedding, Predictor, TextEncoding
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run

CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
    max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tiny_cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions") / "run"
    data = {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96}
    save_run(folder, PathFLIP(CONFIG, nnx.Rngs(0)), {"data": data}, TextTokenizer(tiny_cohort.vocabulary))
    return folder


@pytest.fixture
def cohort(tiny_cohort):
    return read_cohort(tiny_cohort.records, tiny_cohort.slides, "test")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_point_means_the_region_whose_patch_holds_it(cohort, run_folder, tmp_path):
    """The embedding is that of the region in which the point lies, worked out from the coordinates alone."""
    predictor = load(run_folder)
    slide = cohort.features("S20")
    corners = slide.coords[[0, len(slide.coords) // 2, -1]]
    rows = [{"slide_id": "S20", "x": int(x) + 63, "y": int(y) + 1, "caption": "glands"} for x, y in corners]
    texts = regions.read_region_texts(write(tmp_path / "t.jsonl", rows), cohort)
    found = regions.embed_regions(predictor, cohort, texts, "run")
    (embedding,) = predictor.encode_regions([slide])
    for (x, y), vector in zip(corners, found, strict=True):
        cell = (x // 128, y // 128)  # an edge of 64 um is 128 pixels
        (region,) = np.flatnonzero((embedding.grid == cell).all(1))
        assert vector == pytest.approx(embedding.regions[region])


def test_a_region_by_itself_is_what_attention_makes_of_it(cohort, run_folder):
    """`encode_regions` is the text-conditioned embedding of a slide of that one region, whatever the text."""
    predictor = load(run_folder)
    slide = cohort.features("S20")
    (plain,), (aligned,) = predictor.encode_slides([slide]), predictor.encode_regions([slide])
    texts, attend = predictor.encode_text(["glands", "fat"])[None], jax.jit(predictor.model.text_region)
    for region, expected in zip(plain.regions[:2], aligned.regions, strict=False):
        pooled, _ = attend(texts, region[None, None], np.ones((1, 1), bool))
        assert np.asarray(pooled)[0] == pytest.approx(np.stack([expected] * 2), abs=1e-5)


class Seeing:
    """Embeds each image of one region in the direction of its caption."""

    name, config = "seeing", {}

    cut, edge_um, edge_px = "grid", 10_000.0, None
    region_patches, _regions = Predictor.region_patches, Predictor._regions

    def check_features(self, *_):
        pass

    def encode_slides(self, slides):
        return (Embedding(slide.slide_id, np.ones(9), np.ones((1, 9)), np.zeros((1, 2))) for slide in slides)

    def encode_regions(self, slides):
        for slide in slides:
            yield Embedding(slide.slide_id, np.ones(9), np.eye(9)[[int(slide.slide_id[3:])]], np.zeros((1, 2)))

    def encode_texts(self, texts):
        found = np.eye(9)[[int(text.split()[-1]) for text in texts]]
        return TextEncoding(found, found)


def test_images_with_captions_are_slides_of_one_region(monkeypatch, tmp_path):
    """The Quilt task: every image finds its caption; two images of a patient are no rivals, under `paper` they are."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(2), np.arange(2)), axis=-1).reshape(-1, 2) * 64
    images = [
        SlideFeatures(f"roi{i}", f"P{i // 2}", rng.normal(size=(4, 16)).astype(np.float32), encoder="tiny",
                      coords=grid.astype(np.int32), patch_size=64, mpp=0.5, width=128, height=128)
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "records").mkdir()
    write_shard(tmp_path / "records" / shard_name(0), images, edge_um=10_000.0)
    finish_folder(tmp_path / "records", edge_um=10_000.0)
    table = ["slide_id,patient_id,label,split", *(f"roi{i},P{i // 2},,test" for i in range(6))]
    (tmp_path / "slides.csv").write_text("\n".join(table) + "\n")
    captions = write(tmp_path / "roi.jsonl", [{"image": f"roi{i}.png", "caption": f"picture {i}"} for i in range(6)])
    monkeypatch.setattr(run, "load", lambda folder: Seeing())
    inputs = {"records": tmp_path / "records", "slides": tmp_path / "slides.csv", "region_texts": captions}
    for protocol, gallery in (("strict", 5), ("paper", 6)):
        found = run.evaluate(EvaluationSpec(run="seeing", out=tmp_path / protocol, protocol=protocol, **inputs))
        for direction in ("region_to_text", "text_to_region"):
            block = found["region_retrieval"][direction]["all"]
            assert block["R@1"]["value"] == 1 and block["gallery"] == gallery and block["queries"] == 6
        assert "Retrieval of regions" in (tmp_path / protocol / "report.html").read_text()
    with open(tmp_path / "strict" / "region_ranks.csv", newline="") as file:
        assert {row["text_to_region_rank"] for row in csv.DictReader(file)} == {"1.0"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "slide S20 has [0-9]+ regions; give a point"),
        ({"x": 10}, "x 10, y '': expected two numbers"),
        ({"x": "left", "y": 3}, "expected two numbers"),
        ({"x": 1e6, "y": 3}, "no patch at x 1e.06, y 3"),
        ({"caption": "..."}, "the caption of S20 is empty"),
        ({"slide_id": ["S20", "S21"]}, "a region belongs to one slide, but this text names 2"),
        ({"slide_id": "S00", "x": 1, "y": 1}, "none of its texts belongs to a slide of the split"),
    ],
)
def test_texts_of_no_region_are_named(cohort, tmp_path, row, message):
    rows = [{"slide_id": "S20", "caption": "glands"} | row]
    if row.get("caption"):
        x, y = cohort.features("S20").coords[0].tolist()
        rows[0] |= {"x": x, "y": y}
    with pytest.raises(ValueError, match=message):
        regions.read_region_texts(write(tmp_path / "t.jsonl", rows), cohort)


def test_a_row_without_caption_is_named(cohort, tmp_path):
    with pytest.raises(ValueError, match="t.jsonl, line 1: no column caption"):
        regions.read_region_texts(write(tmp_path / "t.jsonl", [{"slide_id": "S20"}]), cohort)
