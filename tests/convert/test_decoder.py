"""Decoders from Hugging Face folders and back: every tensor accounted for, and every fault named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from pathflip_jax.convert.decoder import check_tokenizer, init_decoder, load_decoder, read_decoder_config, save_decoder
from pathflip_jax.convert.decoder_folders import open_tensors
from pathflip_jax.convert.decoder_names import names
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.model.parameters import flatten, unflatten

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FAMILIES = ("qwen3", "qwen2", "llama")
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 17), dtype=np.int32)


def logits(decoder: Decoder) -> np.ndarray:
    return np.asarray(jax.jit(lambda decoder: decoder(TOKENS)[0])(decoder))


def their_logits(folder: Path) -> np.ndarray:
    """Of the model that transformers makes of a folder as a user would, all settings its own."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


@pytest.fixture
def copied(decoder_folder, tmp_path):
    """copied(family, ...) is a copy of a folder that a test may damage."""

    def copy(family: str, **more) -> Path:
        return Path(shutil.copytree(decoder_folder(family, **more), tmp_path / "copy"))

    return copy


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("more", [{}, {"shard": "20KB"}, {"dtype": "bfloat16"}], ids=["one file", "set", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives(decoder_folder, family, more):
    folder = decoder_folder(family, **more)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == ("shard" in more)
    tensors = tensors_of(folder)
    for dtype in ("float32", "bfloat16"):
        decoder = load_decoder(folder, dtype=dtype)
        flat, table = flatten(decoder), names(decoder.config)
        assert {name.path for name in table} == flat.keys() and {name.torch for name in table} == tensors.keys()
        for name in table:
            assert flat[name.path].dtype == dtype
            np.testing.assert_array_equal(flat[name.path], name.to_jax(tensors[name.torch]).astype(dtype))


def test_on_eight_devices_each_byte_is_read_once(copied):
    folder = copied("qwen2", shard="20KB", dtype="bfloat16")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("load_on_eight_devices.py")
    command = [sys.executable, "-W", "error", str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout.endswith("whole\n"), done.stdout + done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_transformers_loads(decoder_folder, tmp_path, family):
    folder = decoder_folder(family)
    decoder = load_decoder(folder)
    expected = logits(decoder)
    assert expected.std() > 0.3
    for source in (None, folder):
        out = tmp_path / f"out-{source is None}"
        save_decoder(decoder, out, source=source)
        np.testing.assert_allclose(their_logits(out), expected, rtol=0, atol=2e-5)
        assert read_decoder_config(out) == decoder.config
        with safe_open(out / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in folder.iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_large_model_is_saved_as_a_set(decoder_folder, tmp_path):
    decoder = load_decoder(decoder_folder("llama"), dtype="bfloat16")
    save_decoder(decoder, tmp_path / "out", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    biggest = max(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    for file in files:  # a tensor larger than the limit stands alone
        assert sum(x.nbytes for x in load_file(tmp_path / "out" / file).values()) <= max(20_000, biggest)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_of(tmp_path / "out").values())
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    for name, tensor in tensors_of(decoder_folder("llama")).items():
        rounded = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found.state_dict()[name].float().numpy(), rounded)


def test_adapters_are_merged_and_the_dtype_can_change(decoder_folder, tmp_path):
    folder, lora = decoder_folder("qwen3"), LoRAConfig(rank=3, alpha=5.0, targets=("q_proj", "o_proj", "gate_proj"))
    decoder = load_decoder(folder, lora=lora, seed=3)
    flat = flatten(decoder)
    assert not any(x.any() for name, x in flat.items() if name.endswith("/lora/b"))  # fresh adapters add nothing
    noise = jax.random.key(1)
    flat |= {name: 0.3 * jax.random.normal(noise, x.shape) for name, x in flat.items() if name.endswith("/lora/b")}
    decoder = unflatten(decoder, flat)
    save_decoder(decoder, tmp_path / "merged", source=folder)
    base, expected = logits(load_decoder(folder)), logits(decoder)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(their_logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)
    save_decoder(decoder, tmp_path / "half", source=folder, dtype="bfloat16")
    assert {x.dtype for x in tensors_of(tmp_path / "half").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_appears_whole_or_not_at_all(decoder_folder, tmp_path, monkeypatch):
    decoder = load_decoder(decoder_folder("qwen3"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full: exists and is not empty; write to another folder"):
        save_decoder(decoder, tmp_path / "full")
    write, written = os.fsync, []

    def fail(number):
        written.append(number)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write(number)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left.*free space there"):
        save_decoder(decoder, tmp_path / "out", shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_source_must_be_of_the_same_model(decoder_folder, tmp_path):
    decoder = load_decoder(decoder_folder("qwen3"))
    with pytest.raises(ValueError, match=r"does not describe this decoder: family is 'llama', expected 'qwen3'"):
        save_decoder(decoder, tmp_path / "out", source=decoder_folder("llama"))
    odd = DecoderConfig("llama", 8, 8, 1, 2, 1, 4, 8, 16, 1e4, 1e-6, True, query_norm=True)
    with pytest.raises(ValueError, match="Hugging Face's llama has no such biases and norms"):
        save_decoder(init_decoder(odd, 0), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_random_parameters(decoder_folder):
    """Those that a seed gives, in the dtype asked for; adapters are float32."""
    config = read_decoder_config(decoder_folder("qwen3", num_hidden_layers=1))
    one, same, other = (flatten(init_decoder(config, seed, dtype="bfloat16")) for seed in (0, 0, 1))
    kernel = "layers/0/feed_forward/up/kernel"
    assert one[kernel].dtype == jnp.bfloat16 and 0.01 < one[kernel].astype(jnp.float32).std() < 0.03
    assert (one[kernel] == same[kernel]).all() and not (one[kernel] == other[kernel]).all()
    with pytest.raises(ValueError, match="dtype 'float16': parameters are stored as float32 or bfloat16"):
        init_decoder(config, 0, dtype="float16")


def test_a_config_without_weights(copied):
    folder = copied("qwen3")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor .*; download the weights.*init_decoder"
    ):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_decoder(folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; .*hf download"):
        load_decoder(folder / "nowhere")
    with pytest.raises(ValueError, match="gs://lab/model: .*copy the folder here"):
        load_decoder("gs://lab/model")


def test_pickled_weights_are_refused(copied):
    folder = copied("qwen3")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model\.bin\), .*save_pretrained"):
        load_decoder(folder)
    assert not Path("owned").exists()


def test_code_in_a_folder_is_not_run(copied):
    folder = copied("qwen3")
    expected = logits(load_decoder(folder))
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"})
    (folder / "modeling_own.py").write_text("raise SystemExit('run')")
    decoder = load_decoder(folder)
    np.testing.assert_array_equal(logits(decoder), expected)
    save_decoder(decoder, folder / "out", source=folder)
    assert "auto_map" not in json.loads((folder / "out/config.json").read_text())
    assert not (folder / "out/modeling_own.py").exists()


def test_a_set_with_a_hole_in_it(copied):
    folder = copied("qwen2", shard="20KB")
    index = folder / "model.safetensors.index.json"
    lost = "model-00002-of-00006.safetensors"
    (folder / lost).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"missing {lost} of the 6 files that {index.name} names"):
        load_decoder(folder)
    (folder / "elsewhere").rename(folder / lost)
    where = json.loads(index.read_text())["weight_map"]
    moved = next(name for name, file in where.items() if file == lost)
    index.write_text(json.dumps({"weight_map": where | {moved: "model-00001-of-00006.safetensors"}}))
    with pytest.raises(ValueError, match=f"different models.*\n  {moved} is not in model-00001-of-00006.safetensors"):
        load_decoder(folder)
    for broken in ({"weight_map": where | {moved: "../../secret"}}, {"weight_map": []}, {}):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="no weight_map from tensors to files beside it"):
            load_decoder(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00006\.safetensors is one of several shards, but"):
        load_decoder(folder)


@pytest.mark.parametrize("keep", [0, 4, 300, -100])
def test_a_file_cut_short(copied, keep):
    folder = copied("qwen3")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: incomplete or damaged .*; copy it again"):
        load_decoder(folder)


def test_all_tensors_that_do_not_fit_are_listed(copied):
    folder = copied("qwen3")
    tensors = tensors_of(folder)
    del tensors["model.layers.0.self_attn.q_norm.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    tensors["model.layers.1.mlp.gate_proj.weight"] = np.zeros((48, 32), np.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(
        8, np.float32
    )  # of old files, follows from theta
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="copy: 5 tensors do not match the qwen3 that its config.json") as caught:
        load_decoder(folder)
    for line in (
        "model.layers.0.self_attn.q_norm.weight: missing",
        "model.norm.weight: missing",
        "model.layers.2.mlp.up_proj.weight: unknown",
        "model.layers.1.mlp.up_proj.weight: has shape (48, 31), expected (48, 32)",
        "model.layers.1.mlp.gate_proj.weight: is of type I8, expected F32, BF16, F16",
    ):
        assert f"\n  {line}" in str(caught.value)


def test_names_of_a_compiled_decoder_are_the_same(copied):
    folder = copied("qwen3")
    expected = flatten(load_decoder(folder))
    tensors = tensors_of(folder)
    save_file({f"_orig_mod.{name}": x for name, x in tensors.items()}, folder / "model.safetensors")
    found = flatten(load_decoder(folder))
    assert all(np.array_equal(found[name], x) for name, x in expected.items())


def test_a_tied_file_may_repeat_the_embedding(copied):
    """As Qwen3-0.6B's does. A head of its own is none that config.json speaks of."""
    folder = copied("qwen3")
    expected = logits(load_decoder(folder))
    tensors = tensors_of(folder)
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.copy()}, folder / "model.safetensors")
    np.testing.assert_array_equal(logits(load_decoder(folder)), expected)
    for head in (table + 1, table[:300].copy()):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight differs"):
            load_decoder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "mistral"}', r"config\.json: model_type 'mistral' is not supported"),
        (
            '{"model_type": "qwen3", "use_sliding_window": true}',
            r"config\.json: .*vocab_size is missing.*use_sliding_w",
        ),
        ('{"model_type": ["qwen3"]}', r"config\.json: "),
        ("[1]", r"config\.json: holds a list, expected an object"),
        ('{"model_type": ', r"config\.json: not JSON"),
    ],
)
def test_configs_that_are_refused_name_their_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_decoder_config(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"rope_parameters": "x"}, {"rope_parameters": {"rope_theta": "x"}}, {"head_dim": "8"}]
)
def test_values_of_the_wrong_kind_name_their_file(copied, changes):
    folder = copied("qwen3")
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_decoder_config(folder)


def test_a_tokenizer_must_fit_the_embedding(copied):
    folder = copied("qwen3")
    config = read_decoder_config(folder)
    check_tokenizer(folder, config)  # 300 tokens, 320 rows
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"<{number}>" for number in range(21)])
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match="its token '<20>' has the id 320, while the decoder's embedding has 320 rows"):
        check_tokenizer(folder, config)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        check_tokenizer(folder, config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        check_tokenizer(folder, config)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_is_read_or_refused_by_name(decoder_folder, tmp_path, data):
    values = json.loads((decoder_folder("llama") / "config.json").read_text())
    values |= data.draw(st.dictionaries(st.sampled_from(sorted({*values, "rope_theta", "rope_scaling"})), ANY_JSON))
    (tmp_path / "config.json").write_text(json.dumps(values))
    try:
        assert isinstance(read_decoder_config(tmp_path), DecoderConfig)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / 'config.json'}: ")


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_by_name(decoder_folder, tmp_path, data):
    whole = bytearray((decoder_folder("llama") / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        whole[place] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(whole)
    try:
        assert open_tensors(tmp_path)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / 'model.safetensors'}: ")
