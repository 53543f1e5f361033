"""The notebook, executed cell by cell in a kernel of its own on a small cohort."""

import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "evaluate.ipynb"


def read():
    """The notebook and its cells of code by tag, those without a tag in their order."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_is_short_clean_and_installs_with_one_line():
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) < 10 and not any(cell.outputs or cell.execution_count for cell in code)
    (install,) = [cell.source for cell in code if "install" in cell.metadata.get("tags", [])]
    assert install == "%pip install --quiet pathflip-jax"


def written(cells) -> str:
    """All that the cells printed; an error of theirs would have ended the run."""
    return "\n".join(out.text for cell in cells for out in cell.get("outputs", []) if out.output_type == "stream")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["records", "files"])
def test_it_runs_on_a_cohort(source, notebook_cohort, tmp_path):
    """Once over a trained run and records with slides beside them, once over PyTorch weights and feature files."""
    notebook = read()
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in notebook_cohort[source].items())
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={"JAX_PLATFORMS": "cpu", **notebook_cohort["environment"]})
    said = written(notebook.cells)
    assert "24 slides" in said and "R@1" in said and "chance" in said
    pictures = [
        out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == (3 if source == "records" else 2), json.dumps(said)
    assert (tmp_path / "grounding.png").stat().st_size > 10_000
