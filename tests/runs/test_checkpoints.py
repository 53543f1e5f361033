"""Checkpoints: written atomically, checked when read; the newest valid one is taken, and damaged ones are reported."""

import gc
import json
import re
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.convert.versions import signed
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs import checkpoints, files
from pathflip_jax.runs.checkpoints import (
    Checkpoints,
    NewerOrbaxError,
    missing_handlers,
    saved_steps,
    stored_arrays,
)
from pathflip_jax.runs.folder import load_run, save_run

# Orbax leaves coroutines and threads behind when a file cannot be read or written.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*coroutine:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    gc.collect()


CONFIG = PathFLIPConfig(
    feature_dim=8, embed_dim=8, hidden=8, layers=1, heads=2, intermediate=16, num_queries=2, max_positions=16,
    region_layers=1, region_heads=2, text_region_heads=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "holds a list"), ("{", "not JSON"), ("[" * 100_000, "nested too deeply"), ('{"hiden": 1}', "hiden"),
     ('{"layers": "1"}', "layers='1'"), ('{"hidden": null}', "hidden=None")],
)  # fmt: skip
def test_the_model_of_a_run_is_refused_by_file(tmp_path, content, message):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.json: .*{message}"):
        files.read_model_config(tmp_path / "model.json")


def state(step):
    kernel = jax.random.normal(jax.random.key(step), (64, 50))
    return {"a/kernel": kernel, "a/bias": jnp.full(3, step, jnp.float32)}, {"count": jnp.int32(step), "mu": kernel * 2}


def wanted():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))


def save(folder, steps=(1, 2, 3), best=()):
    with Checkpoints(folder, 3, {"git": "abc"}) as checkpoints:
        for step in steps:
            checkpoints.save(step, *state(step), {"best": None})
        for step in best:
            checkpoints.save_best(step, state(step)[0], {})


def restore(folder):
    with Checkpoints(folder, 3, {}) as checkpoints:
        found = checkpoints.restore(*wanted())
    if found:
        step, params, opt_state, facts = found
        jax.tree.map(np.testing.assert_array_equal, (params, opt_state), state(step))
        assert facts == {"step": step, "git": "abc", "best": None}
    return found and found[0]


def damage(folder, how):
    """Damage the largest file: the numbers themselves."""
    path = max((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
    path.write_bytes(data if how == "flip" else data[: len(data) // 2])


def test_newest_is_restored_and_old_ones_go(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, steps=range(1, 6))
    assert restore(tmp_path) == 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "5"]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    with Checkpoints(tmp_path, 2, {"git": "abc"}, keep_every=3) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, *state(step), {"best": None})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "7", "8"]
    assert restore(tmp_path) == 8


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, how):
    save(tmp_path)
    damage(tmp_path / "checkpoints" / "3", how)
    assert restore(tmp_path) == 2
    assert f"going back to step 2: {tmp_path / 'checkpoints' / '3'}" in capsys.readouterr().out
    assert (tmp_path / "damaged-3").is_dir()
    save(tmp_path, steps=[3])  # the place is free again
    assert restore(tmp_path) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": 3}', '{"init_timestamp_nsecs": "x"}'])
