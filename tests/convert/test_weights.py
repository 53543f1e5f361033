"""Checkpoints of the released model: read, checked, converted both ways, exported."""

import argparse
import ast
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pathflip_jax.convert import checkpoint_files, pytorch
from pathflip_jax.convert.exported import read_exported
from pathflip_jax.convert.families import names
from pathflip_jax.convert.names import is_unused
from pathflip_jax.export import from_released
from pathflip_jax.export import pytorch as export_pytorch
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import abstract_params, flatten, unflatten
from pathflip_jax.runs.folder import load_run

BASE = Path(__file__).parents[1] / "golden" / "base"
WEIGHTS = BASE / "state_dict.safetensors"
RELEASED = load_file(WEIGHTS)
CONFIG = pytorch.infer_config(RELEASED, heads=4)


@pytest.fixture
def torch():
    """PyTorch, for what its own formats need."""
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def save_torch(torch, path: Path, content) -> Path:
    """Save with torch, arrays as tensors."""
    torch.save(content, path)
    return path


def tensors(torch, state=RELEASED, prefix="") -> dict:
    """A state_dict of torch tensors under a prefix."""
    return {prefix + name: torch.from_numpy(np.array(x)) for name, x in state.items()}


def random_parameters(config: PathFLIPConfig) -> dict[str, np.ndarray]:
    """Random parameters by our names."""
    random = np.random.default_rng(0)
    return {name: random.normal(size=x.shape).astype(np.float32) for name, x in abstract_params(config).items()}


def test_released_model_is_accounted_for_entirely():
    """Every released entry is a parameter here or known as unused, and every parameter has a released entry."""
    table = {name.torch for name in names(CONFIG)}
    unused = {name for name in RELEASED if is_unused(name)}
    assert table | unused == set(RELEASED) and not table & unused
    assert {name.path for name in names(CONFIG)} == set(abstract_params(CONFIG))
    assert len({name.path for name in names(CONFIG)}) == len(names(CONFIG))


def test_config_is_inferred():
    meta = json.loads((BASE / "meta.json").read_text())["config"]
    assert (CONFIG.hidden, CONFIG.layers, CONFIG.heads) == (meta["bert_hidden"], meta["layers"], meta["heads"])
    assert (CONFIG.embed_dim, CONFIG.feature_dim) == (meta["embed_dim"], meta["patch_dim"])
    assert (CONFIG.num_queries, CONFIG.vocab_size, CONFIG.max_positions) == (meta["num_query_tokens"], 301, 512)
    assert CONFIG.cross_attention_freq == meta["cross_attention_freq"]
    assert pytorch.infer_config(RELEASED).heads == 1  # 64 wide: what is assumed when nobody says


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"patch_projection": "mlp", "layers": 5, "cross_attention_freq": 3, "region_layers": 1},
        {"patch_projection": "mlp", "patch_hidden": 40, "num_queries": 1},
        {"logit_bias_init": -10.0, "layers": 2, "cross_attention_freq": 2, "hidden": 24, "heads": 3},
    ],
)
def test_round_trip_is_exact(change):
    """JAX -> PyTorch -> JAX to the bit, the config included."""
    config = PathFLIPConfig.from_dict(CONFIG.to_dict() | change)
    flat = random_parameters(config)
    state = pytorch.to_torch(flat, config)
    back = pytorch.to_jax(state, config)
    assert set(back) == set(flat)
    assert all(np.array_equal(back[name], flat[name]) and back[name].dtype == np.float32 for name in flat)
    inferred = pytorch.infer_config(state, heads=config.heads).to_dict()
    free = {"logit_bias_init"}  # its value there is the trained one
    assert {k: v for k, v in inferred.items() if k not in free} == {
        k: v for k, v in config.to_dict().items() if k not in free
    }
    assert (inferred["logit_bias_init"] is None) == (config.logit_bias_init is None)


