"""Round trips of every export of an alignment run: parameters, model, settings, ids of texts; both families."""

import dataclasses
import json
import math
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathflip_jax import cli
from pathflip_jax.convert.exported import SECTION, describe_export, read_exported, without_paths
from pathflip_jax.convert.released import load_released
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.export import pytorch
from pathflip_jax.export.huggingface import huggingface_config, write_huggingface
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.parameters import abstract_params, flatten, unflatten
from pathflip_jax.runs.folder import save_run

BASE = Path(__file__).parents[1] / "golden" / "base"
TEXTS = ["Glands infiltrate the stroma.", "Nekrose: 1.8 cm, no invasion", "CAFÉ"]
WAYS = {"pytorch": pytorch.write_export, "huggingface": write_huggingface}
DATA = {
    "encoder": "conch_v15", "cut": "grid", "edge_um": 1000.0, "edge_px": None, "caption_length": 48,
    "subcaption_length": 24, "records": "/somewhere/else/records", "texts": "/lab/a.jsonl,/lab/b.csv*2",
}  # fmt: skip


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer(BASE / "bert")


def make(config: ModelConfig):
    """A model of random parameters."""
    random = np.random.default_rng(0)
    shapes = abstract_params(config)
    return unflatten(config, {n: random.normal(0, 0.2, x.shape).astype(np.float32) for n, x in shapes.items()})


def sizes(draw, heads: int, most: int = 4) -> tuple[int, int]:
    """A width and a number of heads that divides it, neither a power of two as a rule."""
    return heads * draw(st.integers(1, most)), heads


@st.composite
def pathflips(draw) -> PathFLIPConfig:
    hidden, heads = sizes(draw, draw(st.sampled_from([1, 3, 5])))
    region, text = draw(st.sampled_from([(1, 3), (3, 1), (6, 2), (7, 3)]))
    mlp = draw(st.booleans())
    return PathFLIPConfig(
        feature_dim=draw(st.integers(1, 9)), embed_dim=math.lcm(region, text) * draw(st.integers(1, 2)),
        hidden=hidden, heads=heads, layers=draw(st.integers(1, 5)), intermediate=draw(st.integers(1, 9)),
        vocab_size=301, max_positions=50, dropout=draw(st.sampled_from([0.0, 0.25])),
        init=draw(st.sampled_from(["bert", "fan_in"])), num_queries=draw(st.integers(1, 5)),
        cross_attention_freq=draw(st.integers(1, 3)), patch_projection="mlp" if mlp else "linear",
        patch_hidden=draw(st.sampled_from([None, 5])) if mlp else None, region_layers=draw(st.integers(0, 3)),
        region_heads=region, text_region_heads=text, logit_scale_init=draw(st.sampled_from([10.0, 2.5])),
        logit_bias_init=draw(st.sampled_from([None, -10.0])),
    )  # fmt: skip


@st.composite
def pathflip2s(draw) -> PathFLIP2Config:
    hidden, heads = sizes(draw, draw(st.sampled_from([1, 3, 5])))
    token, text = draw(st.sampled_from([(1, 3), (3, 1), (6, 2)]))
    return PathFLIP2Config(
        feature_dim=draw(st.integers(1, 9)), embed_dim=math.lcm(token, text) * draw(st.integers(1, 2)),
        hidden=hidden, heads=heads, layers=draw(st.integers(1, 3)), intermediate=draw(st.integers(1, 9)),
        vocab_size=300, max_positions=50, tokens=draw(st.integers(0, 5)), token_layers=draw(st.integers(1, 3)),
        token_heads=token, token_dropout=0.125, text_region_heads=text, top_k=draw(st.integers(1, 9)),
        text_pooling=draw(st.sampled_from(["mean", "cls", "mean_padded"])), topk_temperature=0.75,
        region_head=draw(st.sampled_from(["soft_topk", "attention"])), scale_init=7.0, bias_init=-3.0,
    )  # fmt: skip


@st.composite
def data(draw) -> dict:
    cut = draw(st.sampled_from(["grid", "scan"]))
    return DATA | {
        "cut": cut, "encoder": draw(st.sampled_from(["", "MahmoodLab/conch", "uni_v2"])),
        "edge_um": draw(st.sampled_from([1000.0, 2048.0])), "edge_px": draw(st.sampled_from([None, 777])),
        "caption_length": draw(st.integers(5, 60)),
    }  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(pathflips(), pathflip2s()), data(), st.booleans())
