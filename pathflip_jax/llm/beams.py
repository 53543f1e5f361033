"""Beam-search state: running hypotheses, finished ones, and the bound that ends the search.

As in transformers with early_stopping=False, whose results it reproduces token for token; letters as in generate.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.llm.sampling import Sampling

MASKED_SCORE = -1e9  # score of disallowed choices


class Beams(NamedTuple):
    """Running texts with summed log likelihoods, and the best finished ones with their scores.

    `open` is whether a running text of the sequence may still beat its finished ones; `seen` and `fault` as in
    `generate.Texts`.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B K N"]
    sums: Float[Array, "B K"]
    ended_tokens: Int[Array, "B K N"]
    ended_lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    has_ended: Bool[Array, "B K"]
    open: Bool[Array, "B"]
    going_on: Bool[Array, ""]
    seen: Bool[Array, "B K V"] | None
    fault: Int[Array, "B"]


def start(B: int, K: int, N: int, seen: Bool[Array, "B V"] | None) -> Beams:
    """Initial state without text. All but the first beam are disabled, since all are identical at first."""
    tokens, never = jnp.full((B, K, N), -1, jnp.int32), jnp.full((B, K), MASKED_SCORE)
    no = jnp.zeros((B, K), bool)
    return Beams(
        jnp.int32(0), tokens, never.at[:, 0].set(0), tokens, jnp.zeros((B, K), jnp.int32), never, no,
        jnp.ones(B, bool), jnp.array(True), None if seen is None else jnp.repeat(seen[:, None], K, axis=1),
        jnp.full(B, -1, jnp.int32),
    )  # fmt: skip


def advance(
    beams: Beams,
    likelihoods: Float[Array, "B K V"],
    finite: Bool[Array, "B"],
    limit: Int[Array, ""],
    sampling: Sampling,
) -> tuple[Beams, Int[Array, "B K"]]:
    """Extend each text by its likeliest next tokens; returns the new beams, and the beam that each continues."""
    B, K, V = likelihoods.shape
    step = beams.step
    # Enough candidates that K of them do not end, whatever stop tokens are among them.
    kept = min(max(2, 1 + len(sampling.stop_ids)) * K, K * V)
    sums, places = lax.top_k((likelihoods + beams.sums[:, :, None]).reshape(B, K * V), kept)
    parents, token = places // V, (places % V).astype(jnp.int32)
    tokens = _pick(beams.tokens, parents).at[:, :, step].set(token)
    ends = jnp.isin(token, jnp.array(sampling.stop_ids, jnp.int32)) | (step + 1 >= limit)

    running, chosen = lax.top_k(sums + ends * MASKED_SCORE, K)
    length = (step + 1).astype(jnp.float32)
    candidates = sums / length**sampling.length_penalty
    counts = ends & (jnp.arange(kept) < K)  # the others only ensure that enough beams continue
    candidates = candidates + ~beams.open[:, None] * MASKED_SCORE + ~counts * MASKED_SCORE
    scores, best = lax.top_k(jnp.concatenate([beams.scores, candidates], axis=1), K)
    ended_tokens = _pick(jnp.concatenate([beams.ended_tokens, tokens], axis=1), best)
    lengths = jnp.concatenate([beams.ended_lengths, jnp.full((B, kept), step + 1)], axis=1)
    has_ended = _pick(jnp.concatenate([beams.has_ended, counts], axis=1), best)

    worst = jnp.where(has_ended, scores.min(1, keepdims=True), MASKED_SCORE)
    possible = running[:, :1] / length**sampling.length_penalty
    may_improve = beams.open & (possible > worst).any(1)
    parents = _pick(parents, chosen)
    seen = beams.seen
    if seen is not None:
        rows = jnp.arange(B)[:, None]
        seen = _pick(seen, parents).at[rows, jnp.arange(K), _pick(token, chosen)].set(True)
    fault = jnp.where(~finite & beams.open & (beams.fault < 0), step, beams.fault)
    going_on = may_improve.any() & ~ends.all() & (fault < 0).all()
    after = Beams(
        step + 1, _pick(tokens, chosen), running, ended_tokens, _pick(lengths, best), scores, has_ended,
        may_improve, going_on, seen, fault,
    )  # fmt: skip
    return after, parents


def best(beams: Beams) -> tuple[Int[Array, "B N"], Int[Array, "B"], Float[Array, "B"]]:
    """Best text of each sequence, its length and its score."""
    return beams.ended_tokens[:, 0], beams.ended_lengths[:, 0], beams.scores[:, 0]


def _pick(x: Array, index: Int[Array, "B n"]) -> Array:
    return jax.vmap(lambda row, i: row[i])(x, index)
