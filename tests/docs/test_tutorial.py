"""Tutorial and notebook: all commands of the page run on fewer slides, then the notebook on their results."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathflip_jax import cli

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "notebooks" / "evaluate.ipynb"
# Replacements that make the page fast enough for a test; each must change a command.
SMALLER = {
    "--slides 240 --size 1280": "--slides 48 --size 640",
    "--shares 0.6 0.1 0.3": "--shares 0.4 0.3 0.3",  # each class in each split
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


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """A folder in which all commands of the page have been run."""
    folder, lines = tmp_path_factory.mktemp("tutorial"), commands()
    assert len(lines) > 10
    for full, smaller in SMALLER.items():
        assert any(full in line for line in lines), full
        lines = [line.replace(full, smaller) for line in lines]
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        for line in lines:
            program, *rest = shlex.split(line)
            code = cli.main(rest) if program == "pathflip" else subprocess.run([sys.executable, *rest]).returncode
            assert code == 0, line
    return folder


@pytest.mark.slow
def test_every_command_leaves_what_the_page_promises(walked):
    made = (
        "scores/report.html",
        "maps/SYN-0001-A.png",
        "maps/page/index.html",
        "page/index.html",
        "probes/report.html",
    )
    for name in (*made, "compared/compare.html", "for_transformers/README.md"):
        assert (walked / name).stat().st_size > 1000, name


def write_feature_files(records: Path, folder: Path) -> None:
    """Write the slides of records in CLAM's format, which states neither patch size nor mpp."""
    from pathflip_jax.data.records.records import Records

    opened = Records(records)
    folder.mkdir()
    for number in range(len(opened.slides)):
        slide = opened.read(number)
        with h5py.File(folder / f"{slide.slide_id}.h5", "w") as file:
            file["features"], file["coords"] = np.asarray(slide.features, np.float32), slide.coords


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run and records", "PyTorch weights and feature files", "the follow-up network"])
def test_the_notebook_runs(source, walked, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    chosen = {
        "CHECKPOINT": f"{walked}/run", "BERT": None, "FEATURES": f"{walked}/records", "PATCH": {},
        "REPORTS": f"{walked}/cohort/reports.jsonl", "PROMPTS": f"{walked}/cohort/prompts.json",
        "LABELS": f"{walked}/slides.csv", "IMAGES": f"{walked}/cohort", "TEXTS": ["extensive necrosis", "fat"],
    }  # fmt: skip
    if source == "the follow-up network":
        chosen["CHECKPOINT"] = str(tmp_path / "two")
        data = {
            "records": "records",
            "texts": "cohort/reports.jsonl",
            "slides": "slides.csv",
            "tokenizer": "vocabulary",
        }
        options = [f"--config.data.{name}={walked / path}" for name, path in data.items()]
        assert cli.main(["train", "--config", "pathflip2:smoke", *options, "--workdir", chosen["CHECKPOINT"]]) == 0
    if source == "PyTorch weights and feature files":
        from pathflip_jax.export.pytorch import export

        export(walked / "run", tmp_path / "torch")
        write_feature_files(walked / "records", tmp_path / "features")
        chosen |= {
            "CHECKPOINT": f"{tmp_path}/torch/model.safetensors",
            "BERT": f"{tmp_path}/torch/bert",
            "IMAGES": None,
        }
        chosen |= {"FEATURES": f"{tmp_path}/features", "PATCH": {"patch_size": 64, "mpp": 0.5}}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in chosen.items())
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"JAX_PLATFORMS": "cpu"})
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    said = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "48 slides" in said and "balanced_accuracy" in said and "slide to text: R@1" in said
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 3, said
    assert (tmp_path / "grounding.png").stat().st_size > 10_000


def test_the_notebook_is_short_clean_and_installs_with_one_line():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) < 10 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    (install,) = [cell["source"] for cell in code if "install" in cell["metadata"].get("tags", [])]
    assert install == ["%pip install --quiet pathflip-jax"]


def test_it_names_commands_and_pictures_that_there_are():
    from pathflip_jax.commands import COMMANDS

    text = TUTORIAL.read_text(encoding="utf-8")
    assert set(re.findall(r"^pathflip (\w+)", text, re.MULTILINE)) <= COMMANDS.keys()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (TUTORIAL.parent / picture).exists(), picture
