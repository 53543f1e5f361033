"""`pathflip ground` on all kinds of feature files and slides: every output is located on the tissue.

The slide is white but for one black square. A stand-in for the model scores a patch by the share of it that is black,
which the feature file holds, so that every file must point at the square, whatever tool, level or overlap it came from.
"""

import json

import h5py
import numpy as np
import pytest
import tifffile
from flax import nnx
from PIL import Image

from pathflip_jax import cli
from pathflip_jax.data.readers.outlines import contains, read_outlines
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.inference import load
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run

WIDTH, HEIGHT = 4096, 3072
LEFT, TOP, EDGE = 1536, 1024, 512  # the black square
TEXT = "a black square"


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory):
    level0 = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    level0[TOP : TOP + EDGE, LEFT : LEFT + EDGE] = 0
    path = tmp_path_factory.mktemp("slide") / "S1.tiff"
    with tifffile.TiffWriter(path) as writer:
        known = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "resolutionunit": "CENTIMETER"}
        writer.write(level0, resolution=(40_000, 40_000), **known)
        writer.write(level0[::4, ::4], resolution=(10_000, 10_000), subfiletype=1, **known)
    return path


def grid(step, offset=(0, 0), size=512):
    x, y = np.arange(offset[0], WIDTH - size + 1, step), np.arange(offset[1], HEIGHT - size + 1, step)
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def black(coords, size):
    low, high = np.maximum(coords, (LEFT, TOP)), np.minimum(coords + size, (LEFT + EDGE, TOP + EDGE))
    return np.clip(high - low, 0, None).prod(1) / size**2


def write(path, coords, size, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.repeat(black(coords, size)[:, None], 4, 1).astype(np.float32)
        file["coords"] = coords
        file["coords"].attrs.update(attributes)
    return path


def trident(folder):
    """256 pixels at 20x on a scan of 40x: 512 at level 0."""
    return write(
        folder / "S1.h5", grid(512), 512, patch_size=256, patch_size_level0=512.0, level0_magnification=40,
        target_magnification=20, overlap=0, level0_width=WIDTH, level0_height=HEIGHT,
    )  # fmt: skip


def clam_level_1(folder):
    """Patches of 128 pixels at level 1, four times smaller; the attributes stand in the folder beside."""
    place = folder / "patches" / "S1.h5"
    write(place, grid(512), 512, patch_size=128, patch_level=1, downsample=(4.0, 4.0), level_dim=(1024, 768))
    return write(folder / "h5_files" / "S1.h5", grid(512), 512)


def overlapping(folder):
    return write(folder / "S1.h5", grid(128, size=256), 256, patch_size=256, patch_size_level0=256, overlap=128)


def off_the_grid(folder):
    """Small patches from a corner of their own; the file says nothing, their size is the gap."""
    return write(folder / "S1.h5", grid(112, (31, 77), size=112), 112)


def padded(folder):
    """The last column sticks out of the slide, as TRIDENT leaves it."""
    coords = np.concatenate([grid(512), [[WIDTH - 100, 512]]])
    return write(folder / "S1.h5", coords, 512, patch_size=512, patch_size_level0=512)


class Stand:
    """A predictor that reads the scores off the features."""

    default_method = "slide"

    def ground(self, slide, texts, negative=(), method=None, window=3):
        scores = np.repeat(slide.features[:, :1].T, len(texts), 0)
        return Grounding(
            slide.slide_id, tuple(texts), scores, scores[:, :1], slide.coords, slide.patch_size, slide.mpp, slide.width,
            slide.height, method or self.default_method, tuple(negative),
        )  # fmt: skip


@pytest.fixture
def stand(monkeypatch):
    monkeypatch.setattr(load, "load", lambda folder: Stand())


def run(*arguments):
    return cli.main(["ground", *map(str, arguments), "--checkpoint", "run"])


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("made_by", [trident, clam_level_1, overlapping, off_the_grid, padded])
def test_every_file_points_at_the_square(stand, slide_file, tmp_path, capsys, made_by, image):
    out = tmp_path / "out"
    more = ("--image", slide_file, "--top", 1) if image else ()
    settings = ("--threshold", 0.5, "--smooth", 0, "--min-patches", 1, "--out", out, "--json", *more)
    assert run(made_by(tmp_path), TEXT, *settings) == 0
    written = json.loads(capsys.readouterr().out)
    assert set(written) == {"picture", "scores", "geojson", "json", "attention"} | ({"patches"} if image else set())

    facts = json.loads((out / "S1.json").read_text())
    (box,) = facts["texts"][0]["boxes"]
    exact = made_by in (trident, clam_level_1, padded)
    off = 0 if exact else facts["patch_size"]  # a patch on the square's rim counts as a whole
    found = np.array([box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]])
    assert np.abs(found - [LEFT, TOP, LEFT + EDGE, TOP + EDGE]).max() <= off
    knows_mpp = image or made_by is trident
    assert (box["area_mm2"] is not None) == knows_mpp
    if knows_mpp:
        assert box["area_mm2"] == pytest.approx((EDGE * 0.25 / 1000) ** 2, rel=0.01 if exact else 0.5)

    outlines = read_outlines(out / "S1.geojson")[TEXT]
    margin = facts["patch_size"] / 2 if not exact else 1
    inner = [(LEFT + margin + 1, TOP + margin + 1), (LEFT + EDGE - margin - 1, TOP + EDGE - margin - 1)]
    outer = [(LEFT - margin - 9, TOP + 200), (LEFT + 200, TOP + EDGE + margin + 9), (9, 9)]
    centre = [(LEFT + EDGE / 2, TOP + EDGE / 2)]
    assert contains(outlines, np.array(centre)).all() and not contains(outlines, np.array(outer)).any()
    assert exact or contains(outlines, np.array(inner)).all()

    with h5py.File(written["attention"][0]) as file:
        scores, coords = file["attention_scores"][:, 0], file["coords"][:]
    best = coords[scores.argmax()]
    assert scores.max() >= 0.9 and (best >= (LEFT - 64, TOP - 64)).all() and (best < (LEFT + EDGE, TOP + EDGE)).all()
    with np.load(out / "S1.npz") as arrays:
        assert arrays["patch_scores"][0].tolist() == scores.tolist() and arrays["coords"].tolist() == coords.tolist()
    if image:
        with Image.open(written["patches"][0]) as sheet, Image.open(written["patches"][1]) as patch:
            assert sheet.width > 100 and np.asarray(patch).mean() < 30  # the top patch shows the square


