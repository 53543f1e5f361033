"""Adapters: extracted, attached, merged, and converted to and from PEFT."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.convert.lora import adapters, attach, is_adapter, load_peft, merge, save_peft
from pathflip_jax.llm.config import TARGETS, LoRAConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.model.parameters import flatten, unflatten

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# PEFT asks transformers by a name that it will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ATOL = 2e-5
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 17), dtype=np.int32)


@jax.jit
def _logits(decoder: Decoder):
    return decoder(TOKENS)[0]


def logits(decoder: Decoder) -> np.ndarray:
    return np.asarray(_logits(decoder))


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def adapted(folder: Path, lora: LoRAConfig) -> Decoder:
    """A decoder whose adapters do something: `b` is random too."""
    decoder = load_decoder(folder, lora=lora)
    flat, rng = flatten(decoder), np.random.default_rng(1)
    flat |= {name: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for name, x in flat.items() if name[-2:] == "/b"}
    return unflatten(decoder, flat)


def trained_by_peft(base: Path, out: Path, **settings) -> np.ndarray:
    """Write an adapter with random B as PEFT does, and give the logits of its model."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | settings
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(out)
    return their_logits(model)


@pytest.fixture(scope="module")
def base(decoder_folder) -> Path:
    return decoder_folder("qwen3")


@pytest.fixture(scope="module")
def sound_adapter(base, tmp_path_factory) -> Path:
    lora = LoRAConfig(rank=4, alpha=6.0, targets=("q_proj", "v_proj"))
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    save_peft(flatten(adapted(base, lora)), lora, folder, str(base))
    return folder


@pytest.fixture
def adapter(sound_adapter, tmp_path):
    """A folder of PEFT that a test may damage: (folder, change its settings, change its tensors)."""
    shutil.copytree(sound_adapter, tmp_path / "adapter")

    def settings(**changes) -> Path:
        path = tmp_path / "adapter/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "adapter"

    def tensors(change) -> Path:
        path = tmp_path / "adapter/adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)
        return tmp_path / "adapter"

    return tmp_path / "adapter", settings, tensors


def test_an_adapter_saved_through_wrappers_is_the_same(adapter):
    folder, _, tensors = adapter
    expected = load_peft(folder)[0]

    def wrap(found) -> None:
        for name in list(found):
            found[name.replace("layers.0.", "layers.0._orig_mod.").replace("self_attn.", "self_attn.module.")] = (
                found.pop(name)
            )

    found = load_peft(tensors(wrap))[0]
    assert found.keys() == expected.keys() and all(np.array_equal(found[n], x) for n, x in expected.items())


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("qwen3", LoRAConfig(rank=4, alpha=6.0)),
        ("qwen2", LoRAConfig(rank=3, alpha=7.5, targets=("k_proj", "o_proj", "down_proj"))),
        ("llama", LoRAConfig(rank=1, alpha=1.0, targets=("up_proj",))),
    ],
)
def test_an_adapter_goes_to_peft_and_comes_back(decoder_folder, tmp_path, family, lora):
    import peft

    folder = decoder_folder(family)
    decoder = adapted(folder, lora)
    flat, expected = flatten(decoder), logits(decoder)
    save_peft(flat, lora, tmp_path / "adapter", str(folder))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    bare = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    before = their_logits(bare)
    model = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(their_logits(model), expected, rtol=0, atol=ATOL)
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").lora_dropout == lora.dropout
    found, config = load_peft(tmp_path / "adapter", folder)
    assert config == lora and found.keys() == adapters(flat).keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, flat[name])