def test_what_an_export_says_of_itself_comes_back(tmp_path_factory, config, data, way):
    """Any sizes, heads and settings: the config.json of either form holds them all."""
    path = tmp_path_factory.mktemp("said") / "config.json"
    given = {"data": data, "train": {"steps": 3, "checkpoints": "gs://bucket/run"}, "loss": {"temperature": 0.1}}
    whole = config.to_dict() | describe_export(config, given)
    path.write_text(json.dumps(huggingface_config(config, given) if way else whole))
    found = read_exported(path.with_name("model.safetensors"))
    assert found.config == config and found.settings == without_paths(given) and not found.assumed
    assert "/lab" not in path.read_text() and "bucket" not in path.read_text()


ODD = PathFLIPConfig(
    feature_dim=7, embed_dim=12, hidden=15, heads=5, layers=3, intermediate=9, vocab_size=301, max_positions=50,
    num_queries=3, cross_attention_freq=2, region_layers=1, region_heads=3, text_region_heads=2, dropout=0.0,
)  # fmt: skip
ODD2 = PathFLIP2Config(
    feature_dim=7, embed_dim=12, hidden=15, heads=5, layers=2, intermediate=9, vocab_size=300, max_positions=50,
    tokens=3, token_heads=3, text_region_heads=2, region_head="attention", text_lora_rank=2, text_lora_alpha=5.0,
)  # fmt: skip


MLP = {"patch_projection": "mlp", "patch_hidden": 5, "logit_bias_init": -10.0, "cross_attention_freq": 3}
CASES = {f"{config.family}-{way}": (config, way) for config in (ODD, ODD2) for way in WAYS}


@pytest.mark.parametrize("case", CASES)
def test_parameters_model_settings_and_ids_come_back(words, tmp_path, case):
    config, way = CASES[case]
    config = dataclasses.replace(config, **{"text_lora_rank": 0} if config is ODD2 else MLP)
    given = {"data": DATA, "train": {"steps": 3, "checkpoints": "gs://bucket"}}
    model = make(config)
    WAYS[way](tmp_path, model, given, words)
    found = load_released(tmp_path)
    assert found.model.config == config and found.settings == without_paths(given)
    assert not found.assumed and not found.notes
    before, after = flatten(model), flatten(found.model)
    assert before.keys() == after.keys() and all(np.array_equal(after[name], before[name]) for name in before)
    for one, other in zip(words.encode(TEXTS, 20), found.tokenizer.encode(TEXTS, 20), strict=True):
        assert one.tolist() == other.tolist()
    ours, theirs = Predictor(model, given, words), Predictor(*found[:3])
    for name in ("encoder", "cut", "edge_um", "edge_px", "caption_length", "patchwise", "assumed"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_halves_the_weights_and_rounds_them(words, tmp_path, way):
    model, (small, large) = make(ODD), (tmp_path / "small", tmp_path / "large")
    for folder, dtype in ((small, "float16"), (large, "float32")):
        folder.mkdir()
        WAYS[way](folder, model, {"data": DATA}, words, dtype=dtype)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, large)]
    assert sizes[0] < 0.6 * sizes[1]
    after = flatten(load_released(small).model)
    for name, before in flatten(model).items():
        assert np.array_equal(after[name], np.asarray(before).astype(np.float16).astype(np.float32)), name
    beyond = unflatten(ODD, flatten(model) | {"logit_scale": np.float32(1e5)})
    with pytest.raises(ValueError, match="logit_scale: has weights beyond the range of float16 .65504.; export as fl"):
        WAYS[way](small, beyond, {"data": DATA}, words, dtype="float16")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pathflip-huggingface", "pathflip2-pytorch", "pathflip2-huggingface"])
