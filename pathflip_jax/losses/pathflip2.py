"""The losses of PathFLIP2, as pure functions of arrays: sigmoid losses over pairs (SigLIP, arXiv 2303.15343).

Both run over the global batch, as those of `losses/pathflip.py`, and treat related slides alike: neither positives nor
negatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pathflip_jax.losses.pathflip import Scalar, Spread, at_once, log_sigmoid, negative_pairs, normalise, unrelated
from pathflip_jax.settings.networks import SigmoidLossConfig


def sigmoid_slide_loss(
    slides: Float[Array, "B D"],
    captions: Float[Array, "B D"],
    related: Int[Array, "B ..."],
    scale: Scalar,
    bias: Scalar,
) -> Float[Array, ""]:
    """SigLIP: every pair of slide and caption is a match or none; the sum over pairs, divided by the slides."""
    same = jnp.eye(len(slides), dtype=bool)
    cosine = normalise(slides) @ normalise(captions).T
    terms = -log_sigmoid(cosine, jnp.where(same, 1.0, -1.0), scale, bias)
    return jnp.sum(jnp.where(negative_pairs(related) | same, terms, 0)) / len(slides)


class _Slides(NamedTuple):
    """All slides of the batch, or those of one device: which they are, and what their texts pooled of them."""

    number: Int[Array, "n"]
    related: Int[Array, "n S"]
    wording: Int[Array, "n K"] | None
    pooled: Float[Array, "n K D"]


class _Everyone(NamedTuple):
    """The texts of all slides of the batch, and what the slides are to each other."""

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
    spread: Spread = at_once,
    wording: Int[Array, "B K"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sigmoid loss between every text-conditioned embedding and every subcaption: the mean over pairs, and cosines.

    `pooled[i, k]` is what subcaption k of slide i pooled of it, and matches that subcaption alone: others of the slide
    are negatives too, as published; subcaptions of other slides that read like one of its own (equal `wording`) are
    not. Both directions of the published loss are this one sum. With n slides on a device
    and C = `config.slides_at_once` slides at a time, the largest array is [n, K, C, K]; subcaptions are gathered once.
    """
    B, K, _ = texts.shape

    def score(slides: _Slides, everyone: _Everyone, whole: tuple) -> tuple[Array, ...]:
        return _sums(slides, everyone, *whole, config.slides_at_once or B)

    wording = None if wording is None else jnp.asarray(wording)
    everyone = _Everyone(normalise(texts), jnp.asarray(related).reshape(B, -1), wording)
    found = spread(score, _Slides(jnp.arange(B), *everyone[1:], normalise(pooled)), everyone, (scale, bias))
    total, count, positive, negative = (jnp.sum(x) for x in found)
    cosines = {"cosine_positive": positive / (B * K), "cosine_negative": negative / jnp.maximum(count - B * K, 1)}
    return total / count, cosines


def _sums(
    slides: _Slides, everyone: _Everyone, scale: Scalar, bias: Scalar, chunk: int
) -> tuple[Float[Array, "n"], ...]:
    """Of each slide's pairs with the texts of all: the terms, how many count, the cosines of matches and of others.

    Chunks are computed again for the gradient, so that only one stands in memory at a time.
    """
    B, K, _ = everyone.texts.shape

    def one(numbers: Int[Array, "C"]):
        there = numbers < B
        numbers = jnp.minimum(numbers, B - 1)
        own = slides.number[:, None] == numbers[None]  # [n, C]
        counted = (unrelated(slides.related[:, None], everyone.related[numbers][None]) | own) & there[None]
        counted = jnp.broadcast_to(counted[..., None], (*counted.shape, K))  # [n, C, K]
        if everyone.wording is not None:
            other = unrelated(slides.wording[:, None, None], everyone.wording[numbers][None, ..., None])
            counted &= other | own[..., None]
        match = own[:, None, :, None] & jnp.eye(K, dtype=bool)[None, :, None]  # [n, K, C, K]
        cosine = jnp.einsum("nkd,cjd->nkcj", slides.pooled, everyone.texts[numbers], precision="highest")
        terms = -log_sigmoid(cosine, jnp.where(match, 1.0, -1.0), scale, bias)
        weight = jnp.broadcast_to(counted[:, None], cosine.shape).astype(cosine.dtype)
        matched = match & there[None, None, :, None]
        sums = terms * weight, weight, jnp.where(matched, cosine, 0), jnp.where(matched, 0, cosine * weight)
        return tuple(x.sum((1, 2, 3)) for x in sums)

    chunks = -(-B // chunk)
    if chunks <= 1:
        return one(jnp.arange(B))
    numbers = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    return tuple(jnp.sum(x, axis=0) for x in jax.lax.map(jax.checkpoint(one), numbers))


def pairs_bytes(config: SigmoidLossConfig, slides: int, batch_size: int, subcaptions: int) -> int:
    """Bytes of the largest array of `pair_loss` on a device of `slides` slides of a batch, in float32."""
    texts = min(config.slides_at_once or batch_size, batch_size)
    return 4 * slides * texts * subcaptions**2 if config.region_weight else 0
