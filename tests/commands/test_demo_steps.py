"""The demo: every step is a command that parses, the first failure ends it, and its setup has all that it needs."""

import configparser
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pathflip_jax.cli import build_parser
from pathflip_jax.commands import demo_steps
from pathflip_jax.training.settings import parse

ROOT = Path(__file__).parents[2]


def test_every_step_is_a_command_that_parses():
    plan = demo_steps.steps(Path("demo"), slides=440, seed=0, workers=2)
    assert len({title for title, _ in plan}) == len(plan) == 9
    for _, (program, *arguments) in plan:
        if program == "pathflip" and arguments[0] == "train":
            parse(arguments[1:])
        elif program == "pathflip":
            build_parser().parse_args(arguments)


@pytest.mark.parametrize("failing", [None, 3])
def test_steps_run_in_order_and_the_first_failure_ends_the_demo(failing, monkeypatch, capsys, tmp_path):
    ran = []

    def run(command):
        ran.append(command)
        return SimpleNamespace(returncode=7 * (len(ran) == failing))

    monkeypatch.setattr(demo_steps.subprocess, "run", run)
    code = demo_steps.run_demo(tmp_path / "demo")
    said = capsys.readouterr().out.strip().splitlines()
    if failing:
        assert code == 7 and len(ran) == failing and "Step 3 of the demo ended with exit code 7" in said[-1]
    else:
        assert code == 0 and len(ran) == 9 and said[-1] == str(tmp_path / "demo" / "report.html")
        assert sum(re.fullmatch(r"  took \d+ s", line) is not None for line in said) == 9


@pytest.mark.parametrize("lock", sorted(path.name for path in (ROOT / "requirements").glob("demo-*.txt")))
def test_the_setup_of_the_demo_scores_captions_in_full(lock):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = re.findall(r"^([\w-]+)", setup["options.extras_require"]["language"], re.MULTILINE)
    locked = re.findall(r"^([\w-]+)==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE)
    assert len(needed) == 2 and set(needed) <= set(locked)
