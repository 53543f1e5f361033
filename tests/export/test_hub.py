"""Runs pushed to a stand-in of the Hugging Face hub and loaded from it, and every way in which neither can be done."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from hub_server import TOKEN, Repo
from huggingface_hub import constants

import pathflip_jax as pf
from pathflip_jax import cli
from pathflip_jax.data.storage import hub as storage
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in huggingface_hub's uploads
NAME = "lab/crc"
CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=1,
    max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tiny_cohort, tmp_path_factory):
    data = {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96}
    folder = tmp_path_factory.mktemp("hub") / "run"
    tokenizer = TextTokenizer(tiny_cohort.vocabulary)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    save_run(folder, PathFLIP(config, nnx.Rngs(0)), {"data": data}, tokenizer)
    return folder


def go(*command, code: int = 0) -> None:
    assert cli.main([str(part) for part in command]) == code


def refused(capsys, *command) -> str:
    """One line on stderr by which a command is refused."""
    capsys.readouterr()
    go(*command, code=cli.WRONG_INPUT)
    return capsys.readouterr().err.splitlines()[-1]


def push(run, hub, *more) -> str:
    """Push a run; returns its name at that commit."""
    go("push", run, NAME, *more)
    return f"hf://{NAME}@{hub.repos[NAME].branches['main']}"


def same(one, other) -> None:
    ours, theirs = flatten(one.model), flatten(other.model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]), err_msg=name)


def test_a_pushed_run_loads_back_equal(run_folder, hub, capsys, tmp_path):
    about = tmp_path / "about.md"
    about.write_text("Twelve patients of one hospital.")
    place = push(run_folder, hub, "--about", about)
    assert f"--checkpoint {place}" in capsys.readouterr().out
    repo = hub.repos[NAME]
    files = repo.commits[repo.branches["main"]]
    assert repo.private and b"Twelve patients" in files["README.md"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    loaded, run = pf.load(f"hf://{NAME}"), pf.load(run_folder)
    same(loaded, run)
    same(pf.load(place), run)


def test_commands_take_a_run_of_the_hub(run_folder, tiny_cohort, hub, tmp_path):
    place = push(run_folder, hub)
    for name, run in (("hub", place), ("local", run_folder)):
        go("embed", tiny_cohort.records, "--checkpoint", run, "--out", tmp_path / f"{name}.parquet")
    import pyarrow.parquet as pq

    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("hub", "local")]
    one, other = (np.stack(table["embedding"].to_numpy()) for table in tables)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_cache_serves_without_a_connection(run_folder, hub, monkeypatch, capsys):
    place = push(run_folder, hub)
    pf.load(f"hf://{NAME}")
    hub.downloads.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(pf.load(place), pf.load(f"hf://{NAME}"))
    assert hub.downloads == []
    said = refused(capsys, "export", "hf://lab/other", "--out", "x")
    assert "hf://lab/other: it is not in" in said and "HF_HUB_OFFLINE forbids downloads" in said


def test_an_interrupted_download_goes_on(run_folder, hub, monkeypatch, capsys):
    place = push(run_folder, hub)
    hub.broken = "model.safetensors"
    said = refused(capsys, "export", place, "--out", "x")
    assert place in said and "only a part of it is in" in said and "connect to the network and repeat" in said
    hub.broken = ""
    hub.downloads.clear()
    pf.load(place)
    assert "model.safetensors" in hub.downloads and "config.json" not in hub.downloads  # which is there


def test_a_half_download_without_a_connection_is_told(run_folder, hub, monkeypatch, capsys):
    place = push(run_folder, hub)
    storage.download(storage.read_name(place), ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(capsys, "export", place, "--out", "x")
    assert "only a part of it is in" in said and "HF_HUB_OFFLINE" in said


def test_a_push_replaces_the_whole_content_in_one_commit(run_folder, hub):
    push(run_folder, hub)
    repo = hub.repos[NAME]
    before = repo.branches["main"]
    repo.commit("main", repo.commits[before] | {"model-00001-of-00002.safetensors": b"of an earlier push"})
    count = len(repo.commits)
    push(run_folder, hub, "--message", "again")
    assert len(repo.commits) == count + 1
    assert repo.commits[repo.branches["main"]].keys() == repo.commits[before].keys()


def test_a_push_to_a_branch_leaves_the_others(run_folder, hub):
    push(run_folder, hub)
    main = hub.repos[NAME].branches["main"]
    go("push", run_folder, f"{NAME}@seed-1", "--dtype", "float16")
    branches = hub.repos[NAME].branches
    assert branches["main"] == main != branches["seed-1"]
    pf.load(f"hf://{NAME}@seed-1")


def test_a_failed_push_changes_nothing(run_folder, hub, capsys):
    push(run_folder, hub)
    before = hub.repos[NAME].branches["main"]
    hub.broken = "/commit/"
    said = refused(capsys, "push", run_folder, NAME, "--dtype", "float16")
    assert "the hub is down" in said and "unchanged" in said
    assert hub.repos[NAME].branches["main"] == before


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("hf://lab/crc@v9", "no revision 'v9'; it has main"),
        ("hf://lab/none", "no such repository, or a private one"),
        ("hf://lab", "expected hf://OWNER/NAME"),
        ("hf://lab/crc@", "no revision behind @"),
        ("hf://lab/bert", "a config.json of another model in it, expected a run that `pathflip push` wrote"),
        ("hf://lab/empty", "no config.json in it"),
        ("hf://lab/gated", "access on request"),
    ],
)
def test_what_cannot_be_loaded_is_told_before_its_weights_are_fetched(hub, capsys, place, reason):
    bert = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"gigabytes"}
    for name, files, more in (("crc", {}, {}), ("bert", bert, {}), ("empty", {}, {}), ("gated", bert, {"gated": True})):
        hub.repos[f"lab/{name}"] = Repo(**more)
        hub.repos[f"lab/{name}"].commit("main", files)
    said = refused(capsys, "export", place, "--out", "x")
    assert place in said and reason in said
    assert "model.safetensors" not in hub.downloads


@pytest.mark.parametrize(
    ("token", "repository", "more", "reason"),
    [
        ("", "lab/new", [], "no token, or none that is valid; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_of_a_stranger", "lab/new", [], "this account may not write there"),
        (TOKEN, "lab/theirs", ["--public"], "holds 2 files of something else (config.json, model.safetensors)"),
        (TOKEN, "lab/theirs", [], "exists and is public; pass --public"),
        (TOKEN, "lab/secret", ["--public"], "exists and is private; leave --public out"),
        (TOKEN, "new", [], "expected hf://OWNER/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_told_and_nothing_is_changed(
    run_folder, hub, capsys, monkeypatch, token, repository, more, reason
):
    monkeypatch.setenv("HF_TOKEN", token)
    for name, private in (("theirs", False), ("secret", True)):
        hub.repos[f"lab/{name}"] = Repo(private=private)
        hub.repos[f"lab/{name}"].commit("main", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    before = json.dumps({name: repo.branches for name, repo in hub.repos.items()})
    assert reason in refused(capsys, "push", run_folder, repository, *more)
    assert json.dumps({name: repo.branches for name, repo in hub.repos.items()}) == before