def test_a_run_comes_back_by_command_with_its_features(words, tmp_path, capsys, case):
    """run -> export -> convert -> run; the LoRA of a PathFLIP2 is merged on the way, and that is said."""
    config, way = CASES[case]
    save_run(tmp_path / "run", make(config), {"data": DATA}, words)
    assert cli.main(["export", str(tmp_path / "run"), "--to", way, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["convert", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out
    assert "assumed" not in said and ("note: the text encoder's LoRA (rank 2, alpha 5)" in said) == (config is ODD2)
    a, b, c = load(tmp_path / "run"), load(tmp_path / "back"), load(tmp_path / "out")
    assert b.config["data"] == c.config["data"] == without_paths({"data": DATA})["data"]
    random = np.random.default_rng(1)
    patches, mask = random.normal(size=(2, 3, 4, 7)).astype(np.float32), np.ones((2, 3, 4), bool)
    one, two = (x.model.encode_slides(patches, mask) for x in (a, b))
    np.testing.assert_allclose(two.slide, one.slide, rtol=0, atol=1e-6)
    np.testing.assert_allclose(two.regions, one.regions, rtol=0, atol=1e-6)
    np.testing.assert_allclose(b.encode_text(TEXTS), a.encode_text(TEXTS), rtol=0, atol=1e-6)
    assert all(np.array_equal(x, flatten(c.model)[name]) for name, x in flatten(b.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("config", [ODD, dataclasses.replace(ODD2, text_lora_rank=0, region_head="soft_topk", top_k=3)])
def test_what_transformers_saves_again_comes_back_too(words, tmp_path, config):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from pathflip_jax.convert import torch_model, torch_pathflip2  # noqa: F401 - makes both known to AutoModel

    (tmp_path / "out").mkdir()
    write_huggingface(tmp_path / "out", model := make(config), {"data": DATA}, words)
    transformers.AutoModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    found = load_released(tmp_path / "again")
    assert found.model.config == config and found.settings["data"] == without_paths({"data": DATA})["data"]
    after = flatten(found.model)
    assert all(np.array_equal(x, after[name]) for name, x in flatten(model).items())


@pytest.fixture(scope="module")
def odd():
    return make(ODD)


@pytest.fixture(scope="module")
def kept(words, odd, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    pytorch.write_export(folder, odd, {"data": DATA}, words)
    return folder


@pytest.fixture
def exported(kept, tmp_path) -> Path:
    """An export of `odd` that a test may change."""
    return Path(shutil.copytree(kept, tmp_path / "out"))


def change(folder: Path, edit) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_an_option_wins_over_the_config_with_a_word_and_shapes_over_both(exported, tmp_path):
    found = load_released(exported, heads=3)
    assert found.model.config.heads == 3
    assert found.notes == (f"heads 3, as requested; {exported / 'config.json'} says 5",)
    with pytest.raises(ValueError, match="hidden=15 and heads=4"):
        load_released(exported, heads=4)
    assert "as requested, not the export's own" in load_released(exported, BASE / "bert").notes[0]
    with pytest.raises(ValueError, match=r"an export, described completely by .*config\.json; leave out --hparams"):
        load_released(exported, arguments={"lora_alpha": 3})


def test_an_edited_or_mixed_export_is_refused(exported):
    change(exported, lambda values: values.update(region_heads=4))
    with pytest.raises(ValueError, match=r"config\.json: contradicts .*region_heads is 4 at the top level and 3"):
        load_released(exported)
    change(exported, lambda values: [x.update(region_heads=3, layers=4) for x in (values, values[SECTION]["model"])])
    with pytest.raises(ValueError, match=r"(?s)as .*config\.json describes it: .*layer\.3\.\S+: missing"):
        load_released(exported)


def test_an_older_export_keeps_its_model_and_says_what_it_assumes(exported):
    change(exported, lambda values: values.pop(SECTION))
    found = load_released(exported)
    assert found.model.config == ODD and Predictor(*found[:3]).assumed == found.assumed
    for part in ("older version", "regions are cut by grid, 2048 um", "at most 384 tokens", "encoder is not known"):
        assert part in "\n".join(found.assumed)


def test_a_foreign_checkpoint_says_what_was_assumed(tmp_path, caplog):
    weights = BASE / "state_dict.safetensors"
    assert read_exported(weights) is None
    found = load(weights, bert=BASE / "bert")
    said = "\n".join(found.assumed)
    assert "heads 4 (from the config.json of" in said and "region_heads 8 and text_region_heads 8" in said
    assert "regions cut by scan" in said and "encoder is not known" in said
    assert "assumed, because no file states it: heads 4" in caplog.text
    assert found.config["assumed"] == list(found.assumed)
    with pytest.raises(ValueError, match="contain no tokenizer, and no config.json of an export .*--bert"):
        load(weights)


def test_an_older_run_says_what_it_lacks(words, odd):
    old = Predictor(odd, {"data": {"encoder": "uni"}}, words)
    assert old.assumed == (
        "regions are cut by grid",
        "regions are 2048 um wide",
        "captions of at most 384 tokens",
    )
    assert Predictor(odd, {"data": DATA}, words).assumed == ()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_weights_get_the_permissions_of_any_new_file(tmp_path, mask):
    pytest.importorskip("torch")
    before = os.umask(mask)
    try:
        for name in ("model.safetensors", "model.pt"):
            pytorch.write_checkpoint(tmp_path / name, {"x": np.ones(2, np.float32)})
        with atomic_file(tmp_path / "whole") as file:
            file.write(b"x")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}
