"""How many operations a step of the model takes, by formula: those of the algorithm, on valid patches and real tokens.

Padding, recomputation and what XLA adds do not count, so operations over the device's peak are the share of the machine
that does useful work (the "model FLOPs utilisation" of PaLM, arXiv 2204.02311). Two operations per multiply-add; the
bytes are what has to move through memory at least, each tensor too large for a cache written once and read once per
use. The numbers of `Work` may be arrays, so that a compiled step can count its own batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.parameters import abstract_params


class Part(NamedTuple):
    """One part of a step: operations and bytes, forward and backward together."""

    name: str
    operations: float
    bytes: float

    def floor(self, rate: float, bandwidth: float) -> float:
        """Seconds that it takes at least."""
        return max(self.operations / rate, self.bytes / bandwidth)


class Work(NamedTuple):
    """What a whole batch holds: slides, regions, valid patches and real tokens, and the sum of squared text lengths."""

    slides: float
    regions: float
    patches: float
    tokens: float
    squared_lengths: float


def parts(config: ModelConfig, work: Work, width: int, training: bool) -> list[Part]:
    """The parts of a step; `width` is the bytes of an activation. Training takes three times the forward's work."""
    passes = 3 if training else 1
    found = [
        Part(name, 2 * passes * multiply_adds, passes * moved)
        for name, multiply_adds, moved in (*_slide_parts(config, work, width), *_text_parts(config, work, width))
    ]
    if training:
        # AdamW reads weight, gradient and two moments and writes three of them, in float32.
        found.append(Part("optimizer", 12.0 * parameters(config), 28.0 * parameters(config)))
    return found


Step = tuple[str, float, float]  # what it is, its multiply-adds, the bytes it moves, forward


def _slide_parts(config: ModelConfig, work: Work, width: int) -> list[Step]:
    return (_pathflip2_parts if isinstance(config, PathFLIP2Config) else _pathflip_parts)(config, work, width)


def _pathflip_parts(config: PathFLIPConfig, work: Work, width: int) -> list[Step]:
    F, D, H, inner = config.feature_dim, config.embed_dim, config.hidden, config.intermediate
    Q, heads, layers, crossing = config.num_queries, config.heads, config.layers, len(config.cross_layers)
    N = work.patches
    rows = (work.slides + work.regions) * Q  # query tokens of a batch, slide and regions
    read = 2 * N  # every patch is scored and pooled by the slide's queries and by its region's
    # Scores and their softmax are written and read once each way in float32; patches are read for scores and pooling.
    scores = read * heads * Q
    return [
        ("patch projection", N * F * D, N * (2 * F + D * width)),
        ("queries: projections of cross-attention", crossing * rows * (2 * H * H + 2 * H * D), crossing * 4 * H * H),
        ("patches: scores and pooling", crossing * 2 * scores * D, crossing * (2 * read * D * width + 4 * scores * 4)),
        ("queries: self-attention", layers * rows * (4 * H * H + 2 * Q * H), layers * rows * 8 * H * width),
        ("queries: feed-forward", layers * rows * 2 * H * inner, layers * rows * (2 * H + 2 * inner) * width),
    ]


def _pathflip2_parts(config: PathFLIP2Config, work: Work, width: int) -> list[Step]:
    F, D, layers = config.feature_dim, config.embed_dim, config.token_layers
    N, Q = work.patches, work.slides * (1 + config.tokens)
    read = N * (1 + config.tokens)  # pairs of a patch and a token of its slide
    scores = 4 * read * config.token_heads * 4
    return [
        ("patch projections", N * (F * D + D * D), N * (2 * F + 3 * D * width)),
        ("patches: keys and values", layers * N * 2 * D * D, layers * N * 3 * D * width),
        ("tokens: scores and pooling", layers * 2 * read * D, layers * (2 * N * D * width + scores)),
        ("tokens: projections", layers * Q * 6 * D * D, layers * Q * 12 * D * width),
        ("tokens: among themselves", layers * 2 * Q * (1 + config.tokens) * D, layers * Q * 8 * D * width),
        ("tokens: feed-forward", layers * 2 * Q * 8 * D * D, layers * Q * 20 * D * width),
        ("patches: read the tokens", N * 2 * D * D + 2 * read * D, 4 * N * D * width + scores),
        ("patches: feed-forward", N * 8 * D * D, N * 10 * D * width),
    ]


def _text_parts(config: ModelConfig, work: Work, width: int) -> list[Step]:
    H, inner, layers, T = config.hidden, config.intermediate, config.layers, work.tokens
    whole = layers - 1 if getattr(config, "text_pooling", "cls") == "cls" else layers  # only [CLS] is read of the last
    moved = layers * 4 * work.squared_lengths * config.heads * width
    return [
        ("text: projections", layers * T * 4 * H * H, layers * T * 8 * H * width),
        ("text: attention", layers * 2 * work.squared_lengths * H, moved),
        ("text: feed-forward", whole * T * 2 * H * inner, layers * T * (2 * H + 2 * inner) * width),
    ]


@functools.cache
def parameters(config: ModelConfig) -> int:
    """The number of parameters."""
    return sum(math.prod(x.shape) for x in abstract_params(config).values())


def useful_operations(
    config: ModelConfig,
    patch_mask: Bool[jax.Array, "B R S"],
    text_rows: Sequence[tuple[Int[jax.Array, "G _ _"], ...]],
) -> Float[jax.Array, ""]:
    """Operations of the training step on this batch; `text_rows` as in `PathFLIP.encode_texts`.

    Meant for the inside of a compiled step: there the arrays are those of all devices and processes, and so is the sum.
    """
    B = len(patch_mask)
    tokens = squares = jnp.float32(0)
    for _, segments, positions in text_rows:
        real = segments > 0
        tokens += jnp.sum(real, dtype=jnp.float32)
        squares += jnp.sum(jnp.where(real, 2 * positions + 1, 0), dtype=jnp.float32)  # 1 + 3 + 5 + ... = length squared
    regions = jnp.sum(jnp.any(patch_mask, axis=-1), dtype=jnp.float32)
    work = Work(B, regions, jnp.sum(patch_mask, dtype=jnp.float32), tokens, squares)
    return sum(part.operations for part in parts(config, work, 4, training=True))
