"""Alignment losses at slide and region level, as pure functions of arrays (DESIGN section 4).

Both run over the global batch: under jit on a mesh the same code gathers over devices. Pairs of related slides are
neither positives nor negatives: slides of one case, whose reports describe the same tumor, and slides with the same
caption. `related` holds integer ids of what a slide may share with others, its case and its captions: slides with
an id in common are related.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.settings.networks import LossConfig

# texts [B, C, D], regions [B, R, D], region_mask [B, R] -> text-conditioned region embeddings [B, C, D], weights
TextRegionAttention = Callable[[Array, Array, Array], tuple[Array, Array]]
Scalar = Float[Array, ""] | float
# (function, per-slide inputs, inputs of all slides, shared inputs) -> the function's result per slide; see `unsharded`
ShardMap = Callable[..., Any]


class Embeddings(NamedTuple):
    """Embeddings of a batch that the losses compare, before normalisation.

    Subcaptions of equal `wording` have the same text: a slide's own wording is never a negative for its regions.
    """

    slide: Float[Array, "B D"]
    regions: Float[Array, "B R D"]
    region_mask: Bool[Array, "B R"]
    captions: Float[Array, "B D"]
    subcaptions: Float[Array, "B K D"]
    wording: Int[Array, "B K"] | None = None


def normalise(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """L2-normalise the last axis; a zero vector stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def unrelated(one: Int[Array, "*#n S"], other: Int[Array, "*#n T"]) -> Bool[Array, "..."]:
    """Whether slides have no id in common, so that each is a negative for the other."""
    return ~jnp.any(one[..., :, None] == other[..., None, :], axis=(-2, -1))


def negative_pairs(related: Int[Array, "B ..."]) -> Bool[Array, "B B"]:
    """Mask of negative pairs: [i, j] is True where slide j is a negative for slide i."""
    related = jnp.asarray(related).reshape(len(related), -1)
    return unrelated(related[:, None], related[None, :])


def slide_loss(
    slides: Float[Array, "B D"],
    captions: Float[Array, "B D"],
    related: Int[Array, "B ..."],
    *,
    temperature: float = 0.1,
    label_smoothing: float = 0.1,
    soft_targets: float = 0.0,
) -> Float[Array, ""]:
    """InfoNCE between slides and captions, averaged over both directions.

    Label smoothing is spread evenly over a slide's own caption and its negatives, as in torch's cross-entropy;
    `soft_targets`, a share of the target likewise, over the captions by their similarity to the slide's own, at the
    temperature of the loss and without a gradient.
    """
    allowed = negative_pairs(related) | jnp.eye(len(slides), dtype=bool)
    logits = normalise(slides) @ normalise(captions).T / temperature  # [B, B]
    if soft_targets:
        texts = normalise(jax.lax.stop_gradient(captions))
        alike = jax.nn.softmax(jnp.where(allowed, texts @ texts.T / temperature, -jnp.inf), axis=-1)

    def one_direction(logits):
        log_p = jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
        log_p = jnp.where(allowed, log_p, 0.0)
        smoothed = jnp.sum(log_p, axis=-1) / jnp.sum(allowed, axis=-1)
        own = jnp.diagonal(log_p)
        if soft_targets:
            own = (1 - soft_targets) * own + soft_targets * jnp.sum(alike * log_p, axis=-1)
        return -jnp.mean((1 - label_smoothing) * own + label_smoothing * smoothed)

    return (one_direction(logits) + one_direction(logits.T)) / 2


def draw_negatives(key: Array, B: int, K: int) -> Int[Array, "B B"]:
    """Indices of negative subcaptions: [i, j] is the subcaption of slide j shown to slide i, -1 on the diagonal.

    The draw is a function of the key alone and does not depend on the devices.
    """
    return jnp.where(jnp.eye(B, dtype=bool), -1, jax.random.randint(key, (B, B), 0, K))


def unsharded(function: Callable, local: Any, gathered: Any, replicated: Any) -> Any:
    """Unsharded evaluation of function(local, gathered, replicated): all slides on one device.

    `local` and `gathered` are arrays [B, ...]; on a mesh each device receives its own slides' rows of the former and
    all rows of the latter (`shard_by_slide` in `runtime/sharding.py`). The result has one row per row of `local`.
    """
    return function(local, gathered, replicated)


class _Local(NamedTuple):
    """Per-slide inputs for scoring the negatives of n slides: the whole batch, or one device's share."""

    number: Int[Array, "n"]
    related: Int[Array, "n S"]
    wording: Int[Array, "n K"] | None
    regions: Float[Array, "n R D"]
    region_mask: Bool[Array, "n R"]
    drawn: Int[Array, "n B"]


