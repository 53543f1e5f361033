"""Text generation by a decoder (greedy, sampling or beam search, beams.py), and likelihoods of given texts.

    B  sequences of the batch     W  width of the decoder     K  beams of a sequence
    T  tokens of a prompt         V  vocabulary               C  continuations of a prompt
    U  slots of the cache                                     L  tokens of a continuation

A prompt is given as embeddings, through which a slide enters. Prompts of different lengths are left-padded. Their
length and that of the answer are rounded up to a few sizes (`bucket`), so that a handful of compiled programs suffices.
"""

import dataclasses
from functools import cache as memoize
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.llm import beams
from pathflip_jax.llm.decoder import Cache, CausalDecoder, Decoder
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.llm.serving import ServingDecoder, fuse_for_decoding
from pathflip_jax.runtime.buckets import bucket
from pathflip_jax.runtime.compilation import compiler_options

LOGITS = 2**26  # most logits held in memory while continuations are scored: 256 MB


class Generated(NamedTuple):
    """Texts as ids, -1 after their ends; `lengths` include the stop token that ended a text.

    `scores` are summed log likelihoods of the unmodified logits; with beams the scores that beam search compares.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]
    scores: Float[np.ndarray, "B"]


class Texts(NamedTuple):
    """Loop state. `seen` marks the tokens of prompt and text if there is a repetition penalty.

    `fault` is the first step whose logits were not finite, -1 without one.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    ended: Bool[Array, "B"]
    scores: Float[Array, "B"]
    seen: Bool[Array, "B V"] | None
    fault: Int[Array, "B"]


def generate(
    decoder: Decoder | ServingDecoder,
    inputs_embeds: Float[Array, "B T W"],
    mask: Bool[Array, "B T"],
    sampling: Sampling,
    *,
    prompt_tokens: Int[Array, "B T"] | None = None,
) -> Generated:
    """Continue each prompt until a stop token or `max_new_tokens`.

    `mask` is False at padding, which is on the left. `prompt_tokens` are the ids of the prompt where there are any, -1
    elsewhere: the repetition penalty counts them. For repeated calls pass `fuse_for_decoding(decoder)`, which is
    otherwise computed in each call. Draws are a function of the seed, the step and the row.

    Raises ValueError for prompts that are empty, padded elsewhere or, with the answer, too long for the decoder, and
    FloatingPointError naming sequence and step where logits are not finite.
    """
    mask = _check_prompt(decoder, inputs_embeds, mask, sampling.max_new_tokens)
    V = decoder.config.vocab_size
    if unknown := [token for token in sampling.stop_ids if token >= V]:
        raise ValueError(f"stop_ids {unknown} are not among the {V} tokens of the decoder; pass ids of its tokenizer")
    model = fuse_for_decoding(decoder)
    room = bucket(sampling.max_new_tokens)
    logits, held = _prefill(model, inputs_embeds, mask, room * sampling.beams)
    seen = None
    if sampling.repetition_penalty != 1:
        known = np.full((len(mask), 1), -1) if prompt_tokens is None else np.asarray(prompt_tokens)
        seen = np.zeros((len(mask), V + 1), bool)
        np.put_along_axis(seen, np.where(known < 0, V, known), True, axis=1)
        seen = jnp.asarray(seen[:, :V])
    # Values that vary between calls are kept out of the compiled program.
    fixed = dataclasses.replace(sampling, max_new_tokens=room, seed=0)
    limit, seed = np.int32(sampling.max_new_tokens), np.uint32(sampling.seed % 2**32)
    run = _programs().search if sampling.beams > 1 else _programs().write
    (tokens, lengths, scores, fault), _ = run(model, logits, held, seen, limit, seed, fixed)
    _check_finite(np.asarray(fault))
    tokens = np.asarray(tokens)[:, : sampling.max_new_tokens]
    return Generated(tokens, np.asarray(lengths), np.asarray(scores))


def score(
    decoder: Decoder | ServingDecoder,
    inputs_embeds: Float[Array, "B T W"],
    mask: Bool[Array, "B T"],
    targets: Int[Array, "B C L"],
    target_mask: Bool[Array, "B C L"],
) -> Float[np.ndarray, "B C"]:
    """Log likelihood of each continuation of its prompt, summed over its tokens.

    The prompt is read once for all its continuations. `mask` and errors are as in `generate`; `target_mask` is
    False at padding, which is on the right. Also raises ValueError for a continuation without tokens.
    """
    target_mask, targets = np.asarray(target_mask, bool), np.asarray(targets)
    B, C, L = target_mask.shape
    mask = _check_prompt(decoder, inputs_embeds, mask, int(target_mask.sum(2).max()))
    bad = ~target_mask[:, :, 0] | (target_mask[:, :, 1:] > target_mask[:, :, :-1]).any(2)
    if bad.any():
        b, c = np.argwhere(bad)[0]
        raise ValueError(f"continuation {c} of sequence {b} is empty or padded on the left; pad on the right")
    pad = ((0, 0), (0, bucket(C) - C), (0, bucket(L) - L))
    targets, target_mask = (np.pad(np.where(target_mask, targets, 0), pad), np.pad(target_mask, pad))
    model = fuse_for_decoding(decoder)
    logits, held = _prefill(model, inputs_embeds, mask, targets[0].size)
    found, _ = _programs().score(model, logits, held, targets.astype(np.int32), target_mask)
    found = np.asarray(found)[:, :C]
    if not np.isfinite(found).all():
        b, c = np.argwhere(~np.isfinite(found))[0]
        raise FloatingPointError(f"the likelihood of continuation {c} of sequence {b} is {found[b, c]}; {_CURE}")
    return found


