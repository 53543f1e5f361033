"""The decoder against transformers: the same logits from ids, from soft tokens, padded, in pieces, in bfloat16."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.convert.decoder import init_decoder, load_decoder
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig, RopeScaling
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.model.parameters import flatten, unflatten

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ATOL = 2e-5
B, T = 3, 72  # more tokens than the 64 that the scaled Llama was trained on at first
# The folders of conftest.py, and what they leave out: ties, biases, other bases of rotary positions.
CASES = {
    "qwen3": ("qwen3", {}),
    "qwen3, untied, biases": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama": ("llama", {}),
    "llama, tied, biases": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        },
    ),
}
PADDING = {"none": (0, 0, 0), "left": (0, 9, 31), "right": (0, -9, -31)}


@pytest.fixture(scope="module", params=CASES)
def pair(request, decoder_folder):
    """Our decoder and that of transformers, of one folder."""
    family, overrides = CASES[request.param]
    folder = decoder_folder(family, **overrides)
    return load_decoder(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens_and_mask(padding: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    slots = np.arange(T)
    mask = np.stack([slots >= pad if pad >= 0 else slots < T + pad for pad in PADDING[padding]])
    return rng.integers(0, 320, (B, T), dtype=np.int32), mask


def theirs(model, mask: np.ndarray, **inputs) -> np.ndarray:
    """The logits of transformers, positions counted over real tokens as its own `generate` does."""
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        found = model(attention_mask=torch.from_numpy(mask.astype(np.int64)), position_ids=positions, **inputs)
    return found.logits.float().numpy()


@jax.jit
def ours(decoder: Decoder, mask, tokens=None, inputs_embeds=None, cache=None):
    return decoder(tokens, inputs_embeds=inputs_embeds, mask=mask, cache=cache)


def assert_same(found, expected, mask) -> None:
    assert expected.std() > 0.3
    np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], rtol=0, atol=ATOL)


@pytest.mark.parametrize("padding", PADDING)
def test_logits_are_those_of_transformers(pair, padding):
    decoder, model = pair
    tokens, mask = tokens_and_mask(padding)
    expected = theirs(model, mask, input_ids=tokens.astype(np.int64))
    assert_same(ours(decoder, mask, tokens)[0], expected, mask)
    first = T - 20  # in two pieces, prompts padded on the left as for generation
    if padding != "right":
        cache = decoder.empty_cache(B, T + 4)
        before, cache = ours(decoder, mask[:, :first], tokens[:, :first], cache=cache)
        after, cache = ours(decoder, mask[:, first:], tokens[:, first:], cache=cache)
        assert_same(np.concatenate([before, after], axis=1), expected, mask)
        assert int(cache.filled) == T and cache.mask.sum() == mask.sum()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_soft_tokens_are_read_as_transformers_reads_them(pair, padding):
    decoder, model = pair
    tokens, mask = tokens_and_mask(padding)
    soft = np.random.default_rng(1).normal(size=(B, 5, 32)).astype(np.float32)
    embeddings = np.array(decoder.embed(tokens))
    np.testing.assert_array_equal(embeddings, model.get_input_embeddings()(torch.from_numpy(tokens)).detach().numpy())
    embeddings[:, 33:38] = soft
    expected = theirs(model, mask, inputs_embeds=embeddings)
    assert_same(ours(decoder, mask, inputs_embeds=embeddings)[0], expected, mask)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_bfloat16_loses_no_more_than_transformers_in_bfloat16(decoder_folder, family):
    """By the mean over all logits: where a single one ends is a matter of the order of sums, on either side."""
    folder = decoder_folder(family)
    tokens, mask = tokens_and_mask("left")
    exact = theirs(transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), mask, input_ids=tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rounded = theirs(model, mask, input_ids=tokens)
    found = np.asarray(ours(load_decoder(folder, dtype="bfloat16"), mask, tokens)[0])
    their_loss, our_loss = (np.abs(x - exact)[mask].mean() for x in (rounded, found))
    assert 1e-3 < our_loss < 1.1 * their_loss, (our_loss, their_loss)


def test_what_parameters_are_stored_in_and_computed_in_are_two_things(decoder_folder):
    folder, lora = decoder_folder("qwen3"), LoRAConfig(rank=2, targets=("v_proj",))
    for stored, computed in (("float32", "bfloat16"), ("bfloat16", "float32")):
        decoder = load_decoder(folder, dtype=stored, compute_dtype=computed, lora=lora)
        for name, x in flatten(decoder).items():
            assert x.dtype == ("float32" if "/lora/" in name else stored), name
        assert jax.eval_shape(decoder.states, jnp.zeros((1, 2), int))[0].dtype == computed


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(decoder_folder, side):
    """Neither what stands in it nor how much there is; no gradient reaches it."""
    decoder = load_decoder(decoder_folder("qwen3"))
    embeddings = np.random.default_rng(2).normal(size=(1, 11, 32)).astype(np.float32)
    places = slice(6, 17) if side == "left" else slice(0, 11)
    alone, _ = ours(decoder, np.ones((1, 11), bool), inputs_embeds=embeddings)

    @jax.jit
    def real_logits(padded):
        mask = jnp.zeros((1, 17), bool).at[:, places].set(True)
        return decoder(inputs_embeds=padded, mask=mask)[0][:, places]

    for filling in (0.0, 50.0, np.nan):
        padded = np.full((1, 17, 32), filling, np.float32)
        padded[:, places] = embeddings
        np.testing.assert_allclose(real_logits(padded), alone, rtol=0, atol=ATOL)
    gradient = np.array(jax.grad(lambda padded: jnp.sum(real_logits(padded) ** 2))(padded))
    assert np.abs(gradient[:, places]).max() > 1e-3
    gradient[:, places] = 0
    assert not gradient.any()


def test_gradients_with_remat_are_the_same(decoder_folder):
    lora = LoRAConfig(rank=2, dropout=0.3, targets=("q_proj", "down_proj"))
    decoder = load_decoder(decoder_folder("qwen2"), lora=lora)
    again = load_decoder(decoder_folder("qwen2"), lora=lora, remat=True)
    assert again.config == dataclasses.replace(decoder.config, remat=True)
    flat, key = flatten(decoder), jax.random.key(1)
    flat |= {n: 0.1 * jax.random.normal(jax.random.key(2), x.shape) for n, x in flat.items() if n.endswith("/lora/b")}
    tokens, mask = tokens_and_mask("left")

    def loss(flat, template):
        logits, _ = unflatten(template, flat)(tokens, mask=mask, key=key)
        return jnp.where(mask[..., None], jax.nn.log_softmax(logits), 0)[..., 7].sum()

    plain, saving = (jax.jit(jax.grad(lambda flat, t=t: loss(flat, t)))(flat) for t in (decoder, again))
    for name, expected in plain.items():
        size = np.abs(expected).max()
        assert size > 0 or name.endswith("key/bias"), name  # a shift of all keys moves no softmax
        np.testing.assert_allclose(saving[name], expected, rtol=0, atol=1e-5 * max(size, 1), err_msg=name)


QWEN3 = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; expected one of qwen3, qwen2, llama"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' \(expected silu\)"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_attention"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .give the unquantised weights"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope scaling 'yarn'"),
        ({"rope_parameters": LLAMA3}, "original_max_position_embeddings of its rope scaling is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None, "hidden_act": "relu"}, "hidden_size is None, expected .*; hidden_act 'relu'"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 5}, "5 heads cannot share 2"),
        ({"head_dim": 15}, "head_dim 15"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(QWEN3 | changes)


def test_all_that_is_missing_is_listed():
    with pytest.raises(ValueError, match="vocab_size is missing; hidden_size is missing; .*intermediate_size"):
        DecoderConfig.from_hf({"model_type": "llama"})


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("leave_out", [(), ("num_key_value_heads",), ("head_dim",)])
def test_a_config_that_says_little_is_read_as_transformers_reads_it(family, leave_out):
    values = {**QWEN3, "model_type": family, "num_attention_heads": 32, "hidden_size": 256}
    if "num_key_value_heads" in leave_out:
        values["num_key_value_heads"] = None
    values = {name: value for name, value in values.items() if name not in leave_out or value is None}
    config = DecoderConfig.from_hf(values)
    expected = transformers.AutoConfig.for_model(**values)
    assert config.kv_heads == expected.num_key_value_heads
    assert config.head_dim == getattr(expected, "head_dim", None) or 256 // 32
    assert config.max_positions == expected.max_position_embeddings
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.norm_eps == expected.rms_norm_eps and config.tied == expected.tie_word_embeddings


def test_rotary_positions_of_old_and_new_folders_are_the_same():
    """transformers 5 writes rope_parameters, 4 wrote rope_theta beside rope_scaling."""
    scaling = LLAMA3 | {"original_max_position_embeddings": 64}
    old = DecoderConfig.from_hf(QWEN3 | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling})
    new = DecoderConfig.from_hf(QWEN3 | {"model_type": "llama", "rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new and old.rope_theta == 5e5 and old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert json.loads(json.dumps(old.to_dict()))["rope_scaling"]["factor"] == 8.0


def test_tokens_or_embeddings_one_of_the_two(decoder_folder):
    decoder = jax.eval_shape(lambda: init_decoder(DecoderConfig.from_hf(QWEN3), 0))
    for given in ({}, {"tokens": jnp.zeros((1, 2), int), "inputs_embeds": jnp.zeros((1, 2, 32))}):
        with pytest.raises(ValueError, match="expected either token ids or inputs_embeds; pass exactly one of the two"):
            decoder(**given)
