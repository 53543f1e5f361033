"""Every command of the tutorial is run, in its order, on fewer slides and for fewer steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
# What makes the page short enough for a test; each must change a command.
SMALLER = {
    "--slides 240 --size 1280": "--slides 30 --size 640",
    "--workdir run": "--config.train.steps=2 --config.train.batch_size=4 --config.train.eval_every=2 "
    "--config.train.save_every=2 --config.model.hidden=16 --config.model.embed_dim=16 --config.model.heads=2 "
    "--config.model.layers=1 --workdir run",
    "--few-shot 1 4 16": "--few-shot 1",
    "--most-slides 6": "--most-slides 2",
}


def commands() -> list[str]:
    """The lines of the page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    lines = commands()
    assert len(lines) > 10
    for full, smaller in SMALLER.items():
        assert any(full in line for line in lines), full
        lines = [line.replace(full, smaller) for line in lines]
    for line in lines:
        program, *rest = shlex.split(line)
        command = [sys.executable, *(["-m", "pathflip_jax.cli"] if program == "pathflip" else []), *rest]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    made = ("scores/report.html", "maps/SYN-0001-A.png", "maps/page/index.html", "page/index.html", "probes/report.html")
    for name in (*made, "compared/compare.html", "for_transformers/README.md"):
        assert (tmp_path / name).stat().st_size > 1000, name


def test_it_names_commands_and_pictures_that_there_are():
    from pathflip_jax.commands import COMMANDS

    known = {module.__name__.rsplit(".")[-1].replace("import_features", "import") for module in COMMANDS}
    text = TUTORIAL.read_text(encoding="utf-8")
    assert set(re.findall(r"^pathflip (\w+)", text, re.MULTILINE)) <= known
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (TUTORIAL.parent / picture).exists(), picture