def test_names_and_shapes_of_the_file_are_those_of_peft(base, tmp_path):
    """Exactly the tensors that PEFT itself writes for these targets."""
    targets = ("q_proj", "gate_proj")
    trained_by_peft(base, tmp_path / "theirs", r=2, target_modules=list(targets))
    lora = LoRAConfig(rank=2, targets=targets)
    save_peft(flatten(load_decoder(base, lora=lora)), lora, tmp_path / "ours", "Qwen/Qwen3-0.6B")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    shapes = {name: (x.shape, x.dtype) for name, x in theirs.items()}
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == shapes
    with safe_open(tmp_path / "ours/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    mine, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert mine["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert mine.keys() <= other.keys()
    for name in ("peft_type", "task_type", "r", "bias", "fan_in_fan_out", "inference_mode", "use_dora", "use_rslora"):
        assert mine[name] == other[name], name


@pytest.mark.parametrize(
    ("family", "settings", "targets"),
    [
        ("qwen3", {"lora_dropout": 0.1}, ("q_proj", "v_proj")),
        ("qwen2", {"target_modules": "all-linear", "use_rslora": True}, tuple(TARGETS)),
        (
            "llama",
            {"target_modules": r".*\.(self_attn\.o_proj|mlp\.up_proj)", "task_type": None},
            ("o_proj", "up_proj"),
        ),
    ],
    ids=["list", "all-linear, rslora", "pattern, no task"],
)
def test_what_peft_trained_is_loaded(decoder_folder, tmp_path, family, settings, targets):
    folder = decoder_folder(family)
    expected = trained_by_peft(folder, tmp_path / "adapter", **settings)
    flat, lora = load_peft(tmp_path / "adapter", folder)
    assert lora.targets == targets and lora.rank == 4 and lora.dropout == settings.get("lora_dropout", 0)
    plain = load_decoder(folder)
    assert np.abs(logits(plain) - expected).max() > 0.1
    template = load_decoder(folder, lora=lora)
    decoder = unflatten(template, attach(flatten(plain), flat))
    np.testing.assert_allclose(logits(decoder), expected, rtol=0, atol=ATOL)
    alone, same = load_peft(tmp_path / "adapter")
    assert same == lora and all((alone[name] == flat[name]).all() for name in flat)
    merged = unflatten(plain, merge(flatten(decoder), lora))
    np.testing.assert_allclose(logits(merged), expected, rtol=0, atol=ATOL)


def test_merging_sums_in_float32_and_rounds_once(base):
    lora = LoRAConfig(rank=2, alpha=3.0, targets=("up_proj",))
    flat = flatten(load_decoder(base, dtype="bfloat16", lora=lora))
    b = "layers/0/feed_forward/up/lora/b"
    flat[b] = jnp.asarray(np.random.default_rng(0).normal(size=flat[b].shape), jnp.float32)
    merged = merge(flat, lora)
    assert merged.keys() == {name for name in flat if not is_adapter(name)}
    kernel = "layers/0/feed_forward/up/kernel"
    parts = [np.asarray(flat[name], np.float64) for name in (kernel, b.removesuffix("b") + "a", b)]
    exact = jnp.asarray(parts[0] + 1.5 * parts[1] @ parts[2], jnp.float32).astype(jnp.bfloat16)
    assert merged[kernel].dtype == jnp.bfloat16
    assert np.mean(merged[kernel] == exact) > 0.99  # float32 and float64 differ at the bound of a rounding
    for name in merged.keys() - {kernel}:
        np.testing.assert_array_equal(merged[name], flat[name])


def test_attach_puts_an_adapter_in_place_of_another(base):
    first, second = (LoRAConfig(rank=rank, targets=("q_proj",)) for rank in (2, 3))
    flat, adapter = flatten(load_decoder(base, lora=first)), adapters(flatten(adapted(base, second)))
    found = attach(flat, adapter)
    assert adapters(found).keys() == adapter.keys() and found["layers/1/attention/query/lora/a"].shape == (32, 3)
    assert found.keys() == flat.keys()
    wrong = {
        "layers/0/attention/query/lora/a": np.zeros((31, 2), np.float32),
        "layers/7/attention/query/lora/b": np.zeros((2, 64), np.float32),
        "norm/scale": np.zeros(32, np.float32),
    }
    with pytest.raises(ValueError, match="this adapter does not fit this decoder") as caught:
        attach(flat, wrong)
    assert "layers/0/attention/query/lora/a: has shape (31, 2), but the kernel has (32, 64)" in str(caught.value)
    assert "layers/7/attention/query/lora/b: the decoder has nothing to adapt there" in str(caught.value)
    assert "norm/scale: the decoder has nothing" in str(caught.value)


def test_save_peft_refuses_what_is_no_adapter_of_these_targets(base, tmp_path):
    lora = LoRAConfig(rank=2, targets=("q_proj",))
    flat = flatten(load_decoder(base, lora=lora))
    other = LoRAConfig(rank=2, targets=("q_proj", "k_proj"))
    with pytest.raises(ValueError, match="missing layers/0/attention/key/lora/a; .*layers/1/attention/key/lora/b"):
        save_peft(flat, other, tmp_path / "out", "base")
    with pytest.raises(ValueError, match="missing layers/0/attention/query/lora/a"):
        save_peft(flatten(load_decoder(base)), lora, tmp_path / "out", "base")
    with pytest.raises(ValueError, match="unknown layers/0/attention/query/lora/a"):
        save_peft(flat, LoRAConfig(rank=2, targets=("k_proj",)), tmp_path / "out", "base")
    assert not list(tmp_path.iterdir())
    save_peft(flat, lora, tmp_path / "out", "base")
    with pytest.raises(FileExistsError, match="out: exists and is not empty"):
        save_peft(flat, lora, tmp_path / "out", "base")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_supported_is_refused_by_name(adapter, base, changes):
    ((name, value),) = changes.items()
    folder = adapter[1](**changes)
    with pytest.raises(ValueError, match=f"adapter_config.json: not supported: {name} is .*; merge it into its base"):
        load_peft(folder, base)
    with pytest.raises(ValueError, match="peft_type is 'IA3', expected 'LORA'"):
        load_peft(adapter[1](peft_type="IA3", **{name: None}), base)


def test_what_really_uses_those_settings_is_refused(base, tmp_path):
    """As PEFT writes it, not only as the settings say."""
    for name, settings in {
        "use_dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["norm"]},
        "of some layers only": {"layers_to_transform": [1]},
    }.items():
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        trained_by_peft(base, tmp_path / "adapter", **settings)
        with pytest.raises(ValueError, match=f"{name}.*merge it into its base"):
            load_peft(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "4"}, "r is '4', expected a whole number"),
        ({"r": 0}, "LoRA rank 0"),
        ({"lora_alpha": None}, "adapter_config.json: "),
        ({"r": 5}, r"lora_A.weight: has shape \(4, 32\), expected \(5, 32\)"),
    ],
)
def test_settings_that_do_not_fit(adapter, base, changes, message):
    with pytest.raises(ValueError, match=message):
        load_peft(adapter[1](**changes), base)


