"""Demo: every step is a command that parses, the first failure ends it, and its lock files are complete."""

import configparser
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from pathflip_jax.cli import build_parser
from pathflip_jax.commands import demo_steps
from pathflip_jax.training.settings import parse

ROOT = Path(__file__).parents[2]
PINS = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs processes kept to some cores")
STEPS = demo_steps.steps(Path("demo"), slides=440, seed=0, workers=2)


def test_every_step_is_a_command_that_parses():
    assert len({step.title for step in STEPS}) == len(STEPS) == 8
    for program, *arguments in (step.command for step in STEPS):
        if program == "pathflip" and arguments[0] == "train":
            parse(arguments[1:])
        elif program == "pathflip":
            build_parser().parse_args(arguments)


def _plan(tmp_path, failing=0):
    """Steps like those of the demo; each prints its cores, and leaves a file when done."""
    code = (
        "import os, pathlib, signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "print('cores', sorted(os.sched_getaffinity(0)), flush=True);"
        "print('at 1%\\rat 99%', flush=True);"
        "path, failing, slow = sys.argv[1:];"
        "time.sleep(60) if slow == 'True' else None;"
        "sys.exit(7) if failing == 'True' else pathlib.Path(path).touch()"
    )
    return [
        step._replace(
            command=[sys.executable, "-c", code]
            + [str(tmp_path / str(number)), str(number == failing), str(failing == number + 1 and number == 4)]
        )
        for number, step in enumerate(STEPS, 1)
    ]


@PINS
def test_steps_run_in_order_and_the_two_trainings_side_by_side(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(demo_steps, "steps", lambda *_, **__: _plan(tmp_path))
    cores = sorted(os.sched_getaffinity(0))
    assert demo_steps.run_demo(tmp_path / "demo") == 0
    said = capfd.readouterr().out
    assert said.strip().splitlines()[-1] == str(tmp_path / "demo" / "report.html")
    assert sorted(os.listdir(tmp_path)) == [str(number) for number in range(1, 9)]
    assert len(re.findall(r"^  (?:step \d )?took \d+ s$", said, re.MULTILINE)) == 8
    shown = re.findall(r"^cores \[(.*)\]$", said, re.MULTILINE)
    whole = [", ".join(map(str, cores))]
    pair = [", ".join(map(str, share)) for share in (cores[::2], cores[1::2])] if len(cores) > 1 else whole * 2
    assert shown == 3 * whole + pair + 3 * whole
    lines = said.split("\n")
    assert lines.count("at 1%\rat 99%") == 7 and lines.count("at 99%") == 1  # delayed: final state
    assert said.index("[5/8]") < said.index("Output of step 5:") < said.index("[6/8]")
    assert sorted(os.sched_getaffinity(0)) == cores


@PINS
@pytest.mark.parametrize("failing", [3, 5])
def test_the_first_failure_ends_the_demo(failing, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(demo_steps, "steps", lambda *_, **__: _plan(tmp_path, failing))
    assert demo_steps.run_demo(tmp_path / "demo") == 7  # step 4, which would take a minute, is terminated
    said = capfd.readouterr().out.strip().splitlines()
    assert f"Step {failing} of the demo ended with exit code 7" in said[-1]
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"][: failing - 1]


def test_survival_is_scored_where_its_extra_is_installed(monkeypatch):
    installed = importlib.util.find_spec("sksurv") is not None
    assert ("--survival-time" in STEPS[-1].command) == installed and "--regression" in STEPS[-1].command
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = demo_steps.steps(Path("demo"), slides=440, seed=0, workers=2)[-1].command
    assert "--survival-time" not in plain and "--regression" in plain


@pytest.mark.parametrize("lock", sorted(path.name for path in (ROOT / "requirements").glob("demo-*.txt")))
def test_the_setup_of_the_demo_scores_captions_and_survival(lock):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    needed = re.findall(r"^([\w-]+)", extras["language"] + extras["survival"], re.MULTILINE)
    locked = re.findall(r"^([\w-]+)==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE)
    assert len(needed) == 3 and set(needed) <= set(locked)
