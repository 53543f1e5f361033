"""Generation against transformers: the same tokens greedily and by beams, the same filters; likelihoods; refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.convert.decoder import init_decoder, load_decoder
from pathflip_jax.llm import generate as module
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.llm.generate import adjust, generate, restrict, score
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.llm.serving import fuse_for_decoding
from pathflip_jax.ops import packed_matmul
from pathflip_jax.runtime.compilation import CompileCounter, compiler_options

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.generation import logits_process as processors  # noqa: E402

B, T, V, NEW = 3, 11, 320, 16
IDS = np.random.default_rng(0).integers(3, V, (B, T), dtype=np.int32)
LEFT = np.arange(T) >= np.array([0, 4, 7])[:, None]
ALL = np.ones((B, T), bool)


def read(model, tokens):
    return model(tokens)[0]


def logits_of(model, tokens):
    """The logits [B, T, V] of tokens, by one program with the options that generation has."""
    return jax.jit(read, compiler_options=compiler_options())(model, tokens)


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def pair(request, decoder_folder):
    """Our decoder and that of transformers, of one folder."""
    folder = decoder_folder(request.param)
    return load_decoder(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def qwen3(decoder_folder):
    folder = decoder_folder("qwen3")
    return load_decoder(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def theirs(model, mask: np.ndarray, sampling: Sampling, *, embeds: bool = False):
    """Text that transformers generates, and the scores of its beams."""
    inputs = {"input_ids": torch.from_numpy(IDS).long()}
    if embeds:
        inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    chosen = {"repetition_penalty": sampling.repetition_penalty, "eos_token_id": list(sampling.stop_ids) or None}
    if sampling.min_new_tokens:
        chosen["min_new_tokens"] = sampling.min_new_tokens
    if sampling.beams > 1:
        chosen |= {"num_beams": sampling.beams, "length_penalty": sampling.length_penalty, "early_stopping": False}
    with torch.no_grad():
        found = model.generate(
            **inputs, attention_mask=torch.from_numpy(mask).long(), do_sample=False, pad_token_id=0,
            max_new_tokens=sampling.max_new_tokens, return_dict_in_generate=True, output_scores=True, **chosen,
        )  # fmt: skip
    tokens = found.sequences.numpy()
    scores = found.sequences_scores.numpy() if sampling.beams > 1 else None
    return tokens if embeds else tokens[:, T:], scores


def check(pair, mask: np.ndarray, sampling: Sampling, *, embeds: bool = False, prompt: bool = False) -> np.ndarray:
    """Both write the same tokens up to the first end, and ours writes nothing after it; the lengths."""
    ours, model = pair
    prompt_tokens = np.where(mask, IDS, -1) if prompt else None
    found = generate(ours, ours.embed(IDS), mask, sampling, prompt_tokens=prompt_tokens)
    expected, scores = theirs(model, mask, sampling, embeds=embeds)
    assert found.tokens.shape == (B, sampling.max_new_tokens)
    for row, length, want in zip(found.tokens, found.lengths, expected, strict=True):
        assert row[:length].tolist() == want[:length].tolist()
        ended = np.isin(row[:length], sampling.stop_ids)
        assert not ended[:-1].any() and (ended[-1] or length == sampling.max_new_tokens)
        assert (row[length:] == -1).all()
    if scores is not None:
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    return found.lengths


def greedy_stops(pair, mask: np.ndarray) -> tuple[int, ...]:
    """Stop tokens that end the greedy texts of the sequences at different steps."""
    tokens = generate(pair[0], pair[0].embed(IDS), mask, Sampling(NEW)).tokens
    return int(tokens[0, 4]), int(tokens[1, 9])


@pytest.mark.parametrize("mask", [ALL, LEFT], ids=["even", "padded"])
def test_greedy_equals_transformers(pair, mask):
    check(pair, mask, Sampling(NEW), embeds=True)
    lengths = check(pair, mask, Sampling(NEW, stop_ids=greedy_stops(pair, mask)))
    assert lengths[0] <= 5 and lengths[1] <= 10


def test_greedy_with_penalty_and_minimum_equals_transformers(qwen3):
    stops = greedy_stops(qwen3, ALL)
    check(qwen3, ALL, Sampling(NEW, repetition_penalty=1.7, stop_ids=stops), prompt=True)
    check(qwen3, ALL, Sampling(NEW, repetition_penalty=0.6), prompt=True)
    lengths = check(qwen3, LEFT, Sampling(NEW, min_new_tokens=7, stop_ids=stops))
    assert (lengths > 7).all()


@pytest.mark.parametrize(
    "more",
    [
        {"beams": 2},
        {"beams": 3, "length_penalty": 0.0},
        {"beams": 4, "length_penalty": 2.0},
        {"beams": 3, "length_penalty": -1.0, "min_new_tokens": 5},
    ],
    ids=str,
)
def test_beams_equal_transformers(qwen3, more):
    few = Sampling(NEW, stop_ids=greedy_stops(qwen3, LEFT), **more)
    check(qwen3, LEFT, few, embeds=True)
    many = dataclasses.replace(few, stop_ids=tuple(range(0, V, 4)))  # ends are everywhere
    lengths = check(qwen3, LEFT, many)
    assert lengths.min() < NEW or more.get("length_penalty", 1) > 0  # which prefers long texts


def test_beams_of_other_families_and_with_a_penalty_equal_transformers(pair):
    check(pair, ALL, Sampling(NEW, beams=3, repetition_penalty=1.4, stop_ids=(5, 77, 200)), prompt=True)


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9, "temperature": 0.7}, {"top_k": 10**6}]
)
def test_filters_equal_those_of_transformers(more):
    sampling = Sampling(NEW, **{"temperature": 1.3} | more)
    logits = np.random.default_rng(1).normal(0, 3, (4, V)).astype(np.float32)
    expected = processors.TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(logits))
    if sampling.top_k is not None:
        expected = processors.TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = processors.TopPLogitsWarper(sampling.top_p)(None, expected)
    found = np.asarray(restrict(jnp.asarray(logits), sampling))
    np.testing.assert_allclose(jax.nn.softmax(found), torch.softmax(expected, -1), atol=1e-6)
    assert ((found == -np.inf) == np.isneginf(expected.numpy())).all()


def test_the_penalty_equals_that_of_transformers():
    logits = np.random.default_rng(1).normal(0, 3, (B, V)).astype(np.float32)
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, IDS, True, axis=1)
    found = adjust(jnp.asarray(logits), jnp.asarray(seen), jnp.int32(0), Sampling(NEW, repetition_penalty=1.3))
    expected = processors.RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(IDS).long(), torch.from_numpy(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_draws_are_a_function_of_seed_step_and_row(qwen3):
    model = fuse_for_decoding(qwen3[0])
    embeds = model.embed(IDS)
    drawn = Sampling(NEW, temperature=1.5, top_p=0.95, seed=3)
    first, again = (generate(model, embeds, LEFT, drawn) for _ in range(2))
    other = generate(model, embeds, LEFT, dataclasses.replace(drawn, seed=4))
    assert (first.tokens == again.tokens).all() and (first.tokens != other.tokens).any()
    alone = generate(model, embeds[:1], LEFT[:1], drawn)
    assert (alone.tokens == first.tokens[:1]).all()


def test_draws_follow_the_distribution(qwen3):
    model = fuse_for_decoding(qwen3[0])
    n = 512
    embeds = jnp.broadcast_to(model.embed(IDS[:1]), (n, T, model.config.width))
    sampling = Sampling(1, temperature=0.8, top_k=4)
    tokens = generate(model, embeds, np.ones((n, T), bool), sampling).tokens[:, 0]
    logits = logits_of(model, IDS[:1])[0, -1]
    wanted = np.asarray(jax.nn.softmax(restrict(logits, sampling)))
    assert np.abs(np.bincount(tokens, minlength=V) / n - wanted).max() < 0.08


def test_scores_are_the_likelihoods_that_score_finds(qwen3):
    ours = qwen3[0]
    embeds = ours.embed(IDS)
    found = generate(ours, embeds, LEFT, Sampling(NEW, stop_ids=greedy_stops(qwen3, LEFT)))
    written = found.tokens >= 0
    again = score(ours, embeds, LEFT, found.tokens[:, None], written[:, None])
    np.testing.assert_allclose(again[:, 0], found.scores, rtol=1e-5)


@pytest.mark.parametrize("budget", [None, 5 * V])
def test_score_equals_transformers_one_by_one(pair, budget, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(module, "LOGITS", budget)
        module._programs.cache_clear()
    ours, model = pair
    rng = np.random.default_rng(2)
    targets = rng.integers(3, V, (B, 5, 7))
    lengths = rng.integers(1, 8, (B, 5))
    lengths[0, 0], lengths[1, 1] = 1, 7
    target_mask = np.arange(7) < lengths[..., None]
    found = score(ours, ours.embed(IDS), LEFT, targets, target_mask)
    for b in range(B):
        for c in range(5):
            prompt, target = IDS[b][LEFT[b]], targets[b, c, : lengths[b, c]]
            with torch.no_grad():
                logits = model(torch.from_numpy(np.concatenate([prompt, target]))[None].long()).logits[0]
            likelihoods = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].numpy()
            assert found[b, c] == pytest.approx(likelihoods[np.arange(len(target)), target].sum(), rel=1e-5)
    module._programs.cache_clear()


def test_prompts_of_many_lengths_share_programs(qwen3):
    model = fuse_for_decoding(qwen3[0])
    embeds = model.embed(np.tile(IDS, 3))

    def write(tokens: int, new: int) -> None:
        for sampling in (Sampling(new), Sampling(new, beams=2)):
            generate(model, embeds[:, :tokens], np.ones((B, tokens), bool), sampling)

    write(25, 9)
    with CompileCounter() as counter:
        for tokens, new in ((26, 10), (29, 12), (32, 11)):
            write(tokens, new)
    shapes = 3  # padding the embeddings, which knows each length
    assert counter.count <= 2 * shapes


def test_the_loop_ends_with_its_last_text_and_writes_the_cache_in_place(qwen3):
    """Were the cache copied at each step, a program of more slots would hold it twice."""
    model = fuse_for_decoding(qwen3[0])
    fixed = Sampling(8)

    def memory(slots: int):
        held = jax.eval_shape(lambda: model.empty_cache(2, slots))
        arguments = jax.ShapeDtypeStruct((2, V), np.float32), held, None, np.int32(8), np.uint32(0), fixed
        return module._programs().write.lower(model, *arguments).compile().memory_analysis()

    few, many = memory(128), memory(1024)
    cache = 2 * 2 * 2 * 2 * (1024 - 128) * 16 * 4  # keys and values, layers, heads, sequences
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < 0.2 * cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, packed_matmul.MAX_ROWS + 1])
def test_a_decoder_fused_for_decoding_computes_the_same(decoder_folder, dtype, rows):
    decoder = load_decoder(decoder_folder("qwen2", num_hidden_layers=1), dtype=dtype, compute_dtype="float32")
    model = fuse_for_decoding(decoder)
    assert fuse_for_decoding(model) is model
    tokens = np.tile(IDS, (6, 1))[:rows, :1]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), decoder)  # bfloat16 weights, as exact
    np.testing.assert_allclose(logits_of(model, tokens), logits_of(wide, tokens), atol=2e-5)


def test_bfloat16_agrees_with_the_decoder_that_trains(decoder_folder):
    decoder = load_decoder(decoder_folder("qwen3"), compute_dtype="bfloat16")
    found, expected = logits_of(fuse_for_decoding(decoder), IDS), logits_of(decoder, IDS)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_adapters_are_merged(qwen3):
    lora = LoRAConfig(rank=2, targets=("q_proj", "down_proj"))
    decoder = init_decoder(qwen3[0].config, 0, lora=lora)
    decoder = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), decoder)
    np.testing.assert_allclose(logits_of(fuse_for_decoding(decoder), IDS), logits_of(decoder, IDS), atol=2e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_logits_that_are_not_finite_end_it_by_name(qwen3, beams):
    ours = qwen3[0]
    written = generate(ours, ours.embed(IDS), LEFT, Sampling(NEW)).tokens[1]
    model = fuse_for_decoding(ours)
    model.embedding.embedding[...] = model.embedding.embedding[...].at[int(written[0])].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="sequence 1 are not finite at step 1"):
        generate(model, ours.embed(IDS)[:2], LEFT[:2], Sampling(NEW, beams=beams))
    embeds = ours.embed(IDS).at[2, -1].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="sequence 2 are not finite at step 0"):
        generate(ours, embeds, LEFT, Sampling(NEW, beams=beams))
    with pytest.raises(FloatingPointError, match="continuation 0 of sequence 2"):
        score(ours, embeds, LEFT, IDS[:, None], ALL[:, None])


def test_what_stands_at_padding_changes_nothing(qwen3):
    ours = qwen3[0]
    embeds = jnp.where(LEFT[..., None], ours.embed(IDS), jnp.nan)
    found, expected = (generate(ours, x, LEFT, Sampling(NEW)) for x in (embeds, ours.embed(IDS)))
    assert (found.tokens == expected.tokens).all()


def test_prompts_that_do_not_fit_are_refused(qwen3):
    ours = qwen3[0]
    embeds, most = ours.embed(IDS), ours.config.max_positions
    with pytest.raises(ValueError, match=f"are 4 more than the decoder's {most} positions"):
        generate(ours, embeds, LEFT, Sampling(most - T + 4))
    with pytest.raises(ValueError, match="prompt 1 is empty, or padded on the right"):
        generate(ours, embeds, LEFT[:, ::-1], Sampling(NEW))
    with pytest.raises(ValueError, match=r"inputs_embeds have shape \(3, 11, 16\), expected \(3, 11, 32\)"):
        generate(ours, embeds[..., :16], LEFT, Sampling(NEW))
    with pytest.raises(ValueError, match=r"stop_ids \[320\] are not among the 320 tokens"):
        generate(ours, embeds, LEFT, Sampling(NEW, stop_ids=(3, 320)))
    with pytest.raises(ValueError, match="continuation 1 of sequence 2 is empty"):
        score(ours, embeds, LEFT, np.ones((B, 2, 3), int), np.arange(2 * B).reshape(B, 2, 1) < [[[5, 0, 0]]])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8, "stop_ids": (1,)}, "min_new_tokens 9"),
        ({"min_new_tokens": 9}, "without stop_ids"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 0.5}, "with temperature 0"),
        ({"beams": 0}, "beams 0"),
        ({"beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ({"beams": 2, "length_penalty": float("inf")}, "length_penalty inf"),
        ({"length_penalty": 2.0}, "length_penalty 2.0 without beams"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"stop_ids": (-1,)}, "stop_ids"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(more, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**more)