def test_an_older_checkpoint_with_malformed_metadata_hinders_nobody_until_it_is_needed(tmp_path, capsys, content):
    save(tmp_path)
    damage(tmp_path / "checkpoints" / "3", "cut")
    (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text(content)
    assert restore(tmp_path) == 2
    save(tmp_path, steps=[3, 4])  # and it goes as others do
    assert saved_steps(tmp_path / "checkpoints") == [2, 3, 4]


def test_no_sound_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    save(tmp_path, steps=[1, 2])
    for step in "12":
        damage(tmp_path / "checkpoints" / step, "cut")
    with pytest.raises(ValueError, match="(?s)no checkpoint of this run can be read; start a new run.*/2: .*/1: "):
        restore(tmp_path)


def save_beside(folder, steps, local_steps, local="local"):
    with Checkpoints(folder / "run", 3, {"git": "abc"}, local=str(folder / local)) as checkpoints:
        for step in steps:
            checkpoints.save(step, *state(step), {"best": None})
        for step in local_steps:
            checkpoints.save_locally(step, *state(step), {"best": None})


def restore_beside(folder, before=None):
    with Checkpoints(folder / "run", 3, {}, local=str(folder / "local")) as checkpoints:
        found = checkpoints.restore(*wanted(), before=before)
    if found:
        step, params, opt_state, facts = found
        jax.tree.map(np.testing.assert_array_equal, (params, opt_state), state(step))
        assert facts == {"step": step, "git": "abc", "best": None}
    return found and found[0]


def local_steps(folder):
    return sorted(int(path.name) for path in (folder / "local").glob("*/*/*"))


def test_a_newer_local_checkpoint_is_restored_and_the_two_newest_are_kept(tmp_path):
    save_beside(tmp_path, [1, 2], [3, 4, 5])
    assert local_steps(tmp_path) == [4, 5]
    assert restore_beside(tmp_path) == 5
    assert restore(tmp_path / "run") == 2  # whoever names no local folder goes on without


def test_without_its_local_checkpoints_a_run_goes_on_from_its_own(tmp_path):
    save_beside(tmp_path, [1, 2], [3])
    shutil.rmtree(tmp_path / "local")
    assert restore_beside(tmp_path) == 2


def test_a_damaged_local_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    save_beside(tmp_path, [1], [2, 3])
    (newest,) = (tmp_path / "local").glob("*/*/3")
    damage(newest, "cut")
    assert restore_beside(tmp_path) == 2
    assert f"going back to step 2: {newest}: " in capsys.readouterr().out and local_steps(tmp_path) == [2]


def test_a_local_checkpoint_outlives_a_damaged_one_of_the_run(tmp_path):
    save_beside(tmp_path, [1], [2])
    with Checkpoints(tmp_path / "run", 3, {"git": "abc"}, local=str(tmp_path / "local")) as checkpoints:
        assert checkpoints.restore(*wanted())[0] == 2
        checkpoints.save(3, *state(3), {"best": None})
    damage(tmp_path / "run/checkpoints/3", "cut")
    assert restore_beside(tmp_path) == 2 and (tmp_path / "run/damaged-3").is_dir()


def test_local_checkpoints_of_another_run_or_past_the_end_are_not_taken(tmp_path):
    save_beside(tmp_path, [1], [2, 3])
    assert restore_beside(tmp_path, before=3) == 2
    save_beside(tmp_path, [], [9])  # before the first of the run itself there is nothing that they go on from
    assert local_steps(tmp_path) == [2]
    shutil.rmtree(tmp_path / "run")
    assert restore_beside(tmp_path) is None and local_steps(tmp_path) == []
    save_beside(tmp_path, [1], [2, 3])
    shutil.rmtree(tmp_path / "run")
    save(tmp_path / "run", steps=[1])
    assert restore_beside(tmp_path) == 1 and local_steps(tmp_path) == []


def test_a_bucket_is_no_place_for_local_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="train.local_checkpoints=gs://b/x: expected a folder .*use train.checkpoints"):
        Checkpoints(tmp_path, 3, {}, local="gs://b/x")


def test_unfinished_saves_are_not_seen(tmp_path):
    save(tmp_path)
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-0")
    assert restore(tmp_path) == 2
    save(tmp_path, steps=[3])
    assert restore(tmp_path) == 3


def test_best_is_one_and_never_goes_back(tmp_path):
    save(tmp_path, best=[1, 3])
    save(tmp_path, steps=[], best=[2, 3])
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["3"]


def test_no_option_that_orbax_calls_deprecated_is_set(tmp_path, monkeypatch):
    given, options = [], checkpoints.ocp.CheckpointManagerOptions
    monkeypatch.setattr(checkpoints.ocp, "CheckpointManagerOptions", lambda **o: given.append(o) or options(**o))
    with Checkpoints(tmp_path / "run", 2, {}, keep_every=3, local=str(tmp_path)) as made:
        made.save(1, *state(1), {})
        made.save_locally(2, *state(2), {})
    old = {"max_to_keep", "keep_time_interval", "keep_period", "best_fn", "should_save_fn", "save_interval_steps"}
    assert len(given) == 3 and not any(old & each.keys() for each in given)


def test_a_full_disk_is_told_and_leaves_the_rest_whole(tmp_path):
    save(tmp_path, steps=[1])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, 3, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(OSError, match=r"the checkpoint was not written .*free disk space"):
            checkpoints.save(2, *state(2), {"best": None})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert restore(tmp_path) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_cohort):
    tokenizer = TextTokenizer(tiny_cohort.vocabulary)
    config = PathFLIPConfig.from_dict(CONFIG.to_dict() | {"vocab_size": tokenizer.vocab_size})
    model = PathFLIP(config, nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("runs") / "made"
    save_run(folder, model, {"data": {"cut": "scan"}}, tokenizer)
    return folder, model


@pytest.mark.parametrize("which", ["best", "latest", 0])
def test_a_saved_run_loads(run, which):
    folder, model = run
    loaded, config, tokenizer = load_run(folder, which)
    assert config == signed({"data": {"cut": "scan"}}) and loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, flatten(loaded), flatten(model))
    assert tokenizer.vocab_size == model.config.vocab_size


