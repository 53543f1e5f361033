"""README: it is short, its Python runs after the demo, and its figures are those of the benchmarks."""

import contextlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pages
import pytest

from pathflip_jax import cli
from pathflip_jax.commands.demo_steps import SLIDE_PIXELS, steps

README = (pages.ROOT / "README.md").read_text(encoding="utf-8")
WORDS = 1200
# Rows of the tables of speed, and the ratios of `benchmarks/step.py` behind each.
ROWS = {
    "training step, 2 slides of 24 regions": ["train_base"],
    "training step, a whole slide of 65,536 patches": ["train_whole_slide"],
    "encode a slide of 24 regions": ["encode_slide_base"],
    "memory of a training step": ["memory_train_base", "memory_train_whole_slide"],
    "training step: 4,096 patches; 65,536": ["train_base", "train_whole_slide"],
    "encode a slide: 4,096 patches; 65,536": ["encode_slide_base", "encode_whole_slide"],
}
SMALL = (
    "--config.train.steps=1 --config.train.batch_size=4 --config.data.val_split= --config.model.hidden=16 "
    "--config.model.embed_dim=16 --config.model.heads=2 --config.model.layers=1"
).split()


def python_code() -> str:
    """The Python code of the README."""
    (code,) = (code for language, code in pages.FENCED.findall(README) if language == "python")
    return code


def test_the_front_page_is_short():
    assert len(README.split()) <= WORDS


def test_its_python_is_ten_lines():
    lines = [line for line in python_code().splitlines() if line]
    assert len(lines) <= 10


@pytest.mark.slow
def test_its_python_runs_after_the_demo(tmp_path, capsys):
    """The demo's own commands, on fewer and smaller slides, up to the first training."""
    with contextlib.chdir(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        for command in (step.command for step in steps(Path("demo"), slides=16, seed=0, workers=1)[:4]):
            command = ["640" if word == str(SLIDE_PIXELS) else word for word in command]
            more = SMALL if command[:2] == ["pathflip", "train"] else []
            program, *rest = [*command, *more]
            code = cli.main(rest) if program == "pathflip" else subprocess.run([sys.executable, *rest]).returncode
            assert code == 0, command
        capsys.readouterr()
        exec(compile(python_code(), "README.md", "exec"), {})
        said = capsys.readouterr().out.strip().splitlines()
        assert len(said) == 2 and all(re.fullmatch(r".+: .+ \[ ?\d+ +\d+\]", line) for line in said), said
        assert Path("where.png").stat().st_size > 10_000


def measured() -> dict[tuple[str, str], dict]:
    """Ratios by processor and model family, from the results of `benchmarks/step.py`."""
    found = {}
    for path in sorted((pages.ROOT / "benchmarks" / "results").glob("step*.json")):
        result = json.loads(path.read_text())
        (processor,) = (name for name in ("Xeon", "EPYC") if name in result["machine"]["cpu"])
        found[processor, result["settings"].get("family", "pathflip")] = result["ratios"]
    return found


def tables(text: str):
    """(columns, row name, cells) of each table row whose columns name processors."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines(True)]
        if any("Xeon" in cell for cell in rows[0]):
            for name, *cells in rows[2:]:
                yield rows[0][1:], name, cells


def wrong_figures(text: str) -> list[str]:
    """Cells of the tables by processor that differ from the measured ratios; unmeasured cells are skipped."""
    results, wrong, checked = measured(), [], 0
    for columns, name, cells in tables(text):
        family = "pathflip2" if "competent" not in " ".join(columns) else "pathflip"
        processor = ""
        for column, cell in zip(columns, cells, strict=True):
            processor = next((known for known in ("Xeon", "EPYC") if known in column), processor)
            ratios = results.get((processor, family))
            if ratios is None:
                continue
            suffix = "_competent" if "competent" in column else ""
            found = [ratios[key + suffix] for key in ROWS[name]]
            shown = re.findall(r"\d+\.\d+", cell)
            if "memory" in name:
                found = [min(found), max(found)]
            rounded = [f"{value:.{len(text.partition('.')[2])}f}" for value, text in zip(found, shown, strict=True)]
            checked += 1
            if rounded != shown:
                wrong.append(f"{name}, {processor} {column}: {cell}, measured {found}")
    assert checked >= 10
    return wrong


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_its_figures_are_those_that_were_measured(page):
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert wrong_figures(text) == []
    assert wrong_figures(text.replace("| 4.8 |", "| 4.9 |")) != []