class _Gathered(NamedTuple):
    """Inputs of all slides of the batch: their relations, and the texts that serve as negatives."""

    subcaptions: Float[Array, "B K D"]
    related: Int[Array, "B S"]
    wording: Int[Array, "B K"] | None


def region_loss(
    embeddings: Embeddings,
    text_region_attention: TextRegionAttention,
    negatives: Int[Array, "B B"],
    related: Int[Array, "B ..."],
    scale: Scalar,
    bias: Scalar | None,
    config: LossConfig,
    shard_map: ShardMap = unsharded,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sigmoid loss between subcaptions and text-conditioned region embeddings, with mean cosines as metrics.

    The texts of slide i are its own K subcaptions (label +1) and one subcaption of each other slide (label -1).
    `released` divides the sum by K + B - 1, as the released code does on a single device, and so grows with B;
    `per_positive` divides by B * K, as in the follow-up's code;
    `per_slide` is the mean over slides of (mean over positives + w * mean over negatives) / 2.
    `config.within_slide_weight` adds that share of a slide's own hard negatives (`_within_slide`), likewise halved.

    Each text pools the regions of each slide separately, so memory scales with pairs of slides and texts. With n
    slides per device and C = `config.negatives_at_once` texts at a time, the largest arrays are [n, C, heads, R] and
    [n, C, D], in float32 4 n C heads R and 4 n C D bytes; all subcaptions, 4 B K D bytes, are gathered once.
    """
    B, K, _ = embeddings.subcaptions.shape
    shown = B - 1 if config.negatives_per_slide is None else min(config.negatives_per_slide, B - 1)
    positive = _cosines(text_region_attention, embeddings.subcaptions, embeddings.regions, embeddings.region_mask)
    positive_terms = -log_sigmoid(positive, 1.0, scale, bias)  # [B, K]

    def score(local: _Local, gathered: _Gathered, replicated: tuple) -> tuple[Array, Array, Array]:
        return _negatives(local, gathered, *replicated, shown, config.negatives_at_once or max(shown, 1))

    wording = None if embeddings.wording is None else jnp.asarray(embeddings.wording)
    gathered = _Gathered(embeddings.subcaptions, jnp.asarray(related).reshape(B, -1), wording)
    local = _Local(jnp.arange(B), *gathered[1:], embeddings.regions, embeddings.region_mask, negatives)
    negative_sum, cosine_sum, count = shard_map(score, local, gathered, (text_region_attention, scale, bias))
    count = jnp.maximum(count, 1.0)
    if config.normaliser == "released":
        loss = (jnp.sum(positive_terms) + jnp.sum(negative_sum)) / (K + shown)
    elif config.normaliser == "per_positive":
        loss = (jnp.sum(positive_terms) + jnp.sum(negative_sum)) / (B * K)
    else:
        loss = jnp.mean(jnp.mean(positive_terms, axis=1) + config.negative_weight * negative_sum / count) / 2
    if config.within_slide_weight:
        hard = _within_slide(text_region_attention, embeddings, wording, scale, bias)
        loss += config.within_slide_weight * jnp.mean(hard) / 2
    return loss, {"cosine_positive": jnp.mean(positive), "cosine_negative": jnp.mean(cosine_sum / count)}


def pair_bytes(config: LossConfig, slides: int, batch_size: int, heads: int, regions: int, width: int) -> int:
    """Bytes of the largest float32 array of `region_loss` on a device that holds `slides` slides of a batch.

    `width` is D; the array is [n, C, heads, R] or [n, C, D], whichever is larger.
    """
    others = batch_size - 1
    texts = min(config.negatives_per_slide or others, config.negatives_at_once or others, others)
    return 4 * slides * max(texts, 1) * max(heads * regions, width) if config.region_weight else 0


def _negatives(
    local: _Local,
    gathered: _Gathered,
    attention: TextRegionAttention,
    scale: Scalar,
    bias: Scalar | None,
    shown: int,
    chunk: int,
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Sums of loss terms and cosines over the next `shown` slides as negatives of each slide, and their counts.

    Chunks are rematerialised in the backward pass, so that only one is in memory at a time.
    """

    def score(offsets: Int[Array, "C"]):
        others = (local.number[:, None] + offsets[None]) % len(gathered.related)  # [n, C]
        drawn = jnp.take_along_axis(local.drawn, others, axis=1)
        counted = unrelated(local.related[:, None], gathered.related[others]) & (offsets <= shown)[None]
        if gathered.wording is not None:
            counted &= unrelated(local.wording[:, None], gathered.wording[others, drawn][..., None])
        texts = gathered.subcaptions[others, drawn]
        cosine = _cosines(attention, texts, local.regions, local.region_mask)
        counted = counted.astype(cosine.dtype)
        terms = -log_sigmoid(cosine, -1.0, scale, bias)
        return tuple(jnp.sum(x * counted, axis=1) for x in (terms, cosine, jnp.ones_like(cosine)))

    chunks = -(-shown // chunk)
    if chunks <= 1:
        return score(jnp.arange(1, 1 + shown))
    offsets = jnp.arange(1, 1 + chunks * chunk).reshape(chunks, chunk)  # entries beyond `shown` are masked out
    return tuple(jnp.sum(x, axis=0) for x in jax.lax.map(jax.checkpoint(score), offsets))


def _within_slide(
    attention: TextRegionAttention, embeddings: Embeddings, wording: Array | None, scale: Scalar, bias: Scalar | None
) -> Float[Array, "B"]:
    """Mean loss term of each slide over pairs of a sentence and the regions pooled for another one of its sentences."""
    texts, K = embeddings.subcaptions, embeddings.subcaptions.shape[1]
    pooled, _ = attention(texts, embeddings.regions, embeddings.region_mask)
    cosine = jnp.einsum("bkd,bjd->bkj", normalise(pooled), normalise(texts))
    others = ~jnp.eye(K, dtype=bool)[None] if wording is None else wording[:, :, None] != wording[:, None]
    others = others.astype(cosine.dtype)
    terms = -log_sigmoid(cosine, -1.0, scale, bias) * others
    return jnp.sum(terms, axis=(1, 2)) / jnp.maximum(jnp.sum(others, axis=(1, 2)), 1)


def _cosines(attention: TextRegionAttention, texts: Array, regions: Array, mask: Array) -> Float[Array, "B C"]:
    """Cosine between each text and its text-conditioned region embedding."""
    pooled, _ = attention(texts, regions, mask)
    return jnp.sum(normalise(pooled) * normalise(texts), axis=-1)


class CosinePooling(NamedTuple):
    """Text-conditioned pooling of regions by their cosine to the text, without parameters of its own.

    The softmax of the cosines at `temperature` is a smooth maximum over a slide's regions (multiple-instance pooling).
    """

    temperature: Float[Array, ""] | float

    def __call__(
        self, texts: Float[Array, "B C D"], regions: Float[Array, "B R D"], mask: Bool[Array, "B R"]
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C R"]]:
        """Pooled regions of every text, and the weights of the regions."""
        regions = normalise(regions)
        cosines = jnp.einsum("bcd,brd->bcr", normalise(texts), regions)
        weights = jax.nn.softmax(jnp.where(mask[:, None], cosines / self.temperature, -1e9), axis=-1)
        return jnp.einsum("bcr,brd->bcd", weights, regions), weights


def log_sigmoid(cosine: Array, label: float | Array, scale: Scalar, bias: Scalar | None) -> Array:
    """Log-probability of a match (label 1) or a non-match (-1) for a pair of this cosine."""
    return jax.nn.log_sigmoid(label * (scale * cosine if bias is None else scale * cosine + bias))


def alignment_loss(
    embeddings: Embeddings,
    text_region_attention: TextRegionAttention,
    negatives: Int[Array, "B B"],
    related: Int[Array, "B ..."],
    scale: Scalar,
    bias: Scalar | None,
    config: LossConfig,
    shard_map: ShardMap = unsharded,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Total loss and its components by name; a loss of weight 0 is not computed. `shard_map` as in `region_loss`."""
    metrics = {}
    loss = jnp.zeros(())
    if config.slide_weight:
        options = {name: getattr(config, name) for name in ("temperature", "label_smoothing", "soft_targets")}
        with jax.named_scope("slide_loss"):
            metrics["loss_slide"] = slide_loss(embeddings.slide, embeddings.captions, related, **options)
        loss += config.slide_weight * metrics["loss_slide"]
    if config.region_weight:
        with jax.named_scope("region_loss"):
            metrics["loss_region"], similarity = region_loss(
                embeddings, text_region_attention, negatives, related, scale, bias, config, shard_map
            )
        loss += config.region_weight * metrics["loss_region"]
        metrics |= similarity
    return loss, metrics | {"loss": loss}
