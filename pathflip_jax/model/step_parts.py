"""Operations and bytes of each part of a forward pass, by formula, for both networks and the text encoder.

A multiply-add counts as two operations. Bytes are the minimal memory traffic: a tensor too large for a cache is written
once and read once per use. Letters as in `pathflip_jax.model.pathflip`.
"""

from typing import NamedTuple

from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


class Work(NamedTuple):
    """Size of a global batch: slides, regions, valid patches and real tokens, and the sum of squared text lengths."""

    slides: float
    regions: float
    patches: float
    tokens: float
    squared_lengths: float


Step = tuple[str, float, float]  # name, multiply-adds and bytes of a forward pass


def pathflip_parts(config: PathFLIPConfig, work: Work, width: int) -> list[Step]:
    """Parts of the PathFLIP forward pass; `width` is the size of an activation in bytes."""
    F, D, H, inner = config.feature_dim, config.embed_dim, config.hidden, config.intermediate
    Q, heads, layers, crossing = config.num_queries, config.heads, config.layers, len(config.cross_layers)
    N = work.patches
    rows = (work.slides + work.regions) * Q  # query tokens of a batch, of slides and regions
    read = 2 * N  # every patch is scored and pooled by the queries of its slide and of its region
    # Scores and their softmax are each written and read once in float32; patches are read for scores and for pooling.
    scores = read * heads * Q
    return [
        ("patch projection", N * F * D, N * (2 * F + D * width)),
        ("queries: projections of cross-attention", crossing * rows * (2 * H * H + 2 * H * D), crossing * 4 * H * H),
        ("patches: scores and pooling", crossing * 2 * scores * D, crossing * (2 * read * D * width + 4 * scores * 4)),
        ("queries: self-attention", layers * rows * (4 * H * H + 2 * Q * H), layers * rows * 8 * H * width),
        ("queries: feed-forward", layers * rows * 2 * H * inner, layers * rows * (2 * H + 2 * inner) * width),
        *_text_parts(config, work, width, only_cls=True),
    ]


def pathflip2_parts(config: PathFLIP2Config, work: Work, width: int) -> list[Step]:
    """Parts of the PathFLIP2 forward pass; `width` is the size of an activation in bytes."""
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
        *_text_parts(config, work, width, only_cls=config.text_pooling == "cls"),
    ]


def _text_parts(config: ModelConfig, work: Work, width: int, only_cls: bool) -> list[Step]:
    H, inner, layers, T = config.hidden, config.intermediate, config.layers, work.tokens
    whole = layers - only_cls  # layers with a feed-forward over every token; the last one may need [CLS] only
    moved = layers * 4 * work.squared_lengths * config.heads * width
    return [
        ("text: projections", layers * T * 4 * H * H, layers * T * 8 * H * width),
        ("text: attention", layers * 2 * work.squared_lengths * H, moved),
        ("text: feed-forward", whole * T * 2 * H * inner, layers * T * (2 * H + 2 * inner) * width),
    ]
