"""Identity of a run folder: settings that make it another run, and a length that may change."""

import copy
import json

import pytest

from pathflip_jax.data.storage import json_files
from pathflip_jax.runs import files
from pathflip_jax.training import settings
from pathflip_jax.training.resume import differences, lock_to_run, resume_as, saved_config


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps that has done 60: its folder, and its settings."""
    resolved = {"data": {"records": "r"}, "train": {"steps": 100, "epochs": 10, "seed": 0, "checkpoints": ""}}
    (tmp_path / "checkpoints" / "60").mkdir(parents=True)
    (tmp_path / "checkpoints" / "80.orbax-checkpoint-tmp-1").mkdir()  # killed in mid-save
    json_files.write_json(tmp_path / files.CONFIG, resolved)
    return tmp_path, resolved


def changed(resolved, **settings):
    now = copy.deepcopy(resolved)
    now["train"] |= settings
    return now


@pytest.mark.parametrize("steps", [60, 90, 200])
def test_a_run_may_be_given_another_length(run, steps, capsys):
    folder, resolved = run
    lock_to_run(folder, changed(resolved, steps=steps, epochs=20), pytest.fail)
    assert json_files.read_json(folder / files.CONFIG) == changed(resolved, steps=steps, epochs=20)
    said = capsys.readouterr().err
    assert f"was to end at step 100 and will now end at step {steps}; from step 60 on, the learning rate" in said
    lock_to_run(folder, changed(resolved, steps=steps, epochs=20), pytest.fail)
    assert capsys.readouterr().err == ""


def test_a_run_cannot_end_before_where_it_is(run):
    folder, resolved = run
    with pytest.raises(ValueError, match="has already done 60 steps, more than the 59 .*60 steps or more"):
        lock_to_run(folder, changed(resolved, steps=59), pytest.fail)
    assert json_files.read_json(folder / files.CONFIG) == resolved


def test_a_setting_that_a_run_began_without_is_no_other_run(run):
    folder, resolved = run
    now = changed(resolved)
    now["data"]["max_unknown_share"] = 0.2
    lock_to_run(folder, now, pytest.fail)
    with pytest.raises(ValueError, match="train.seed: 0 in the run, 1 now"):
        lock_to_run(folder, changed(resolved, seed=1, steps=200), pytest.fail)
    assert json_files.read_json(folder / files.CONFIG) == resolved


@pytest.fixture
def begun(tmp_path):
    """The settings of the demo, and as the config.json of a run of it holds them."""
    config = settings.freeze(settings.load_config("demo"))
    return config, json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    ("key", "kept"),
    [("loss.region_weight", 1.0), ("optim.clip", 0.0), ("model.remat", False), ("loss.negatives_per_slide", None),
     ("train.select_margin", 0.0), ("train.select_tie", "latest"), ("data.row_step", 64), ("data.caption_share", 1.0),
     ("train.hang_seconds", 1800), ("data.max_unknown_share", 1.0)],
)  # fmt: skip
def test_a_run_of_an_earlier_version_goes_on_as_it_began(begun, tmp_path, capsys, key, kept):
    config, before = begun
    section, _, name = key.partition(".")
    now = getattr(getattr(config, section), name)
    del before[section][name]
    found = resume_as(config, before, tmp_path)
    assert getattr(getattr(found, section), name) == kept and getattr(getattr(config, section), name) == now
    other = "" if now == kept else f" (not {now!r})"
    said = capsys.readouterr().err
    assert f"{tmp_path}: a run of an earlier version" in said and said.endswith(f": {key}={kept!r}{other}\n")
    json_files.write_json(tmp_path / files.CONFIG, before)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    lock_to_run(tmp_path, json.loads(json.dumps(found.to_dict())), pytest.fail)


def test_what_may_change_is_as_asked_for_in_an_older_run_too(begun, tmp_path):
    config, before = begun
    del before["data"]["max_unknown_share"]
    config = config.with_changes({"data.max_unknown_share": 0.5})
    assert resume_as(config, before, tmp_path).data.max_unknown_share == 0.5


def test_a_run_of_a_later_version_is_refused_by_name(begun, tmp_path):
    config, before = begun
    before["train"]["pace"], before["written_by"] = 1, {"version": "9.0"}
    with pytest.raises(ValueError, match=r"config\.json: .*train\.pace.*version 9\.0 wrote it.*upgrade"):
        resume_as(config, before, tmp_path)


def test_a_run_of_another_family_is_another_run(begun, tmp_path):
    _, before = begun
    found = resume_as(settings.freeze(settings.load_config("pathflip2")), before, tmp_path)
    json_files.write_json(tmp_path / files.CONFIG, before)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match="model.num_queries: 4 in the run, None now"):
        lock_to_run(tmp_path, found.to_dict(), pytest.fail)


def test_differences_name_every_setting():
    before = {"train": {"steps": 4, "seed": 0}, "data": {"cut": "grid"}, "old": 1}
    now = {"train": {"steps": 5, "seed": 0}, "data": {"cut": "grid"}}
    found = differences(before, now)
    assert found == ["old: 1 in the run, None now", "train.steps: 4 in the run, 5 now"]
    assert differences(now, now) == []


def test_what_a_kill_before_the_first_checkpoint_left_binds_nobody(run):
    """A save under way, settings, and logs that name another place for checkpoints."""
    folder, resolved = run
    (folder / "checkpoints" / "60").rename(folder / "checkpoints" / "0.orbax-checkpoint-tmp-1")
    (folder / "metrics.jsonl").touch()
    json_files.write_json(folder / files.CONFIG, changed(resolved, checkpoints=str(folder / "elsewhere")))
    assert saved_config(folder) is None
    described = []
    lock_to_run(folder, changed(resolved, seed=1), described.append)
    assert described == [folder]
    (folder / "elsewhere" / "checkpoints" / "1").mkdir(parents=True)
    json_files.write_json(folder / "elsewhere" / files.CONFIG, resolved)
    with pytest.raises(ValueError, match="has the logs of a run with checkpoints in .*elsewhere"):
        lock_to_run(folder, resolved, pytest.fail)


RECIPE = {"encoder": "uni_v1", "weights": "34cd" * 16, "precision": "float32"}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (RECIPE, RECIPE | {"weights": "12ab" * 16}, r"data.recipe: they differ in weights \(12ab12ab12ab…, not 34cd"),
        (RECIPE, RECIPE | {"precision": "bfloat16"}, ""),
        (RECIPE, {"encoder": "uni_v1"}, ""),
        (RECIPE, None, ""),
        (None, RECIPE, ""),
        (
            {"mpp": "fine"},
            RECIPE,
            r"data.recipe in the run's config.json: mpp 'fine': expected a number.*restore a copy",
        ),
    ],
)
def test_a_run_goes_on_with_features_of_its_recipe(run, before, now, message):
    folder, resolved = run
    begun, current = copy.deepcopy(resolved), copy.deepcopy(resolved)
    for config, recipe in ((begun, before), (current, now)):
        config["data"] |= {"recipe": recipe} if recipe else {}
    json_files.write_json(folder / files.CONFIG, begun)
    if message:
        with pytest.raises(ValueError, match=message):
            lock_to_run(folder, current, pytest.fail)
    else:
        lock_to_run(folder, current, pytest.fail)
