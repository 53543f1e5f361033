"""Softmax attention with weights rematerialised in the backward pass: no residual of size C x T is kept."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pathflip_jax.ops.dropout import drop, dropout
from pathflip_jax.ops.matmul import matmul, row_sums
from pathflip_jax.ops.platform import by_platform, fusion_barrier
from pathflip_jax.ops.recompute import defer_until


def softmax_where(scores: Float[Array, "... N"], mask: Bool[Array, "... N"] | None) -> Float[Array, "... N"]:
    """Float32 softmax over the unmasked entries; all zeros, not a mean of padding, where everything is masked."""
    scores = scores.astype(jnp.float32)
    if mask is None:
        return jax.nn.softmax(scores)
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min)), 0)


def pool_reference(
    query: Float[Array, "... C d"],
    key: Float[Array, "... T d"],
    value: Float[Array, "... T e"],
    mask: Bool[Array, "... C T"] | None,
    rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "... C e"], Float[Array, "... C 1"]]:
    """Textbook reference of `pool`, differentiated by JAX, which keeps the weights for the backward pass."""
    kept = dropout(softmax_where(matmul(query, key.mT), mask), rate, dropout_key)
    pooled = matmul(kept.astype(value.dtype), value)
    return pooled.astype(value.dtype), kept.sum(-1, keepdims=True).astype(value.dtype)


def pool(
    query: Float[Array, "... C d"],
    key: Float[Array, "... T d"],
    value: Float[Array, "... T e"],
    mask: Bool[Array, "... #C T"] | None,
    rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "... C e"], Float[Array, "... C 1"]]:
    """Softmax attention of query rows over key rows: the pooled values and the sum of each row's weights.

    That sum is one, except for dropout, and zero where everything is masked. The softmax is in float32. Weights are
    rematerialised in the backward pass, as in FlashAttention (arXiv 2205.14135): nothing of size C x T is kept.
    """
    seed = None if dropout_key is None or rate == 0 else jax.random.key_data(dropout_key)
    return _pool(query, key, value, mask, seed, rate)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _pool(query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, rate: float):
    return _pool_forward(query, key, value, mask, seed, rate)[0]


def _pool_forward(query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, rate: float):
    scores = _scores(query, key, mask)
    # Without the barrier XLA:CPU would broadcast the maximum over all keys and keep the result.
    largest = fusion_barrier(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    total = row_sums(weights)
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)  # [..., C, 1]
    kept = weights if seed is None else drop(weights, rate, seed)
    pooled = (matmul(kept.astype(value.dtype), value) * share).astype(value.dtype)
    sums = (share * (total if seed is None else row_sums(kept))).astype(value.dtype)
    return (pooled, sums), (query, key, value, mask, seed, largest, share, saved_output(pooled, sums))


def _pool_backward(rate: float, residuals: tuple, gradients: tuple[Array, Array]):
    query, key, value, mask, seed, largest, share, output = residuals
    gradient, sums_gradient = gradients
    query, gradient = defer_until(query, gradient)
    weights = jnp.exp(_scores(query, key, mask) - largest) * share
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    kept = weights if seed is None else drop(weights, rate, seed)
    inner = matmul(gradient, value.mT) + sums_gradient.astype(jnp.float32)  # with respect to `kept`
    inner = inner if seed is None else drop(inner, rate, seed)
    inner = score_gradient(weights, inner, gradients, output).astype(query.dtype)
    gradients = matmul(inner, key), matmul(inner.mT, query), matmul(kept.astype(value.dtype).mT, gradient)
    shapes = query, key, value
    gradients = [g.astype(x.dtype) for g, x in zip(gradients, shapes, strict=True)]
    return *gradients, None, None


_pool.defvjp(_pool_forward, _pool_backward)


def score_gradient_from_sums(weights: Array, inner: Array, gradients: tuple[Array, Array], output: None) -> Array:
    """Gradient of a softmax with respect to the scores; its weighted mean is computed as a sum over all keys."""
    inner = weights * inner
    return inner - weights * row_sums(inner)


def score_gradient_from_output(
    weights: Array, inner: Array, gradients: tuple[Array, Array], output: tuple[Array, Array]
) -> Array:
    """`score_gradient_from_sums` with the mean computed from the pooled values and their gradient (FlashAttention).

    This avoids the sum over keys, which XLA:TPU would compute in both of the products that use this result.
    """
    mean = [row_sums(x.astype(jnp.float32) * g.astype(jnp.float32)) for x, g in zip(output, gradients, strict=True)]
    return weights * (inner - sum(mean))


# Pooled values and sums of weights, kept for `score_gradient_from_output`, which is no faster on XLA:CPU.
saved_output = by_platform(cpu=lambda pooled, sums: None, default=lambda pooled, sums: (pooled, sums))
score_gradient = by_platform(cpu=score_gradient_from_sums, default=score_gradient_from_output)


def _scores(query: Array, key: Array, mask: Array | None) -> Float[Array, "... C T"]:
    scores = matmul(query, key.mT)
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def attention_weights(
    query: Float[Array, "... C d"], key: Float[Array, "... T d"], mask: Bool[Array, "... #C T"] | None
) -> Float[Array, "... C T"]:
    """Attention weights of `pool` before dropout, for attention maps: computed only on request."""
    return softmax_where(matmul(query, key.mT), mask)


def split_heads(x: Float[Array, "... T H"], heads: int) -> Float[Array, "... heads T d"]:
    """Split of the last axis into attention heads: [..., T, H] -> [..., heads, T, H / heads]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def attend(
    query: Float[Array, "... C H"],
    key: Float[Array, "... T H"],
    value: Float[Array, "... T H"],
    mask: Bool[Array, "... T"] | None,
    heads: int,
    rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "... C H"], Float[Array, "... heads C T"]]:
    """Multi-head attention between projected rows: the pooled values and the probabilities before dropout.

    The mask broadcasts against [..., heads, C, T]. C may be 0: a batch of one slide has no negatives.
    """
    query, key, value = (split_heads(x, heads) for x in (query, key, value))
    query /= math.sqrt(query.shape[-1])
    pooled, _ = pool(query, key, value, mask, rate, dropout_key)
    pooled = pooled.swapaxes(-2, -3)
    pooled = pooled.reshape(*pooled.shape[:-2], pooled.shape[-2] * pooled.shape[-1])
    return pooled, attention_weights(query, key, mask)
