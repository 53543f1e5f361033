"""Commands that answer about slides, on a folder of slide files and feature files, one of them broken."""

import json

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from pathflip_jax import cli
from pathflip_jax.inference import assistant
from pathflip_jax.inference.load import load

BROKEN = "bad.tiff"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Slides A and bad, features of slide C, and the cache beside them."""
    place = tmp_path_factory.mktemp("lab")
    slides = place / "slides"
    slides.mkdir()
    pixels = np.full((448, 448, 3), 240, np.int16)
    pixels[64:400, 64:400] = (200, 120, 180)
    pixels += np.random.default_rng(0).integers(-20, 20, pixels.shape, np.int16)
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    known = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate", "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(slides / "A.tiff", pixels, resolution=(2e4, 2e4), **known)
    (slides / BROKEN).write_bytes(b"II*\0 but no slide")
    features = load("colon-biopsy").read(slides / "A.tiff", cache=place / "cache", workers=1)
    with h5py.File(slides / "C.h5", "w") as file:
        file["features"], file["coords"] = features.features, features.coords
        file["coords"].attrs.update(patch_size=112, patch_level=0, downsample=(1.0, 1.0))
    return place


def run(folder, command, *arguments, checkpoint="colon-biopsy", slides="slides"):
    cache = ("--cache", folder / "cache", "--workers", 1)
    return cli.main([command, *map(str, (folder / slides, *arguments, "--checkpoint", checkpoint, *cache))])


def test_ground_draws_every_slide_and_reports_the_broken_one(folder, tmp_path, capsys):
    assert run(folder, "ground", "glands", "--out", tmp_path / "maps", "--json") == 1
    written, told = capsys.readouterr()
    found = json.loads(written)
    assert sorted(found) == ["A", "C"] and "slides left out:\n  bad: " in told
    sheet = tmp_path / "maps" / "patches" / "A" / "sheet.png"
    assert sheet.exists() and str(sheet) in found["A"]["patches"]  # cut out of the slide itself
    assert "patches" not in found["C"]


def test_ground_within_outlines(folder, tmp_path, capsys):
    ring = [[64, 64], [230, 64], [230, 400], [64, 400], [64, 64]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "A.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))

    def patches(*options):
        assert run(folder, "ground", "glands", "--out", tmp_path / "maps", *options, slides="slides/A.tiff") == 0
        return np.load(tmp_path / "maps" / "A.npz")["coords"]

    every = {tuple(corner) for corner in patches().tolist()}
    within = {tuple(corner) for corner in patches("--within", tmp_path).tolist()}
    without = {tuple(corner) for corner in patches("--without", tmp_path / "A.geojson").tolist()}
    assert within | without == every and not within & without
    assert within == {(x, y) for x, y in every if 64 < x + 56 < 230 and 64 < y + 56 < 400}
    feature["geometry"]["coordinates"] = [[[x * 9, y] for x, y in ring]]
    (tmp_path / "A.geojson").write_text(json.dumps(feature))
    assert run(folder, "ground", "a", "--within", tmp_path, "--out", tmp_path / "maps", slides="slides/A.tiff") == 2
    assert "reach to x, y = 2070, 400, but slide A is 448 x 448 pixels" in capsys.readouterr().err


def test_embed_takes_slides_and_features_together(folder, tmp_path, capsys):
    assert run(folder, "embed", "--mpp", 0.5, "--out", tmp_path / "e.parquet") == 1
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["slide_id"].to_pylist() == ["A", "C"]
    one, two = np.array(table["embedding"].to_pylist())
    np.testing.assert_allclose(one, two, atol=1e-5)
    (failure,) = json.loads((tmp_path / "e.parquet.failures.json").read_text())
    assert failure["slide"] == "bad" and "bad.tiff" in failure["error"]


class Assistant:
    """Language model that is quick, over a real aligner."""

    def __init__(self):
        self.predictor = load("colon-biopsy")

    def embed_slides(self, slides):
        return [slide.features for slide in slides]

    def prompt(self, question, rows):
        return question

    def caption(self, rows, sampling):
        return [f"{len(rows[0])} patches"]

    def answer(self, prompts, sampling):
        return [f"Yes: {prompts[0]}"]


@pytest.fixture
def language(monkeypatch):
    monkeypatch.setattr(assistant, "load_assistant", lambda *_, **__: Assistant())


def test_caption_and_ask_answer_for_every_slide(folder, language, capsys):
    assert run(folder, "caption", checkpoint="lm") == 1
    captions, told = capsys.readouterr()
    one, two = captions.splitlines()
    assert one.startswith("A: ") and two == one.replace("A: ", "C: ") and "bad: " in told
    assert run(folder, "ask", "Necrosis?", "--json", checkpoint="lm") == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [{"slide_id": name, "answer": "Yes: Necrosis?"} for name in ("A", "C")]
    assert run(folder, "caption", checkpoint="lm", slides="slides/A.tiff") == 0
    assert capsys.readouterr().out == one.removeprefix("A: ") + "\n"


def test_a_broken_slide_alone_is_an_error(folder, language, capsys):
    for command, more in (("caption", ()), ("ground", ("a", "--out", folder / "maps"))):
        assert run(folder, command, *more, checkpoint="colon-biopsy", slides=f"slides/{BROKEN}") == 2
        assert f"pathflip: {folder / 'slides' / BROKEN}: OpenSlide cannot open it" in capsys.readouterr().err


def test_one_slide_file_is_not_drawn_under_several_slides(folder, tmp_path, capsys):
    image = ("--image", folder / "slides" / "A.tiff")
    assert run(folder, "ground", "a", "--out", tmp_path, *image) == 2
    assert "one slide file for 3 slides; choose one of them by --slide-id" in capsys.readouterr().err
    assert run(folder, "ground", "a", "--out", tmp_path, *image, "--slide-id", "C") == 0


def test_a_text_without_words_is_refused_before_a_slide_is_encoded(folder, tmp_path, capsys, monkeypatch):
    from data_prep.slide_encoder import SlideEncoder

    monkeypatch.setattr(SlideEncoder, "encode", lambda *_: pytest.fail("encoded"))
    assert run(folder, "ground", "  ", "--out", tmp_path) == 2
    assert "has no words" in capsys.readouterr().err