def test_released_round_trip_and_filled_head():
    """PyTorch -> JAX -> PyTorch gives the released entries: names, shapes, types, all used numbers."""
    back = pytorch.to_torch(pytorch.to_jax(RELEASED, CONFIG), CONFIG)
    assert {k: (x.shape, x.dtype) for k, x in back.items()} == {k: (x.shape, x.dtype) for k, x in RELEASED.items()}
    assert all(np.array_equal(back[name], RELEASED[name]) for name in RELEASED if not is_unused(name))
    head = "Qformer.cls.predictions"
    assert np.array_equal(back[f"{head}.decoder.weight"], back["Qformer.bert.embeddings.word_embeddings.weight"])
    assert np.array_equal(back["Qformer.bert.embeddings.position_ids"], np.arange(512)[None])
    assert (back[f"{head}.transform.LayerNorm.weight"] == 1).all() and (back[f"{head}.bias"] == 0).all()


@pytest.mark.parametrize(
    "prefix", ["", "pathflip_align.", "pathflip_finetune.", "module.pathflip_align.", "model.module.", "_orig_mod."]
)
def test_lightning_prefixes(torch, prefix, tmp_path):
    lightning = {
        "state_dict": tensors(torch, prefix=prefix),
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"args": argparse.Namespace(lr=1e-4)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
    }
    state = checkpoint_files.read_checkpoint(save_torch(torch, tmp_path / "last.ckpt", lightning))
    flat = pytorch.to_jax(state, CONFIG)
    expected = pytorch.to_jax(RELEASED, CONFIG)
    assert all(np.array_equal(flat[name], expected[name]) for name in expected)


def test_plain_and_half_precision_files(torch, tmp_path):
    used = {name: x for name, x in tensors(torch).items() if not is_unused(name)}  # absent head and buffer
    half = {name: x.bfloat16() for name, x in used.items()}
    torch_file = save_torch(torch, tmp_path / "model.pt", used)
    half_file = save_torch(torch, tmp_path / "half.bin", {"model": half})
    from safetensors.torch import save_file as save_tensors

    save_tensors(half, tmp_path / "half.safetensors")
    save_file({name: x.numpy() for name, x in used.items()}, tmp_path / "model.safetensors")
    exact = pytorch.to_jax(RELEASED, CONFIG)
    for path in (torch_file, half_file, tmp_path / "half.safetensors", tmp_path / "model.safetensors"):
        flat = pytorch.to_jax(checkpoint_files.read_checkpoint(path), CONFIG)
        rounded = "half" in path.name
        for name in exact:
            assert flat[name].dtype == np.float32
            np.testing.assert_allclose(flat[name], exact[name], rtol=2**-8 if rounded else 0)


def test_two_models_in_one_file_are_refused(torch, tmp_path):
    both = tensors(torch, prefix="pathflip_align.") | tensors(torch, prefix="pathflip_finetune.")
    path = save_torch(torch, tmp_path / "both.ckpt", both)
    with pytest.raises(ValueError, match=r"both\.ckpt: holds two models: pathflip_align\.\S+ and pathflip_finetune\."):
        checkpoint_files.read_checkpoint(path)


def test_errors_list_everything():
    state = dict(RELEASED)
    del state["text_proj.bias"], state["fg_head.attn.in_proj_weight"]
    state["llm.layers.0.weight"] = np.zeros(3, np.float32)
    state["query_tokens"] = np.zeros((1, 6, 64), np.float32)
    state["path_trans.layers.1.norm2.weight"] = np.full(32, np.nan, np.float32)
    with pytest.raises(ValueError, match="5 of its tensors do not fit") as caught:
        pytorch.to_jax(state, CONFIG)
    for line in (
        "text_proj.bias: missing",
        "fg_head.attn.in_proj_weight: missing",
        "llm.layers.0.weight: unknown",
        "query_tokens: has shape (1, 6, 64), expected (1, 5, 64)",
        "path_trans.layers.1.norm2.weight: holds NaN",
    ):
        assert line in str(caught.value)


def test_another_network_is_not_inferred():
    with pytest.raises(ValueError, match=r"(?s)not a PathFLIP.*path_proj\.weight: missing.*query_tokens: missing"):
        pytorch.infer_config({"conv1.weight": np.zeros((3, 3), np.float32)})


