"""Which run a folder holds: settings that make it another, and a length that may change."""

import copy

import pytest

from pathflip_jax import checkpoint
from pathflip_jax.resume import claim


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps that has done 60: its folder, and its settings."""
    resolved = {"data": {"records": "r"}, "train": {"steps": 100, "epochs": 10, "seed": 0, "checkpoints": ""}}
    (tmp_path / "checkpoints" / "60").mkdir(parents=True)
    (tmp_path / "checkpoints" / "80.orbax-checkpoint-tmp-1").mkdir()  # killed in mid-save
    checkpoint.write_json(tmp_path / checkpoint.CONFIG, resolved)
    return tmp_path, resolved


def changed(resolved, **settings):
    now = copy.deepcopy(resolved)
    now["train"] |= settings
    return now


@pytest.mark.parametrize("steps", [60, 90, 200])
def test_a_run_may_be_given_another_length(run, steps, capsys):
    folder, resolved = run
    claim(folder, changed(resolved, steps=steps, epochs=20), pytest.fail)
    assert checkpoint.read_json(folder / checkpoint.CONFIG) == changed(resolved, steps=steps, epochs=20)
    said = capsys.readouterr().err
    assert f"was to end at step 100 and now ends at {steps}; from step 60 on the learning rate follows" in said
    claim(folder, changed(resolved, steps=steps, epochs=20), pytest.fail)
    assert capsys.readouterr().err == ""


def test_a_run_cannot_end_before_where_it_is(run):
    folder, resolved = run
    with pytest.raises(ValueError, match="has done 60 steps, and 59 are asked for.*60 steps or more"):
        claim(folder, changed(resolved, steps=59), pytest.fail)
    assert checkpoint.read_json(folder / checkpoint.CONFIG) == resolved


def test_a_setting_that_a_run_began_without_is_no_other_run(run):
    folder, resolved = run
    now = changed(resolved)
    now["data"]["max_unknown_share"] = 0.2
    claim(folder, now, pytest.fail)
    with pytest.raises(ValueError, match="train.seed: 0 in the run, 1 now"):
        claim(folder, changed(resolved, seed=1, steps=200), pytest.fail)
    assert checkpoint.read_json(folder / checkpoint.CONFIG) == resolved
