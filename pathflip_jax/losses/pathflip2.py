"""Losses of PathFLIP2, as pure functions of arrays: pairwise sigmoid losses (SigLIP, arXiv 2303.15343).

Both run over the global batch, like those of `losses/pathflip.py`, and treat related slides in the same way: as neither
positives nor negatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pathflip_jax.losses.pathflip import Scalar, ShardMap, log_sigmoid, negative_pairs, normalise, unrelated, unsharded
from pathflip_jax.settings.networks import SigmoidLossConfig


def sigmoid_slide_loss(
    slides: Float[Array, "B D"],
    captions: Float[Array, "B D"],
    related: Int[Array, "B ..."],
    scale: Scalar,
    bias: Scalar,
) -> Float[Array, ""]:
    """SigLIP loss over all slide-caption pairs: the sum over pairs divided by the number of slides."""
    same = jnp.eye(len(slides), dtype=bool)
    cosine = normalise(slides) @ normalise(captions).T
    terms = -log_sigmoid(cosine, jnp.where(same, 1.0, -1.0), scale, bias)
    return jnp.sum(jnp.where(negative_pairs(related) | same, terms, 0)) / len(slides)


class _Local(NamedTuple):
    """Slides of the whole batch or of one device: their indices and their text-conditioned embeddings."""

    number: Int[Array, "n"]
    related: Int[Array, "n S"]
    wording: Int[Array, "n K"] | None
    pooled: Float[Array, "n K D"]


class _Gathered(NamedTuple):
    """Texts of all slides of the batch, and the relations between the slides."""

    texts: Float[Array, "B K D"]
    related: Int[Array, "B S"]
    wording: Int[Array, "B K"] | None


def pair_loss(
    pooled: Float[Array, "B K D"],
    texts: Float[Array, "B K D"],
    related: Int[Array, "B ..."],
    scale: Scalar,
    bias: Scalar,
    config: SigmoidLossConfig,
    shard_map: ShardMap = unsharded,
    wording: Int[Array, "B K"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean sigmoid loss over all pairs of text-conditioned embedding and subcaption, with mean cosines as metrics.

    `pooled[i, k]` is the embedding of slide i conditioned on its subcaption k, and matches that subcaption alone: the
    slide's other subcaptions are negatives too, as published; subcaptions of other slides with the same text as one of
    its own (equal `wording`) are not. Both directions of the published loss reduce to this one sum. With n slides per
    device and C = `config.slides_at_once` slides at a time, the largest array is [n, K, C, K]; subcaptions are gathered
    once.
    """
    B, K, _ = texts.shape

    def score(local: _Local, gathered: _Gathered, replicated: tuple) -> tuple[Array, ...]:
        return _sums(local, gathered, *replicated, config.slides_at_once or B)

    wording = None if wording is None else jnp.asarray(wording)
    gathered = _Gathered(normalise(texts), jnp.asarray(related).reshape(B, -1), wording)
    found = shard_map(score, _Local(jnp.arange(B), *gathered[1:], normalise(pooled)), gathered, (scale, bias))
    total, count, positive, negative = (jnp.sum(x) for x in found)
    cosines = {"cosine_positive": positive / (B * K), "cosine_negative": negative / jnp.maximum(count - B * K, 1)}
    return total / count, cosines


def _sums(local: _Local, gathered: _Gathered, scale: Scalar, bias: Scalar, chunk: int) -> tuple[Float[Array, "n"], ...]:
    """Per-slide sums over its pairs with all texts: loss terms, pair counts, cosines of matches and of non-matches.

    Chunks are rematerialised in the backward pass, so that only one is in memory at a time.
    """
    B, K, _ = gathered.texts.shape

    def chunk_sums(numbers: Int[Array, "C"]):
        real = numbers < B  # the last chunk may be padded
        numbers = jnp.minimum(numbers, B - 1)
        own = local.number[:, None] == numbers[None]  # [n, C]
        counted = (unrelated(local.related[:, None], gathered.related[numbers][None]) | own) & real[None]
        counted = jnp.broadcast_to(counted[..., None], (*counted.shape, K))  # [n, C, K]
        if gathered.wording is not None:
            other = unrelated(local.wording[:, None, None], gathered.wording[numbers][None, ..., None])
            counted &= other | own[..., None]
        match = own[:, None, :, None] & jnp.eye(K, dtype=bool)[None, :, None]  # [n, K, C, K]
        cosine = jnp.einsum("nkd,cjd->nkcj", local.pooled, gathered.texts[numbers], precision="highest")
        terms = -log_sigmoid(cosine, jnp.where(match, 1.0, -1.0), scale, bias)
        weight = jnp.broadcast_to(counted[:, None], cosine.shape).astype(cosine.dtype)
        matched = match & real[None, None, :, None]
        sums = terms * weight, weight, jnp.where(matched, cosine, 0), jnp.where(matched, 0, cosine * weight)
        return tuple(x.sum((1, 2, 3)) for x in sums)

    chunks = -(-B // chunk)
    if chunks <= 1:
        return chunk_sums(jnp.arange(B))
    numbers = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    return tuple(jnp.sum(x, axis=0) for x in jax.lax.map(jax.checkpoint(chunk_sums), numbers))


def pairs_bytes(config: SigmoidLossConfig, slides: int, batch_size: int, subcaptions: int) -> int:
    """Bytes of the largest float32 array of `pair_loss` on a device that holds `slides` slides of a batch."""
    texts = min(config.slides_at_once or batch_size, batch_size)
    return 4 * slides * texts * subcaptions**2 if config.region_weight else 0