def adjust(
    logits: Float[Array, "... V"], seen: Bool[Array, "... V"] | None, step: Int[Array, ""], sampling: Sampling
) -> Float[Array, "... V"]:
    """Logits after the repetition penalty, with stop tokens disabled before `min_new_tokens`."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.min_new_tokens:
        early = logits.at[..., jnp.array(sampling.stop_ids)].set(-jnp.inf)
        logits = jnp.where(step < sampling.min_new_tokens, early, logits)
    return logits


def restrict(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    """Logits divided by the temperature, -inf at tokens outside `top_k` and `top_p`."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kept = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < kept[..., -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)
        left_out = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) <= 1 - sampling.top_p
        first = jnp.minimum(left_out.sum(-1, keepdims=True), logits.shape[-1] - 1)
        logits = jnp.where(logits < jnp.take_along_axis(ordered, first, -1), -jnp.inf, logits)
    return logits


_CURE = "weights or inputs contain inf or NaN, or compute_dtype float16 overflows (use bfloat16 or float32)"


def _check_finite(fault: Int[np.ndarray, "B"]) -> None:
    if (fault >= 0).any():
        b = int(np.argmax(fault >= 0))
        raise FloatingPointError(f"the logits of sequence {b} are not finite at step {fault[b]}; {_CURE}")


def _check_prompt(decoder: CausalDecoder, inputs_embeds: Array, mask: Array, new: int) -> Bool[np.ndarray, "B T"]:
    mask = np.asarray(mask, bool)
    wanted = (*mask.shape, decoder.config.width)
    if tuple(inputs_embeds.shape) != wanted:
        raise ValueError(
            f"inputs_embeds have shape {tuple(inputs_embeds.shape)}, expected {wanted} from mask and decoder"
        )
    if not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        b = int(np.argmax(~mask[:, -1] | (mask[:, 1:] < mask[:, :-1]).any(1)))
        raise ValueError(f"prompt {b} is empty, or padded on the right or in the middle; pad prompts on the left")
    longest, most = int(mask.sum(1).max()), decoder.config.max_positions
    if longest + new > most:
        raise ValueError(
            f"{longest} prompt tokens and {new} new ones are {longest + new - most} more than the decoder's {most} "
            "positions; shorten the prompt or generate fewer tokens"
        )
    return mask


def _prefill(model: ServingDecoder, inputs_embeds: Array, mask: Bool[np.ndarray, "B T"], room: int):
    """Logits after each prompt, and the cache with `room` additional slots."""
    missing = bucket(mask.shape[1]) - mask.shape[1]
    embeds = jnp.pad(jnp.asarray(inputs_embeds), ((0, 0), (missing, 0), (0, 0)))
    return _programs().prefill(model, embeds, np.pad(mask, ((0, 0), (missing, 0))), room)


class _Programs(NamedTuple):
    prefill: jax.stages.Wrapped
    write: jax.stages.Wrapped
    search: jax.stages.Wrapped
    score: jax.stages.Wrapped


@memoize
def _programs() -> _Programs:
    """Compiled functions, created at the first call, since options depend on the backend.

    The cache is donated and returned, so that it is updated in place.
    """
    compiled = partial(jax.jit, compiler_options=compiler_options())
    return _Programs(
        compiled(read_prompt, static_argnums=3),
        compiled(write_texts, static_argnums=6, donate_argnums=2),
        compiled(_search, static_argnums=6, donate_argnums=2),
        compiled(_score, donate_argnums=2),
    )


def read_prompt(model: ServingDecoder, embeds: Array, mask: Array, room: int) -> tuple[Float[Array, "B V"], Cache]:
    """Prefill program of `generate`: the logits after each prompt, and the cache with `room` additional slots."""
    held = model.empty_cache(len(mask), mask.shape[1] + room)
    # Attention gives padding zero weight, but zero times NaN is NaN.
    states, held = model.states(inputs_embeds=jnp.where(mask[..., None], embeds, 0), mask=mask, cache=held)
    return model.logits(states[:, -1:])[:, 0], held


