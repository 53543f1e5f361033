"""The two alignment losses, as pure functions of arrays (DESIGN section 4).

Both run over the global batch: under jit on a mesh the same code gathers over devices. Pairs of slides of one
case are neither positives nor negatives: their reports are the same, or speak of the same tumor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# texts [B, C, D], regions [B, R, D], region_mask [B, R] -> text-conditioned region embeddings [B, C, D], weights
TextRegionAttention = Callable[[Array, Array, Array], tuple[Array, Array]]


@dataclass(frozen=True)
class LossConfig:
    """Weights and settings of the losses; the defaults are the released code's.

    `negative_weight` counts in `per_slide` only. `negatives_per_slide` shows each slide that many of the other
    slides instead of all: the next ones in the batch, which is shuffled.
    """

    slide_weight: float = 1.0
    region_weight: float = 1.0
    temperature: float = 0.1
    label_smoothing: float = 0.1
    normaliser: Literal["released", "per_slide"] = "released"
    negative_weight: float = 1.0
    negatives_per_slide: int | None = None

    def __post_init__(self):
        if self.normaliser not in ("released", "per_slide"):
            raise ValueError(f"loss config: normaliser={self.normaliser!r}, expected 'released' or 'per_slide'")
        if self.negatives_per_slide is not None and self.negatives_per_slide < 1:
            raise ValueError(
                f"loss config: negatives_per_slide={self.negatives_per_slide}, expected at least 1, or None"
            )


class Embeddings(NamedTuple):
    """All that the losses need of a batch, before any normalisation."""

    slide: Float[Array, "B D"]
    regions: Float[Array, "B R D"]
    region_mask: Bool[Array, "B R"]
    captions: Float[Array, "B D"]
    subcaptions: Float[Array, "B K D"]


def normalise(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """L2-normalise the last axis; a zero vector stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def other_cases(case: Int[Array, "B"]) -> Bool[Array, "B B"]:
    """[i, j]: slides i and j are of different cases, so that j is a negative for i."""
    return case[:, None] != case[None, :]


def slide_loss(
    slides: Float[Array, "B D"],
    captions: Float[Array, "B D"],
    case: Int[Array, "B"],
    *,
    temperature: float = 0.1,
    label_smoothing: float = 0.1,
) -> Float[Array, ""]:
    """InfoNCE between slides and captions, mean of both directions.

    Label smoothing spreads its share evenly over a slide's own caption and its negatives, as in torch's
    cross-entropy.
    """
    allowed = other_cases(case) | jnp.eye(len(slides), dtype=bool)
    logits = normalise(slides) @ normalise(captions).T / temperature  # [B, B]

    def one_way(logits):
        log_p = jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
        log_p = jnp.where(allowed, log_p, 0.0)
        smoothed = jnp.sum(log_p, axis=-1) / jnp.sum(allowed, axis=-1)
        return -jnp.mean((1 - label_smoothing) * jnp.diagonal(log_p) + label_smoothing * smoothed)

    return (one_way(logits) + one_way(logits.T)) / 2


def draw_negatives(key: Array, B: int, K: int) -> Int[Array, "B B"]:
    """[i, j]: which subcaption of slide j slide i is shown as a negative; -1 on the diagonal.

    A function of the key alone, so the draw does not depend on the devices.
    """
    return jnp.where(jnp.eye(B, dtype=bool), -1, jax.random.randint(key, (B, B), 0, K))


def region_loss(
    embeddings: Embeddings,
    text_region_attention: TextRegionAttention,
    negatives: Int[Array, "B B"],
    case: Int[Array, "B"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sigmoid loss between subcaptions and the regions that they themselves attend to; with it, mean cosines.

    The texts of slide i are its own K subcaptions (label +1) and one subcaption of each other slide (label -1).
    `released` divides the sum by K + B - 1, one device's arithmetic in the released code, and so grows with B;
    `per_slide` is the mean over slides of (mean over positives + w * mean over negatives) / 2.
    """
    B, K, _ = embeddings.subcaptions.shape

    def cosines(texts: Float[Array, "B C D"]) -> Float[Array, "B C"]:
        pooled, _ = text_region_attention(texts, embeddings.regions, embeddings.region_mask)
        return jnp.sum(normalise(pooled) * normalise(texts), axis=-1)

    def log_sigmoid(cosine, label):
        z = scale * cosine if bias is None else scale * cosine + bias
        return jax.nn.log_sigmoid(label * z)

    offsets = jnp.arange(1, B if config.negatives_per_slide is None else min(config.negatives_per_slide + 1, B))
    others = (jnp.arange(B)[:, None] + offsets) % B  # [B, C]
    drawn = jnp.take_along_axis(negatives, others, axis=1)
    is_negative = jnp.take_along_axis(other_cases(case), others, axis=1).astype(jnp.float32)

    positive = cosines(embeddings.subcaptions)  # [B, K]
    negative = cosines(embeddings.subcaptions[others, drawn])  # [B, C]
    positive_terms = -log_sigmoid(positive, 1.0)
    negative_terms = -log_sigmoid(negative, -1.0) * is_negative
    count = jnp.maximum(jnp.sum(is_negative, axis=1), 1.0)
    if config.normaliser == "released":
        loss = (jnp.sum(positive_terms) + jnp.sum(negative_terms)) / (K + others.shape[1])
    else:
        negative_mean = jnp.sum(negative_terms, axis=1) / count
        loss = jnp.mean(jnp.mean(positive_terms, axis=1) + config.negative_weight * negative_mean) / 2
    similarity = {
        "cosine_positive": jnp.mean(positive),
        "cosine_negative": jnp.mean(jnp.sum(negative * is_negative, 1) / count),
    }
    return loss, similarity


def alignment_loss(
    embeddings: Embeddings,
    text_region_attention: TextRegionAttention,
    negatives: Int[Array, "B B"],
    case: Int[Array, "B"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The total loss and its parts by name; a loss of weight 0 is not computed."""
    metrics = {}
    loss = jnp.zeros(())
    if config.slide_weight:
        options = {"temperature": config.temperature, "label_smoothing": config.label_smoothing}
        metrics["loss_slide"] = slide_loss(embeddings.slide, embeddings.captions, case, **options)
        loss += config.slide_weight * metrics["loss_slide"]
    if config.region_weight:
        metrics["loss_region"], similarity = region_loss(
            embeddings, text_region_attention, negatives, case, scale, bias, config
        )
        loss += config.region_weight * metrics["loss_region"]
        metrics |= similarity
    return loss, metrics | {"loss": loss}
