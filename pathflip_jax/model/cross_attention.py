"""Cross-attention from the queries of a slide and of its regions to patches, in the cheapest order of operations.

(W_k x)·q = x·(W_k^T q): absorbing the key projection into the queries turns them into rows of width D, one for each
head and query, over the patch embeddings themselves, which slide, regions and heads share; the value projection follows
the pooling. Nothing of width H per patch is computed or kept. It is exact: the key bias adds the same to every score of
a row and cancels in the softmax; the value bias comes once per row, times the sum of its probabilities (one, but for
dropout, and zero where there is no patch).

Letters as in `pathflip_jax.model.pathflip`; C here is heads * Q, the rows that a slide or a region reads with.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import (
    BERT_EPS,
    LayerNorm,
    Linear,
    attention_weights,
    contract,
    drop,
    dropout,
    matmul,
    row_sums,
    split_key,
    wait,
)


class CrossAttention(nnx.Module):
    """BERT cross-attention from the queries to the patches, for the slide and for all of its regions at once."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.rate = config.heads, config.dropout
        self.query = Linear(config.hidden, config.hidden, config.init, rngs)
        self.key = Linear(config.embed_dim, config.hidden, config.init, rngs)
        self.value = Linear(config.embed_dim, config.hidden, config.init, rngs)
        self.output = Linear(config.hidden, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def __call__(
        self,
        x: Float[Array, "B 1+R Q H"],
        patches: Float[Array, "B R S D"],
        mask: Bool[Array, "B R S"],
        key: Array | None,
    ) -> tuple[Float[Array, "B 1+R Q H"], Float[Array, "B heads Q R*S"], Float[Array, "B R heads Q S"]]:
        """The queries after looking, and where the slide and each region looked (before dropout)."""
        keys = split_key(key, 2)
        B, R, S, D = patches.shape
        Q = x.shape[-2]
        query, key_kernel = self._query(x, D)
        x = self.finish(x, *pool_patches(query, key_kernel, patches, mask, self.rate, keys[0]), keys[1])

        rows = absorb(query, key_kernel, B, R)
        slide = attention_weights(rows[:, 0], patches.reshape(B, R * S, D), mask.reshape(B, 1, R * S))
        regions = attention_weights(rows[:, 1:], patches, mask[:, :, None])
        return x, slide.reshape(B, self.heads, Q, R * S), regions.reshape(B, R, self.heads, Q, S)

    def _query(self, x: Array, D: int) -> tuple[Float[Array, "B 1+R Q heads d"], Float[Array, "D heads d"]]:
        query = self.query(x)
        query = query.reshape(*query.shape[:-1], self.heads, -1) / math.sqrt(query.shape[-1] // self.heads)
        return query, self.key.kernel[...].reshape(D, self.heads, -1)

    def finish(self, x: Array, pooled: Array, total: Array, key: Array | None = None) -> Float[Array, "B 1+R Q H"]:
        """The queries after what `pool_patches`, or `pooled` of a slide in parts, gives."""
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
        """What a slide's queries pool of the part of its patches that is given, and of those before: `so_far`."""
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
        """What queries have pooled before they have seen a patch."""
        rows = slides, self.heads * queries
        lowest = np.full((*rows, 1), np.finfo(np.float32).min, np.float32)
        return Part(lowest, np.zeros((*rows, 1), np.float32), np.zeros((*rows, width), np.float32))


class Part(NamedTuple):
    """What a slide's queries have pooled of some of its patches: the highest score, the sum of the weights against it,
    and what these pool, all in float32."""

    largest: Float[Array, "B C 1"]
    total: Float[Array, "B C 1"]
    pooled: Float[Array, "B C D"]

    def whole(self, dtype: jnp.dtype) -> tuple[Float[Array, "B 1 C D"], Float[Array, "B 1 C 1"]]:
        """As `pool_patches` gives it, when all patches have been seen."""
        share = jnp.where(self.total > 0, 1 / jnp.where(self.total > 0, self.total, 1), 0)
        return (self.pooled * share).astype(dtype)[:, None], (self.total * share).astype(dtype)[:, None]


def pool_patches(
    query: Float[Array, "B 1+R Q heads d"],
    key_kernel: Float[Array, "D heads d"],
    patches: Float[Array, "B R S D"],
    mask: Bool[Array, "B R S"],
    rate: float = 0.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B 1+R C D"], Float[Array, "B 1+R C 1"]]:
    """Softmax attention of a slide's queries, [:, 0], over all of its patches, and of each region's over the region's.

    Gives what each head of each query pools and the sum of its weights. Each region's patches meet both kinds of rows
    in one product; what the slide's pool region by region is put together by the regions' share in the softmax, as in
    FlashAttention (arXiv 2205.14135). Rows and weights are computed again for the gradient, and nothing of their size
    is kept. The softmax is in float32.
    """
    seed = None if key is None or rate == 0 else jax.random.key_data(key)
    return _pool_patches(query, key_kernel, patches, mask, seed, rate)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _pool_patches(query: Array, key_kernel: Array, patches: Array, mask: Array, seed: Array | None, rate: float):
    return _forward(query, key_kernel, patches, mask, seed, rate)[0]


def _forward(query: Array, key_kernel: Array, patches: Array, mask: Array, seed: Array | None, rate: float):
    rows = absorb(query, key_kernel, *patches.shape[:2])
    C = rows.shape[2]
    scores = _scores(_join(rows), patches, mask)
    # The barrier keeps it small: XLA for CPU would spread it over all patches, and keep that for the gradient.
    largest = lax.optimization_barrier(scores.max(-1, keepdims=True))
    weights = jnp.where(mask[:, :, None], jnp.exp(scores - largest), 0)
    total = row_sums(weights)
    kept = weights if seed is None else drop(weights, rate, seed)
    pooled, sums = matmul(kept.astype(patches.dtype), patches), total if seed is None else row_sums(kept)
    # A slide's weights in a region stand against those in its other regions as the exponents of their maxima.
    highest = largest[:, :, :C].max(1, keepdims=True)
    relative = jnp.exp(largest[:, :, :C] - highest)
    total, sums, pooled = (
        jnp.concatenate([_add(relative * x[:, :, :C]), x[:, :, C:]], axis=1) for x in (total, sums, pooled)
    )
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)  # [B, 1+R, C, 1]
    pooled, sums = ((x * share).astype(patches.dtype) for x in (pooled, sums))
    largest = jnp.concatenate([highest, largest[:, :, C:]], axis=1)
    return (pooled, sums), (query, key_kernel, patches, mask, seed, largest, share, pooled, sums)


def _backward(rate: float, residuals: tuple, gradients: tuple[Array, Array]):
    query, key_kernel, patches, mask, seed, largest, share, pooled, sums = residuals
    query, gradient = wait(query, gradients[0])
    absorbed = partial(absorb, slides=patches.shape[0], regions=patches.shape[1])
    rows, absorb_backward = jax.vjp(absorbed, query, key_kernel)
    sums_gradient, C = gradients[1].astype(jnp.float32), rows.shape[2]
    # The sum over keys of weight times gradient is that of what was pooled times its gradient.
    mean = row_sums((gradient * pooled).astype(jnp.float32)) + sums_gradient * sums
    rows, gradient, sums_gradient, mean, largest, share = map(
        _join, (rows, gradient, sums_gradient, mean, largest, share)
    )
    weights = jnp.where(mask[:, :, None], jnp.exp(_scores(rows, patches, mask) - largest) * share, 0)
    inner = matmul(gradient, patches.mT) + sums_gradient  # towards the weights that dropout has left
    kept, inner = (weights, inner) if seed is None else (drop(weights, rate, seed), drop(inner, rate, seed))
    inner = (weights * (inner - mean)).astype(patches.dtype)
    towards_rows = matmul(inner, patches)
    towards_rows = jnp.concatenate([_add(towards_rows[:, :, :C]), towards_rows[:, :, C:]], axis=1)
    # Patches are keys and values at once, and so are their gradients.
    inner = jnp.concatenate([inner, kept.astype(patches.dtype)], axis=2)
    towards_patches = matmul(inner.mT, jnp.concatenate([rows, gradient], axis=2))
    found = towards_rows.astype(query.dtype), towards_patches.astype(patches.dtype)
    towards_rows, towards_patches = lax.optimization_barrier(found)
    return *absorb_backward(towards_rows), towards_patches, None, None


_pool_patches.defvjp(_forward, _backward)


def absorb(query: Array, key_kernel: Array, slides: int, regions: int) -> Float[Array, "B 1+R C D"]:
    """Rows over patches in the place of queries over keys; before the first patches are read all sets may be one."""
    rows = contract("bgqhd,Dhd->bghqD", query, key_kernel)  # [B, 1+R, heads, Q, D]
    rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
    return jnp.broadcast_to(rows, (slides, 1 + regions, *rows.shape[2:]))


def _join(rows: Float[Array, "B 1+R C y"]) -> Float[Array, "B R 2C y"]:
    """The slide's rows above those of each region."""
    slide, regions = rows[:, :1], rows[:, 1:]
    return jnp.concatenate([jnp.broadcast_to(slide, regions.shape), regions], axis=2)


def _add(x: Float[Array, "B R C y"]) -> Float[Array, "B 1 C y"]:
    """The sum over regions, as a matrix product: see `row_sums`."""
    B, R, C, _ = x.shape
    return jnp.matmul(jnp.ones((1, R), x.dtype), x.reshape(B, R, -1), precision="highest").reshape(B, 1, C, -1)


def _scores(rows: Float[Array, "B R 2C D"], patches: Array, mask: Array) -> Float[Array, "B R 2C S"]:
    return jnp.where(mask[:, :, None], matmul(rows, patches.mT), jnp.finfo(jnp.float32).min)