def test_wrong_runs_are_refused_with_the_reason(run, tmp_path):
    folder, model = run
    with pytest.raises(FileNotFoundError, match=r"no model.json in it, so it is not a run folder"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 7; there are steps \[0\]"):
        load_run(folder, 7)
    with pytest.raises(FileExistsError, match="already contains a run"):
        save_run(folder, model, {}, None)
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace('"hidden": 8', '"hidden": 12'))
    with pytest.raises(ValueError, match=r"best/0: damaged \(its params do not match this model: .*in all\)"):
        load_run(folder)
    (folder / "model.json").write_text(text)


def of_newer_orbax(step, unreadable=True):
    """A checkpoint as if a later Orbax had written it, in files that this one cannot read or can."""
    about = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    about["item_handlers"]["params"] = "orbax.checkpoint.v9.Handler"
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
    if unreadable:
        (step / "params" / "_METADATA").unlink()
        (step / "params" / "manifest.ocdbt").rename(step / "params" / "manifest.v9")


def test_a_checkpoint_of_a_newer_orbax_is_no_damage_and_stays(tmp_path):
    save(tmp_path)
    of_newer_orbax(tmp_path / "checkpoints" / "3")
    what = r"3: a checkpoint of a newer Orbax; orbax-checkpoint [\d.]+ has no orbax\.checkpoint\.v9\.Handler and "
    with pytest.raises(NewerOrbaxError, match=what + r"cannot read it .*: pip install -U orbax-checkpoint"):
        restore(tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [1, 2, 3]
    assert not list(tmp_path.glob("damaged-*"))


def test_a_run_of_a_newer_orbax_is_not_called_damaged(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    of_newer_orbax(folder / "best" / "0")
    with pytest.raises(NewerOrbaxError, match="best/0: a checkpoint of a newer Orbax; .*pip install -U"):
        load_run(folder)


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ([("cut short", False), ("a newer Orbax", True)], NewerOrbaxError, r"a newer Orbax \(process 1\)"),
        ([("", False), ("cut short", False)], checkpoints._Damaged, r"cut short \(process 1\)"),
    ],
)
def test_what_one_process_is_too_old_for_is_damaged_for_none(tmp_path, monkeypatch, told, error, message):
    save(tmp_path, steps=[1])
    monkeypatch.setattr(checkpoints.distributed, "gather", lambda mine: json.loads(json.dumps(told)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(error, match=message):
        checkpoints.restore_arrays(tmp_path / "checkpoints" / "1", {"params": wanted()[0]})


def test_a_class_that_orbax_has_moved_does_not_hinder_reading(tmp_path):
    save(tmp_path)
    of_newer_orbax(tmp_path / "checkpoints" / "3", unreadable=False)
    assert restore(tmp_path) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"item_handlers": "x"}', '{"item_handlers": {"params": 3}}'])
def test_what_a_damaged_checkpoint_says_of_its_writer_is_not_believed(tmp_path, content):
    save(tmp_path)
    of_newer_orbax(tmp_path / "checkpoints" / "3")
    (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text(content)
    assert restore(tmp_path) == 2


def test_only_classes_of_orbax_are_looked_for(tmp_path, monkeypatch):
    """A file that names a module does not get it imported."""
    (tmp_path / "told.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    content = {"item_handlers": {"params": "told.Handler", "about": "orbax.checkpoint.args.JsonSave"}}
    (tmp_path / "_CHECKPOINT_METADATA").write_text(json.dumps(content))
    assert missing_handlers(tmp_path) == ["told.Handler"]


def test_stored_arrays_are_those_that_were_saved(tmp_path):
    save(tmp_path, best=[3])
    params, opt_state = state(3)
    expected = {"params": params, "opt_state": opt_state}
    jax.tree.map(np.testing.assert_array_equal, stored_arrays(tmp_path / "checkpoints" / "3"), expected)
    jax.tree.map(np.testing.assert_array_equal, stored_arrays(tmp_path / "best" / "3"), {"params": params})


def test_one_file_imports_orbax():
    """Else another interface of Orbax would be another change of many files."""
    root = Path(__file__).parents[2]
    found = [
        path.relative_to(root).as_posix()
        for folder in ("pathflip_jax", "data_prep", "benchmarks", "tests", "configs")
        for path in (root / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) orbax\b", path.read_text(), re.MULTILINE)
    ]
    assert found == ["pathflip_jax/runs/checkpoints.py"]
