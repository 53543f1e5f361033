"""The benchmark on real tissue: its commands parse, faulty input is named, and a small run is complete."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathflip_jax.cli import build_parser
from pathflip_jax.inference.load import load
from pathflip_jax.runs import bundled
from pathflip_jax.training.settings import parse

COLOURS = {"Normal": (200, 120, 180), "Polyp": (150, 90, 200), "Adenocarcinoma": (120, 40, 120)}
SMALL = "data.regions=4 data.patch_slots=4 train.steps=4 train.eval_every=2 train.save_every=4 train.batch_size=6"


@pytest.fixture
def bench(benchmark_modules):
    return benchmark_modules("real_tissue")


def _stained(rng, colour):
    """An image of one colour with nuclei of 8 um: without structure of that size it would be taken for pen ink."""
    pixels = np.array(colour) + rng.normal(0, 18, (128, 128, 3))
    rows, columns = np.ogrid[:128, :128]
    for row, column in rng.integers(0, 128, (24, 2)):
        pixels[(rows - row) ** 2 + (columns - column) ** 2 < 64] *= (0.5, 0.45, 0.75)
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for number, (name, colour) in enumerate(COLOURS.items()):
        for kind in ("image", "label"):
            (tmp_path / "data" / name / kind).mkdir(parents=True)
        for case in range(6):
            stem = f"GT20{number:02d}{case:02d}-1-400-001.png"
            Image.fromarray(_stained(rng, colour)).save(tmp_path / "data" / name / "image" / stem)
            Image.fromarray(np.pad(np.full((128, 64), 255, np.uint8), ((0, 0), (0, 64)))).save(
                tmp_path / "data" / name / "label" / stem
            )
    return tmp_path / "data"


def _main(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["real_tissue.py", *map(str, arguments)])
    return bench.main()


def test_every_command_parses(bench, benchmark_modules, tmp_path):
    steps, mosaics = (benchmark_modules(f"real_tissue_parts.{name}") for name in ("steps", "mosaics"))
    options = bench.parse(
        ["--data", "d", "--out", str(tmp_path), "--language", "--set", "train.steps=4", "--export", "colon"]
        + ["--", "--window", "3"]
    )
    places = steps.Places(options.out, options.name, options.split)
    for folder in (mosaics.OUTLINES, mosaics.MASKS):
        (places.slides / folder).mkdir(parents=True)
    plan = [*steps.prepare_steps(places, 56, 112.0, 2), *steps.import_steps(places, 297.0, 0.495, "made up")]
    plan += [*steps.vocabulary_steps(places, True), *steps.train_steps(places, 0, options)]
    scored = steps.evaluate_steps(places, 0, options)
    assert [step.with_previous for step in scored] == [False, True, False, True]
    for step in [*plan, *scored, *steps.export_steps(places, 0, options)]:
        assert step.command[0] == "pathflip"
        if step.command[1] == "train":
            parse(step.command[2:])
        else:
            build_parser().parse_args(step.command[1:])
    assert [step.command[-2:] for step in scored] == [["--window", "3"]] * 4
    without = [step for step in plan if "--config.loss.region_weight=0.0" in step.command]
    assert len(without) == 1 and without[0].with_previous
    out = places.scores(0, steps.REGION)
    out.mkdir(parents=True)
    (out / "scores.json").write_text(json.dumps({"command": scored[0].command[1:]}))
    assert len(steps.evaluate_steps(places, 0, options)) == 3  # scored already


def test_faulty_input_ends_with_a_message(bench, monkeypatch, capsys, tmp_path):
    assert _main(bench, monkeypatch, "--data", tmp_path / "none", "--out", tmp_path / "out") == 2
    assert "none: no such folder; give the folder of EBHI-Seg" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _main(bench, monkeypatch, "--textures", tmp_path / "none", "--out", tmp_path / "out", "--export", "colon")
    assert "leave it out with --textures" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_is_complete_and_resumes(bench, monkeypatch, images, tmp_path, capfd):
    settings = [word for setting in SMALL.split() for word in ("--set", setting)]
    arguments = ["--data", images, "--out", tmp_path / "out", "--slides", 12, 6, 6, "--seeds", 0, "--workers", 1]
    arguments += ["--export", "colon"]
    assert _main(bench, monkeypatch, *arguments, *settings) == 0
    table = (tmp_path / "out" / "runs" / "test.md").read_text()
    assert "| with region loss |" in table and "| exact class sets |" in table
    found = json.loads((tmp_path / "out" / "real_tissue.json").read_text())
    assert found["slides"] == 6 and found["machine"]["cores"] >= 1
    assert set(found["table"]["with region loss"]) == {
        "grounding", "grounding_masks", "zero_shot", "zero_shot_windows", "retrieval", "few_shot",
    }  # fmt: skip
    assert len(list(Path(tmp_path / "out" / "runs").glob("*/median_*.png"))) >= 2
    assert 1000 < (tmp_path / "out" / "runs" / "median_slide.jpg").stat().st_size < 300_000
    card = (tmp_path / "out" / "runs" / "colon" / "README.md").read_text()
    assert "EBHI-Seg" in card and "Retrieval" in card and str(tmp_path) not in card
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "out" / "runs")
    assert load("colon").encode_text("a polyp").shape == (1, 64)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("scores.json")}
    capfd.readouterr()
    assert _main(bench, monkeypatch, *arguments, *settings) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "out" / "runs" / "test.md").read_text() == table