def test_an_adapter_of_another_base_is_refused(adapter, decoder_folder, base):
    folder, settings, _ = adapter
    cure = "trained on 'Qwen/Qwen3-8B', pass the folder of that model"
    settings(base_model_name_or_path="Qwen/Qwen3-8B")
    with pytest.raises(ValueError, match=f"{cure}(.|\n)*layers.2.self_attn.q_proj.lora_A.weight: missing"):
        load_peft(folder, decoder_folder("qwen3", num_hidden_layers=3))
    with pytest.raises(
        ValueError, match=f"{cure}(.|\n)*layers.1.self_attn.q_proj.lora_A.weight: not found in the base model"
    ):
        load_peft(folder, decoder_folder("qwen3", num_hidden_layers=1))
    with pytest.raises(ValueError, match=rf"{cure}(.|\n)*lora_A.weight: has shape \(4, 32\), expected \(4, 16\)"):
        load_peft(folder, decoder_folder("qwen3", hidden_size=16))
    settings(auto_mapping={"base_model_class": "GPT2LMHeadModel", "parent_library": "x"})
    with pytest.raises(
        ValueError, match="trained on a GPT2LMHeadModel .Qwen/Qwen3-8B., while .* is a Qwen3ForCausalLM"
    ):
        load_peft(folder, base)
    settings(auto_mapping=None, base_model_name_or_path=str(decoder_folder("llama", head_dim=16)))
    with pytest.raises(ValueError, match="trained on a LlamaForCausalLM .*; give the folder of the base that it was"):
        load_peft(folder, base)


def test_files_that_are_not_there_or_not_whole(adapter, base):
    folder, settings, tensors = adapter
    a = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    with pytest.raises(ValueError, match=f"{a}: missing"):
        load_peft(tensors(lambda found: found.pop(a)), base)
    with pytest.raises(ValueError, match="expected adapters of .* only, found some.other"):
        load_peft(tensors(lambda found: found.update({"some.other": np.zeros(2, np.float32)})), base)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="adapter_model.safetensors: incomplete or damaged safetensors file"):
        load_peft(folder, base)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in it; copy it too"):
        load_peft(folder, base)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="save it with safe_serialization=True"):
        load_peft(folder, base)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        load_peft(folder, base)
