"""Softmax attention from the queries of a slide and of its regions to patches, in the cheapest order of operations.

(W_k x)·q = x·(W_k^T q): absorbing the key projection into the queries turns them into rows of width D, one for each
head and query, over the patch embeddings themselves, which slide, regions and heads share. Nothing of width H per patch
is computed or kept. It is exact: the key bias adds the same to every score of a row and cancels in the softmax.

Letters as in `pathflip_jax.model.pathflip`; C here is heads * Q, the query rows of a slide or a region; P is 1 + R, the
slide and its regions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pathflip_jax.ops.attention import softmax_where
from pathflip_jax.ops.dropout import drop, dropout
from pathflip_jax.ops.matmul import contract, matmul, row_sums
from pathflip_jax.ops.platform import by_platform, fusion_barrier
from pathflip_jax.ops.recompute import defer_until


def pool_patches_reference(
    query: Float[Array, "#B #P Q heads d"],
    key_kernel: Float[Array, "D heads d"],
    patches: Float[Array, "B R S D"],
    mask: Bool[Array, "B R S"],
    rate: float = 0.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B P C D"], Float[Array, "B P C 1"]]:
    """Reference of `pool_patches`, not optimised for memory and differentiated by JAX."""
    B, R, S, D = patches.shape
    rows = absorb(query, key_kernel, B, R)
    slide, C = jnp.einsum("bcD,brsD->bcrs", rows[:, 0], patches, preferred_element_type=jnp.float32), rows.shape[2]
    regions = softmax_where(matmul(rows[:, 1:], patches.mT), mask[:, :, None])
    slide = softmax_where(slide.reshape(B, C, R * S), mask.reshape(B, 1, R * S)).reshape(slide.shape)
    # The dropout mask is drawn over [B, R, 2C, S].
    kept = dropout(jnp.concatenate([slide.swapaxes(1, 2), regions], axis=2), rate, key)
    both = matmul(kept.astype(patches.dtype), patches), kept.sum(-1, keepdims=True)
    pooled, sums = (jnp.concatenate([x[:, :, :C].sum(1, keepdims=True), x[:, :, C:]], axis=1) for x in both)
    return pooled.astype(patches.dtype), sums.astype(patches.dtype)


def pool_patches(
    query: Float[Array, "#B #P Q heads d"],
    key_kernel: Float[Array, "D heads d"],
    patches: Float[Array, "B R S D"],
    mask: Bool[Array, "B R S"],
    rate: float = 0.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B P C D"], Float[Array, "B P C 1"]]:
    """Softmax attention of a slide's queries, [:, 0], over all of its patches, and of each region's over its own.

    Returns the values pooled by each head of each query and the sum of its weights. One product multiplies each
    region's patches by both kinds of rows; the slide's partial results per region are combined by each region's share
    of the softmax, as in FlashAttention (arXiv 2205.14135). Rows and weights are rematerialised in the backward pass,
    and nothing of their size is kept. The softmax is in float32.
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
    # Without the barrier XLA:CPU would broadcast the maximum over all patches and keep it for the backward pass.
    largest = fusion_barrier(scores.max(-1, keepdims=True))
    weights = jnp.where(mask[:, :, None], jnp.exp(scores - largest), 0)
    total = row_sums(weights)
    kept = weights if seed is None else drop(weights, rate, seed)
    pooled, sums = matmul(kept.astype(patches.dtype), patches), total if seed is None else row_sums(kept)
    # A slide's weights in different regions are relative to different maxima: rescale them to the highest one.
    highest = largest[:, :, :C].max(1, keepdims=True)
    relative = jnp.exp(largest[:, :, :C] - highest)
    total, sums, pooled = (
        jnp.concatenate([sum_regions(relative * x[:, :, :C]), x[:, :, C:]], axis=1) for x in (total, sums, pooled)
    )
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)  # [B, 1+R, C, 1]
    pooled, sums = ((x * share).astype(patches.dtype) for x in (pooled, sums))
    largest = jnp.concatenate([highest, largest[:, :, C:]], axis=1)
    return (pooled, sums), (query, key_kernel, patches, mask, seed, largest, share, pooled, sums)


def _backward(rate: float, residuals: tuple, gradients: tuple[Array, Array]):
    query, key_kernel, patches, mask, seed, largest, share, pooled, sums = residuals
    query, gradient = defer_until(query, gradients[0])
    absorbed = partial(absorb, slides=patches.shape[0], regions=patches.shape[1])
    rows, absorb_backward = jax.vjp(absorbed, query, key_kernel)
    sums_gradient, C = gradients[1].astype(jnp.float32), rows.shape[2]
    # The sum over keys of weight times gradient equals the sum of pooled value times its gradient.
    mean = row_sums((gradient * pooled).astype(jnp.float32)) + sums_gradient * sums
    rows, gradient, sums_gradient, mean, largest, share = map(
        _join, (rows, gradient, sums_gradient, mean, largest, share)
    )
    weights = jnp.where(mask[:, :, None], jnp.exp(_scores(rows, patches, mask) - largest) * share, 0)
    inner = matmul(gradient, patches.mT) + sums_gradient  # with respect to the weights after dropout
    kept, inner = (weights, inner) if seed is None else (drop(weights, rate, seed), drop(inner, rate, seed))
    inner = (weights * (inner - mean)).astype(patches.dtype)
    towards_rows = matmul(inner, patches)
    towards_rows = jnp.concatenate([sum_regions(towards_rows[:, :, :C]), towards_rows[:, :, C:]], axis=1)
    # Patches serve as both keys and values, so their gradients are the sum of both.
    inner = jnp.concatenate([inner, kept.astype(patches.dtype)], axis=2)
    towards_patches = matmul(inner.mT, jnp.concatenate([rows, gradient], axis=2))
    found = towards_rows.astype(query.dtype), towards_patches.astype(patches.dtype)
    towards_rows, towards_patches = fusion_barrier(found)
    return *absorb_backward(towards_rows), towards_patches, None, None


_pool_patches.defvjp(_forward, _backward)


def absorb(query: Array, key_kernel: Array, slides: int, regions: int) -> Float[Array, "B P C D"]:
    """Query rows that include the key projection and score patches directly; a single query set is broadcast."""
    rows = contract("bgqhd,Dhd->bghqD", query, key_kernel)  # [B, 1+R, heads, Q, D]
    rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
    return jnp.broadcast_to(rows, (slides, 1 + regions, *rows.shape[2:]))


def _join(rows: Float[Array, "B P C y"]) -> Float[Array, "B R 2*C y"]:
    """The slide's rows stacked on those of each region."""
    slide, regions = rows[:, :1], rows[:, 1:]
    return jnp.concatenate([jnp.broadcast_to(slide, regions.shape), regions], axis=2)


def plain_sum_regions(x: Float[Array, "B R C y"]) -> Float[Array, "B 1 C y"]:
    """Sum over regions."""
    return jnp.sum(x, axis=1, keepdims=True)


def region_products(x: Float[Array, "B R C y"]) -> Float[Array, "B 1 C y"]:
    """Sum over regions as a matrix product; see `ops.matmul.row_products`."""
    B, R, C, _ = x.shape
    return jnp.matmul(jnp.ones((1, R), x.dtype), x.reshape(B, R, -1), precision="highest").reshape(B, 1, C, -1)


sum_regions = by_platform(cpu=region_products, default=plain_sum_regions)


def _scores(rows: Float[Array, "B R T D"], patches: Array, mask: Array) -> Float[Array, "B R T S"]:
    return jnp.where(mask[:, :, None], matmul(rows, patches.mT), jnp.finfo(jnp.float32).min)