class Evil:
    """Payload that a malicious checkpoint runs when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(torch, zipped, tmp_path):
    target, path = tmp_path / "was_run", tmp_path / "evil.ckpt"
    content = {"state_dict": tensors(torch), "callbacks": Evil(target)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"callbacks": Evil(target)}, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.ckpt: contains objects other than tensors \(\S*mkdir") as caught:
        checkpoint_files.read_checkpoint(path)
    assert not target.exists()
    assert "weights_only=False" not in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (pickle.loads if not zipped else lambda _: torch.load(path, weights_only=False))(path.read_bytes())
    assert target.exists()  # the file was dangerous indeed


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"a": 1.0, "path_proj.weight": "x"}}, 3])
def test_files_without_weights(torch, content, tmp_path):
    path = save_torch(torch, tmp_path / "odd.pt", content)
    with pytest.raises(ValueError, match=r"odd\.pt: (holds a|not a state_dict)"):
        checkpoint_files.read_checkpoint(path)


SMALL = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.full((), 2, np.float32)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".safetensors", ".pt"]))
def test_truncated_files_are_named(torch, tmp_path, data, suffix):
    """Cut anywhere, a file is a ValueError that names it: never a crash, never half a model."""
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(tensors(torch, SMALL), path)
    else:
        save_file(SMALL, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, 2**32)) % len(whole)])
    with pytest.raises(ValueError, match=rf"cut\{suffix}: "):
        checkpoint_files.read_checkpoint(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".safetensors", ".pt"]))
def test_damaged_files_never_crash(torch, tmp_path, data, suffix):
    """With bytes changed anywhere, what comes out is tensors or a ValueError that names the file."""
    path = tmp_path / f"damaged{suffix}"
    if suffix == ".pt":
        torch.save(tensors(torch, SMALL), path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    else:
        save_file(SMALL, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        # Drawn alike for every file: torch writes addresses into it, so that its length varies.
        content[data.draw(st.integers(0, 2**32)) % len(content)] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = checkpoint_files.read_checkpoint(path)
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert all(isinstance(x, np.ndarray) for x in found.values())


def test_absent_files_and_formats_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: no such file"):
        checkpoint_files.read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"out\.h5: weights are written as"):
        export_pytorch.write_checkpoint(tmp_path / "out.h5", {})


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ImportError, match=r"model\.ckpt: .*pip install 'pathflip-jax\[torch\]'"):
        checkpoint_files.read_checkpoint(tmp_path / "model.ckpt")
    assert checkpoint_files.read_checkpoint(WEIGHTS)  # safetensors need none


def test_files_are_written_whole(torch, tmp_path):
    state = pytorch.to_torch(pytorch.to_jax(RELEASED, CONFIG), CONFIG)
    for name in ("model.safetensors", "model.pt"):
        export_pytorch.write_checkpoint(tmp_path / name, state)
        back = checkpoint_files.read_tensors(tmp_path / name)
        assert all(np.array_equal(back[key], state[key]) and back[key].shape == state[key].shape for key in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.safetensors"]
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert loaded["logit_scale"].shape == () and loaded["Qformer.bert.embeddings.position_ids"].dtype == torch.int64


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"model\.safetensors: not written .*No space left"):
        export_pytorch.write_checkpoint(tmp_path / "model.safetensors", SMALL)
    assert not list(tmp_path.iterdir())


def test_convert_then_export(torch, tmp_path):
    """A released checkpoint becomes a run, the run an export, and the export loads without JAX."""
    source = save_torch(torch, tmp_path / "epoch9.ckpt", {"state_dict": tensors(torch, prefix="pathflip_align.")})
    run, out = tmp_path / "run", tmp_path / "exported"
    from_released.convert(source, run, bert_folder=BASE / "bert")
    model, settings, tokenizer = load_run(run)
    assert model.config == CONFIG  # the heads come from the BERT folder
    assert settings["data"]["cut"] == "scan" and tokenizer.vocab_size == 301
    expected = pytorch.to_jax(RELEASED, CONFIG)
    assert all(np.array_equal(x, expected[name]) for name, x in flatten(model).items())

    export_pytorch.export(run, out, pt=True)
    files = {path.name for path in out.iterdir()}
    assert files == {"model.safetensors", "model.pt", "config.json", "bert", "torch_model.py", "README.md"}
    assert read_exported(out).config == CONFIG
    bert = json.loads((out / "bert" / "config.json").read_text())
    theirs = json.loads((BASE / "bert" / "config.json").read_text())
    assert {key: bert[key] for key in bert if key in theirs} == {key: theirs[key] for key in bert if key in theirs}
    assert (out / "bert" / "vocab.txt").read_text() == (BASE / "bert" / "vocab.txt").read_text()
    # The README's own code, on the released case, in a process where JAX cannot be imported.
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = f"""
import sys; sys.modules["jax"] = sys.modules["pathflip_jax"] = None
import json, numpy as np, torch; torch.set_grad_enabled(False)
case = np.load({str(BASE / "io.npz")!r})
patches = torch.from_numpy(case["patches"])
patch_mask = torch.ones(patches.shape[:3], dtype=torch.bool)
texts = json.load(open({str(BASE / "meta.json")!r}))["captions"]
{code.replace("max_length=384", "max_length=48")}
assert np.abs(slides.slide.numpy() - case["slide_features"]).max() < 1e-4
assert np.abs(texts.numpy() - case["caption_features"]).max() < 1e-4
assert weights.shape == (3, 3, 4) and pooled.shape == (3, 3, 32)
"""
    pytest.importorskip("transformers", reason="transformers is not installed")
    subprocess.run([sys.executable, "-c", script], cwd=out, check=True, timeout=120)
    with pytest.raises(FileExistsError, match="exported: exists and is not empty"):
        export_pytorch.export(run, out)


def test_torch_model_stands_alone():
    """It needs torch, safetensors and the standard library, and tries for transformers: an export carries a copy."""
    tree = ast.parse(Path(pytorch.__file__).with_name("torch_model.py").read_text())
    tried = {
        id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for part in block.body
        for node in ast.walk(part)
    }  # fmt: skip
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {
        (name.partition(".")[0], id(node) in tried)
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    foreign = {(name, optional) for name, optional in modules if name not in sys.stdlib_module_names}
    assert foreign == {("torch", False), ("safetensors", False), ("transformers", True)}


def test_convert_refuses_what_does_not_belong(tmp_path):
    source = tmp_path / "model.safetensors"
    save_file({name: x for name, x in RELEASED.items() if name != "text_proj.weight"}, source)
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors: not a PathFLIP.*text_proj\.weight: missing"):
        from_released.convert(source, tmp_path / "run", bert_folder=BASE / "bert")
    words = (BASE / "bert" / "vocab.txt").read_text()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text(words + "carcinomatosis\n")
    with pytest.raises(ValueError, match=r"its word table has 301 rows, \S*bert has 302 words"):
        from_released.convert(WEIGHTS, tmp_path / "run", bert_folder=tmp_path / "bert", heads=4)
    assert not (tmp_path / "run").exists()


def test_a_trained_bias_is_exported_and_explained(tmp_path):
    """Models born here may have a bias that the released class lacks: kept for ours, said in the README."""
    from pathflip_jax.data.texts.tokenizer import TextTokenizer
    from pathflip_jax.runs.folder import save_run

    config = PathFLIPConfig.from_dict(CONFIG.to_dict() | {"logit_bias_init": -10.0})
    flat = {name: jnp.asarray(x) for name, x in random_parameters(config).items()}
    save_run(tmp_path / "run", unflatten(config, flat), {"data": {"encoder": "conch"}}, TextTokenizer(BASE / "bert"))
    export_pytorch.export(tmp_path / "run", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert set(state) - set(RELEASED) == {"logit_bias"} and state["logit_bias"] == flat["logit_bias"]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "`logit_bias`" in readme and "conch" in readme and "research use only" in readme
