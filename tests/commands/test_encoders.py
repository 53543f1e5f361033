"""`pathflip encoders`: the list, and the check of weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from vision_weights import timm_weights

from data_prep import hub
from pathflip_jax import cli
from pathflip_jax.vision.recipes import RECIPES


def kaiko(depth: int = 12) -> dict[str, np.ndarray]:
    """Weights of the shape of kaiko_vits16."""
    return timm_weights(replace(RECIPES["kaiko_vits16"].network, depth=depth), dtype=np.float16)


def test_all_encoders_are_listed_with_what_is_here(capsys, monkeypatch):
    monkeypatch.setattr(hub, "cached", lambda recipe: "here" if recipe.name == "phikon" else None)
    assert cli.main(["encoders"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines.keys() >= RECIPES.keys()
    assert " yes " in lines["phikon"] and " no " in lines["uni_v1"]
    assert "gated" in lines["uni_v1"] and "CC-BY-NC-ND-4.0" in lines["uni_v1"] and " 1024 " in lines["uni_v1"]
    assert "open" in lines["phikon"]
    assert cli.main(["encoders", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == RECIPES.keys()
    assert found["virchow2"]["width"] == 2560 and found["virchow2"]["weights"] is None
    assert found["phikon"]["weights"] == "here" and found["phikon"]["patch_size"] == 224


def test_weights_are_recognised(tmp_path, capsys):
    save_file(kaiko(), tmp_path / "model.safetensors")
    assert cli.main(["encoders", "--check", str(tmp_path)]) == 0
    assert "shape of kaiko_vits16 (1aurent/" in capsys.readouterr().out
    assert cli.main(["encoders", "--check", str(tmp_path), "--encoder", "kaiko-vits16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kaiko_vits16": str(tmp_path / "model.safetensors")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "uni_v1"], "pass --check WEIGHTS too"),
        (["--check", "WEIGHTS", "--encoder", "phikom"], "did you mean phikon?"),
        (["--check", "WEIGHTS", "--encoder", "uni_v1"], "not the weights of uni_v1 (MahmoodLab/UNI)"),
        (
            ["--check", "WEIGHTS"],
            "the closest is kaiko_vits16, but 12 tensors differ: blocks.11.norm1.weight is missing",
        ),
        (["--check", "ABSENT"], "no weights of a registered encoder"),
    ],
)
def test_what_is_wrong_with_weights_is_named(arguments, message, tmp_path, capsys):
    save_file(kaiko(depth=11), tmp_path / "weights.safetensors")
    places = {"WEIGHTS": str(tmp_path / "weights.safetensors"), "ABSENT": str(tmp_path / "absent")}
    assert cli.main(["encoders", *(places.get(argument, argument) for argument in arguments)]) == cli.WRONG_INPUT
    assert message in capsys.readouterr().err
