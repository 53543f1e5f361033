"""A wheel in a clean environment can do the whole job: prepare, train, evaluate, with nothing of the source tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / f"demo-{sys.version_info.major}.{sys.version_info.minor}.txt"


def _run(command: list, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_wheel_prepares_trains_and_evaluates(tmp_path):
    environment, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], tmp_path)
    (wheel,) = tmp_path.glob("pathflip_jax-*.whl")
    # Filled from outside, and compiled as it is imported: neither pip nor most of the modules are needed there.
    _run([sys.executable, "-m", "venv", "--without-pip", environment], tmp_path)
    python, pathflip = environment / "bin/python", environment / "bin/pathflip"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-compile"]
    _run([*install, "--requirement", LOCK, wheel], tmp_path)
    assert str(environment) in _run([python, "-c", "import pathflip_jax; print(pathflip_jax.__file__)"], work)

    table = ["--slides", "slides/slides.csv"]
    _run([python, "-m", "data_prep.synthetic", "--out", "slides", "--slides", 24, "--seed", 1], work)
    _run([pathflip, "prepare", "slides", "--out", "records", "--patch-size", 64, "--edge-um", 128, *table], work)
    _run([pathflip, "vocabulary", "slides/reports.jsonl", *table, "--split", "train", "--out", "vocabulary"], work)
    data = {"records": "records", "texts": "slides/reports.jsonl", "slides": "slides/slides.csv"}
    settings = [f"--config.data.{name}={value}" for name, value in (data | {"tokenizer": "vocabulary"}).items()]
    settings += ["--config.train.steps=4", "--config.train.batch_size=8", "--config.data.val_split="]
    _run([pathflip, "train", "--config", "demo", *settings, "--workdir", "run"], work)
    sources = ["--records", "records", "--texts", "slides/reports.jsonl", "--prompts", "slides/prompts.json", *table]
    printed = _run([pathflip, "evaluate", "run", *sources, "--out", "scores", "--json"], work)
    assert {"retrieval", "zero_shot"} <= set(json.loads(printed.splitlines()[-1]))
    assert (work / "scores/report.html").stat().st_size > 10_000
