"""Folders, shards and arguments of checkpoints; nothing in a file is executed, incomplete sets are named."""

import argparse
import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from pathflip_jax.convert.checkpoint_files import open_checkpoint, read_hparams, read_tensors

TENSORS = {"model.a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "model.b": np.ones(2, np.float32)}
SHORT = {"a.weight", "b"}


def shards(folder):
    folder.mkdir()
    parts = {"model-00001-of-00002.safetensors": ["model.a.weight"], "model-00002-of-00002.safetensors": ["model.b"]}
    for file, names in parts.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_a_folder_of_shards_is_one_checkpoint(tmp_path):
    found = read_tensors(shards(tmp_path / "sharded"))
    assert found.keys() == TENSORS.keys()
    assert all(np.array_equal(found[name], x) for name, x in TENSORS.items())
    assert open_checkpoint(tmp_path / "sharded").tensors.keys() == SHORT


def test_half_a_set_is_named(tmp_path):
    folder = shards(tmp_path / "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards are missing \(model-00002-of-00002"):
        read_tensors(folder)
    save_file({"other": np.ones(1, np.float32)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"lack 1 tensors of the index \(model\.b\)"):
        read_tensors(folder)
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a valid index of shards"):
        read_tensors(folder)


def test_an_index_names_no_file_outside_its_folder(tmp_path):
    folder = shards(tmp_path / "sharded")
    save_file({"model.b": TENSORS["model.b"]}, tmp_path / "outside.safetensors")
    places = {"model.a.weight": "model-00001-of-00002.safetensors", "model.b": "../outside.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileNotFoundError, match=r"outside\.safetensors"):
        read_tensors(folder)


def test_a_folder_with_one_file_is_that_file(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert read_tensors(tmp_path).keys() == TENSORS.keys()
    save_file(TENSORS, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"2 weight files \(more\.safetensors, weights\.safetensors\)"):
        read_tensors(tmp_path)


def test_deepspeeds_own_parts_are_to_be_merged_first(tmp_path):
    (tmp_path / "zero_to_fp32.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"python zero_to_fp32\.py \. pytorch_model\.bin"):
        read_tensors(tmp_path)


def test_arguments_come_with_the_checkpoint_or_from_beside_it(tmp_path):
    torch = pytest.importorskip("torch")
    version = tmp_path / "version_0"
    (version / "checkpoints").mkdir(parents=True)
    path = version / "checkpoints" / "last.ckpt"
    state = {name: torch.from_numpy(x) for name, x in TENSORS.items()}
    torch.save({"state_dict": state}, path)
    assert open_checkpoint(path).arguments == {}
    (version / "hparams.yaml").write_text("embed_dim: 512\ntext_pooling_type: mean\n")
    found = open_checkpoint(path)
    assert found.tensors.keys() == SHORT and found.arguments == {"embed_dim": 512, "text_pooling_type": "mean"}
    for stored in (argparse.Namespace(embed_dim=256), {"embed_dim": 256}, {"args": argparse.Namespace(embed_dim=256)}):
        torch.save({"state_dict": state, "hyper_parameters": stored}, path)
        assert open_checkpoint(path).arguments == {"embed_dim": 256}, stored


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_namespace_in_yaml_is_a_mapping(tmp_path, wrapped):
    """As Lightning writes one: PyYAML's own representation is the oracle."""
    given = argparse.Namespace(embed_dim=512, lora_target_modules=["query", "key"], use_soft_topk=True)
    (tmp_path / "hparams.yaml").write_text(yaml.dump({"args": given} if wrapped else given))
    assert "!!python/object:argparse.Namespace" in (tmp_path / "hparams.yaml").read_text()
    assert read_hparams(tmp_path / "hparams.yaml") == vars(given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['touch pwned']", "os.system"),
        ("a: !!python/object/new:subprocess.Popen [['touch', 'pwned']]", "Popen"),
        ("a: !!python/name:os.system", "os.system"),
        ("- 1\n- 2\n", "holds a list"),
        ("a: [1, 2", "not plain YAML"),
    ],
)
def test_arguments_with_anything_else_are_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hparams.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_hparams(tmp_path / "hparams.yaml")
    assert "hparams.yaml" in str(error.value) and not (tmp_path / "pwned").exists()
