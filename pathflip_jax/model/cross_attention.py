"""Cross-attention from the queries of a slide and of its regions to patches, in the cheapest order of operations.

(W_k x)·q = x·(W_k^T q): absorbing the key projection into the queries turns them into rows of width D, one for each
head and query, over the patch embeddings themselves, which slide, regions and heads share; the value projection follows
the pooling. Nothing of width H per patch is computed or kept. It is exact: the key bias adds the same to every score of
a row and cancels in the softmax; the value bias is added once per row, times the sum of its probabilities (one, except
for dropout, and zero where there is no patch).

Letters as in `pathflip_jax.model.pathflip`; C here is heads * Q, the query rows of a slide or a region.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import BERT_EPS, LayerNorm, Linear
from pathflip_jax.ops.attention import attention_weights
from pathflip_jax.ops.dropout import dropout, split_key
from pathflip_jax.ops.matmul import contract, matmul, row_sums
from pathflip_jax.ops.patch_pooling import absorb, pool_patches


class CrossAttention(nnx.Module):
    """BERT cross-attention from queries to patches, for the slide and all of its regions in one pass."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.rate = config.heads, config.dropout
        self.query = Linear(config.hidden, config.hidden, config.init, rngs)
        self.key = Linear(config.embed_dim, config.hidden, config.init, rngs)
        self.value = Linear(config.embed_dim, config.hidden, config.init, rngs)
        self.output = Linear(config.hidden, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def __call__(
        self,
        x: Float[Array, "#B #P Q H"],
        patches: Float[Array, "B R S D"],
        mask: Bool[Array, "B R S"],
        key: Array | None,
    ) -> tuple[Float[Array, "B P Q H"], Float[Array, "B heads Q R*S"], Float[Array, "B R heads Q S"]]:
        """Updated queries, and the attention of the slide and of each region before dropout."""
        keys = split_key(key, 2)
        B, R, S, D = patches.shape
        Q = x.shape[-2]
        query, key_kernel = self._query(x, D)
        x = self.finish(x, *pool_patches(query, key_kernel, patches, mask, self.rate, keys[0]), keys[1])

        rows = absorb(query, key_kernel, B, R)
        slide = attention_weights(rows[:, 0], patches.reshape(B, R * S, D), mask.reshape(B, 1, R * S))
        regions = attention_weights(rows[:, 1:], patches, mask[:, :, None])
        return x, slide.reshape(B, self.heads, Q, R * S), regions.reshape(B, R, self.heads, Q, S)

    def _query(self, x: Array, D: int) -> tuple[Float[Array, "#B #P Q heads d"], Float[Array, "D heads d"]]:
        query = self.query(x)
        query = query.reshape(*query.shape[:-1], self.heads, -1) / math.sqrt(query.shape[-1] // self.heads)
        return query, self.key.kernel[...].reshape(D, self.heads, -1)

    def finish(self, x: Array, pooled: Array, total: Array, key: Array | None = None) -> Float[Array, "B P Q H"]:
        """Updated queries from the pooled values of `pool_patches`, or of a slide pooled in parts."""
        heads, D = (self.heads, -1), pooled.shape[-1]
        pooled = pooled.reshape(*pooled.shape[:2], self.heads, x.shape[-2], D)
        value_kernel, value_bias = self.value.kernel[...].reshape(D, *heads), self.value.bias[...].reshape(heads)
        context = contract("bghqD,Dhd->bgqhd", pooled, value_kernel)
        context += contract("bghq,hd->bgqhd", total.reshape(pooled.shape[:-1]), value_bias)
        context = context.reshape(*context.shape[:3], -1)  # [B, 1+R, Q, H]
        return self.norm(x + dropout(self.output(context), self.rate, key))

    def pool_part(
        self, x: Float[Array, "B 1 Q H"], patches: Float[Array, "B R S D"], mask: Bool[Array, "B R S"], so_far: "Part"
    ) -> "Part":
        """Attention pooling over one part of a slide's patches, merged with the earlier parts in `so_far`."""
        B, R, S, D = patches.shape
        rows = absorb(*self._query(x, D), B, 0)[:, 0]  # [B, C, D]
        patches, mask = patches.reshape(B, R * S, D), mask.reshape(B, 1, R * S)
        scores = jnp.where(mask, matmul(rows, patches.mT), jnp.finfo(jnp.float32).min)
        largest = jnp.maximum(so_far.largest, scores.max(-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(scores - largest), 0)
        before = jnp.exp(so_far.largest - largest)
        pooled = before * so_far.pooled + matmul(weights.astype(patches.dtype), patches)
        return Part(largest, before * so_far.total + row_sums(weights), pooled)

    def no_part(self, slides: int, queries: int, width: int) -> "Part":
        """Initial pooling state of a slide's queries, before any patch."""
        rows = slides, self.heads * queries
        lowest = np.full((*rows, 1), np.finfo(np.float32).min, np.float32)
        return Part(lowest, np.zeros((*rows, 1), np.float32), np.zeros((*rows, width), np.float32))


class Part(NamedTuple):
    """Running attention pooling over the patches of a slide seen so far, in float32.

    Holds each query row's maximum score, and its sum of weights and pooled values relative to that maximum.
    """

    largest: Float[Array, "B C 1"]
    total: Float[Array, "B C 1"]
    pooled: Float[Array, "B C D"]

    def whole(self, dtype: jnp.dtype) -> tuple[Float[Array, "B 1 C D"], Float[Array, "B 1 C 1"]]:
        """Final result, in the form that `pool_patches` returns."""
        share = jnp.where(self.total > 0, 1 / jnp.where(self.total > 0, self.total, 1), 0)
        return (self.pooled * share).astype(dtype)[:, None], (self.total * share).astype(dtype)[:, None]
