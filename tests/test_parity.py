"""The parity command on the released model's own case, and on damaged copies of it."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

TESTS = Path(__file__).parent
BASE = TESTS / "golden" / "base"

spec = importlib.util.spec_from_file_location("parity_command", TESTS / "parity.py")
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)


@pytest.fixture
def case(tmp_path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "case"))


def test_agrees_with_the_released_model(capsys):
    assert parity.main([str(BASE), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(parity.OUTPUTS) <= set(rows)
    gradients = [row for name, row in rows.items() if name.startswith("d loss / d ")]
    # Each tensor that is split in three here counts three times: two in the region layers, one in the text-region.
    assert len(gradients) == len(load_file(BASE / "grads.safetensors")) + 2 * 2 * 3
    assert sum(row["largest"] > 1e-5 for row in gradients) > 140  # the reference is no set of zeros


def test_agrees_with_the_follow_up_network(capsys):
    """Its LoRA kept, its texts pooled over padding, as published."""
    assert parity.main([str(TESTS / "golden" / "pathflip2"), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(parity.OUTPUTS2)
    assert all(row["error"] < 1e-6 * row["largest"] for row in rows.values())


def test_wrong_outputs_and_gradients_fail(case, capsys):
    with np.load(case / "io.npz") as archive:
        arrays = dict(archive)
    arrays["region_attention"] = arrays["region_attention"] + 2e-4
    arrays["loss_region"] = arrays["loss_region"] * (1 + 3e-5)
    np.savez(case / "io.npz", **arrays)
    gradients = load_file(case / "grads.safetensors")
    gradients["path_proj.weight"][3, 5] += 2e-3 * np.abs(gradients["path_proj.weight"]).max()
    del gradients["Qformer.bert.encoder.layer.1.output.dense.bias"]
    gradients["another.weight"] = np.ones(2, np.float32)
    save_file(gradients, case / "grads.safetensors")
    assert parity.main([str(case), "--json"]) == 1
    failed = [row["name"] for row in json.loads(capsys.readouterr().out) if not row["ok"]]
    assert failed == [
        "region_attention",
        "loss_region",
        "d loss / d qformer/layers/1/ffn/output/bias",
        "d loss / d slide_projection/kernel",
        "gradient of another.weight: not a parameter here",
    ]


def test_a_case_without_gradients_says_so(case, capsys):
    (case / "grads.safetensors").unlink()
    assert parity.main([str(case)]) == 0
    assert "gradients were not compared" in capsys.readouterr().out


def test_what_is_no_case_is_named(case, capsys):
    with np.load(case / "io.npz") as archive:
        np.savez(case / "io.npz", **{name: archive[name] for name in archive.files if name != "negatives"})
    with pytest.raises(SystemExit, match="2"):
        parity.main([str(case)])
    assert "negatives" in capsys.readouterr().err