def test_patches_beyond_the_slide_are_told(stand, slide_file, tmp_path, capsys):
    coords = grid(512) * 4  # of another level
    silent = write(tmp_path / "S1.h5", coords, 512, patch_size_level0=512)
    assert run(silent, TEXT, "--image", slide_file, "--out", tmp_path / "out") == cli.WRONG_INPUT
    message = capsys.readouterr().err
    assert "slide S1: 44 of 48 patches lie outside the slide" in message and "S1.tiff is 4096 x 3072" in message
    known = write(tmp_path / "S1.h5", coords, 512, patch_size_level0=512, level0_width=WIDTH, level0_height=HEIGHT)
    assert run(known, TEXT, "--out", tmp_path / "out") == cli.WRONG_INPUT
    message = capsys.readouterr().err
    assert "42 of 48 patches" in message and "divided by 4 they would fit" in message
    other = write(tmp_path / "S1.h5", grid(512), 512, patch_size_level0=512, level0_width=9000, level0_height=9000)
    assert run(other, TEXT, "--image", slide_file, "--out", tmp_path / "out") == cli.WRONG_INPUT
    assert "come from a slide of 9000 x 9000 pixels, which is another slide" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_asked_is_told(stand, slide_file, tmp_path, capsys, tiny_cohort):
    features = trident(tmp_path)
    assert run(features, TEXT, "--top", 3, "--out", tmp_path / "out") == cli.WRONG_INPUT
    assert "--image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(features, TEXT, "--smooth", -1, "--out", tmp_path / "out")
    assert "--smooth: -1: expected a finite number of at least 0" in capsys.readouterr().err
    records = (tiny_cohort.records, TEXT, "--slide-id", "S05", "--mpp", 0.5, "--out", tmp_path / "out")
    assert run(*records) == cli.WRONG_INPUT
    assert "records state mpp themselves" in capsys.readouterr().err


def test_with_a_negative_text_areas_start_at_nought(stand, tmp_path):
    assert run(trident(tmp_path), TEXT, "other", TEXT, "--negative", "glass", "--out", tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "S1.json").read_text())
    assert facts["negative"] == ["glass"] and [t["threshold"] for t in facts["texts"]] == [0, 0]
    assert [t["text"] for t in facts["texts"]] == [TEXT, "other"]


def test_a_model_from_its_run_folder(tmp_path, tiny_cohort, capsys):
    """The whole way, with a model: two texts of one slide of the records, a third subtracted."""
    config = PathFLIPConfig(
        feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
        max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
    )  # fmt: skip
    data = {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96}
    model = PathFLIP(config, nnx.Rngs(0))
    save_run(tmp_path / "run", model, {"data": data}, TextTokenizer(tiny_cohort.vocabulary))
    texts = ("necrosis", "fat at the edge", "--negative", "stroma", "--threshold", "-1000", "--min-patches", "0")
    place = ("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--json")
    command = ("ground", tiny_cohort.records, "--slide-id", "S05", *texts, *place)
    assert cli.main(list(map(str, command))) == 0
    written = json.loads(capsys.readouterr().out)
    facts = json.loads((tmp_path / "out" / "S05.json").read_text())
    assert len(written["attention"]) == len(facts["texts"]) == 2
    assert sum(box["patches"] for box in facts["texts"][0]["boxes"]) == facts["patches"]
    predictor = load.load(tmp_path / "run")
    slide = load.read_slide(tiny_cohort.records, "S05")
    alone = predictor.ground(slide, ["necrosis", "fat at the edge", "stroma"]).patch_scores
    with np.load(written["scores"]) as arrays:
        assert arrays["patch_scores"] == pytest.approx(alone[:2] - alone[2], abs=1e-5)