def write_texts(model, logits, held: Cache, seen, limit, seed, sampling: Sampling):
    """Decoding program of `generate`: the content of `Texts` at the end, and the cache."""
    B, rows = len(logits), jnp.arange(len(logits))
    key = jax.random.key(seed)

    def choose(texts: Texts, logits: Float[Array, "B V"]) -> Texts:
        """Append a token to each text that has not ended."""
        step, ended = texts.step, texts.ended
        finite = jnp.isfinite(logits).all(-1)
        adjusted = adjust(logits, texts.seen, step, sampling)
        if sampling.temperature == 0:
            token = adjusted.argmax(-1)
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), rows)
            token = jax.vmap(jax.random.categorical)(keys, restrict(adjusted, sampling))
        token = token.astype(jnp.int32)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return Texts(
            step + 1,
            texts.tokens.at[:, step].set(jnp.where(ended, -1, token)),
            texts.lengths + ~ended,
            ended | jnp.isin(token, jnp.array(sampling.stop_ids, jnp.int32)),
            texts.scores + jnp.where(ended, 0, likelihood),
            None if texts.seen is None else texts.seen.at[rows, token].set(True),
            jnp.where(~finite & ~ended & (texts.fault < 0), step, texts.fault),
        )

    def more(carry: tuple[Texts, Cache]) -> Bool[Array, ""]:
        texts = carry[0]
        return (texts.step < limit) & ~texts.ended.all() & (texts.fault < 0).all()

    def write(carry: tuple[Texts, Cache]) -> tuple[Texts, Cache]:
        texts, held = carry
        last = jnp.maximum(lax.dynamic_slice_in_dim(texts.tokens, texts.step - 1, 1, axis=1), 0)
        logits, held = model(last, cache=held)
        return choose(texts, logits[:, 0]), held

    tokens = jnp.full((B, sampling.max_new_tokens), -1, jnp.int32)
    zeros = jnp.zeros(B, jnp.int32)
    texts = Texts(jnp.int32(0), tokens, zeros, zeros > 0, jnp.zeros(B), seen, zeros - 1)
    texts, held = lax.while_loop(more, write, (choose(texts, logits), held))
    return (texts.tokens, texts.lengths, texts.scores, texts.fault), held


def _search(model, logits, held: Cache, seen, limit, seed, sampling: Sampling):
    """Beam search: the beams of a sequence are tokens side by side, each attending to the prompt and its ancestors.

    Beams thus share the prompt's keys and values, and no slot of the cache is ever copied: a beam that continues
    another inherits its visible slots.
    """
    B, K, rows = len(logits), sampling.beams, jnp.arange(len(logits))[:, None]
    start, length = held.filled, held.mask.sum(1, keepdims=True)

    def choose(state: beams.Beams, logits: Float[Array, "B K V"]) -> tuple[beams.Beams, Int[Array, "B K"]]:
        likelihoods = adjust(jax.nn.log_softmax(logits), state.seen, state.step, sampling)
        return beams.advance(state, likelihoods, jnp.isfinite(logits).all((1, 2)), limit, sampling)

    def search(carry):
        state, parents, sees, held = carry
        own = start + (state.step - 1) * K + jnp.arange(K)
        sees = sees[rows, parents].at[:, jnp.arange(K), own].set(True)
        positions = jnp.broadcast_to(length + state.step - 1, (B, K))
        last = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=2)[:, :, 0]
        states, held = model.states(last, cache=held, positions=positions, visible=sees)
        state, parents = choose(state, model.logits(states))
        return state, parents, sees, held

    sees = jnp.broadcast_to(held.mask[:, None], (B, K, held.mask.shape[1]))
    state = beams.start(B, K, sampling.max_new_tokens, seen)
    state, parents = choose(state, jnp.broadcast_to(logits[:, None], (B, K, logits.shape[-1])))
    state, _, _, held = lax.while_loop(lambda carry: carry[0].going_on, search, (state, parents, sees, held))
    return (*beams.best(state), state.fault), held


def _score(model, logits, held: Cache, targets: Int[Array, "B C L"], target_mask: Bool[Array, "B C L"]):
    B, C, L = targets.shape
    n = C * L
    start, length = held.filled, held.mask.sum(1)
    place = jnp.arange(n)
    same = (place[:, None] // L == place // L) & (place[:, None] >= place)  # [C L, C L]
    sees = jnp.broadcast_to(held.mask[:, None], (B, n, held.mask.shape[1]))
    sees = lax.dynamic_update_slice(sees, jnp.broadcast_to(same, (B, n, n)), (0, 0, start))
    positions = length[:, None] + place % L
    states, held = model.states(targets.reshape(B, n), cache=held, positions=positions, visible=sees)

    def likelihood(after: tuple[Float[Array, "W"], Int[Array, ""]]) -> Float[Array, ""]:
        logits = model.logits(after[0][None, None])[0, 0]
        return jax.nn.log_softmax(logits)[after[1]]

    # The state at a token scores the next one; the prompt's last logits score the first.
    states, following = states.reshape(B, C, L, -1)[:, :, :-1], targets[:, :, 1:]
    pairs = states.reshape(B * C * (L - 1), -1), following.reshape(-1)
    found = lax.map(likelihood, pairs, batch_size=max(1, LOGITS // model.config.vocab_size)) if L > 1 else jnp.zeros(0)
    first = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, 0], axis=1)
    rest = jnp.where(target_mask[:, :, 1:], found.reshape(B, C, L - 1), 0)
    return jnp.where(target_mask[:, :, 0], first, 0) + rest.sum(-1), held
