"""Layer and RMS normalisation over the last axis in float32, with hand-written gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pathflip_jax.ops.matmul import column_sums, row_sums
from pathflip_jax.ops.recompute import defer_statistics


def rms_norm_reference(x: Float[Array, "... W"], scale: Float[Array, "W"], eps: float) -> Float[Array, "... W"]:
    """Textbook reference of `rms_norm`, differentiated by JAX."""
    rows = x.astype(jnp.float32)
    rows = rows * lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + eps)
    return lax.broadcast_to_rank(scale, x.ndim).astype(x.dtype) * rows.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... W"], scale: Float[Array, "W"], eps: float) -> Float[Array, "... W"]:
    """RMS normalisation, computed in float32 and returned in the dtype of x."""
    return lax.broadcast_to_rank(scale, x.ndim).astype(x.dtype) * _unit_rms(x, eps)[0].astype(x.dtype)


def _unit_rms(x: Array, eps: float) -> tuple[Array, Array]:
    """x rescaled to root mean square 1 in float32, and the factor applied."""
    x = x.astype(jnp.float32)
    factor = lax.rsqrt(row_sums(x * x) / x.shape[-1] + eps)
    return x * factor, factor


def _rms_norm_backward(eps: float, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Hand-written for the same reason as that of `layer_norm` below.
    x, scale = residuals
    W, dtype = x.shape[-1], x.dtype
    x, gradient = defer_statistics(x, gradient.astype(jnp.float32))
    x, factor = _unit_rms(x, eps)
    inner = gradient * lax.broadcast_to_rank(scale, x.ndim)
    outer = factor * (inner - x * (row_sums(inner * x) / W))
    return outer.astype(dtype), column_sums(gradient * x).astype(scale.dtype)  # a decoder's scale may be bfloat16


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


def layer_norm_reference(
    x: Float[Array, "... W"], scale: Float[Array, "W"], bias: Float[Array, "W"], eps: float
) -> Float[Array, "... W"]:
    """Textbook reference of `layer_norm`, differentiated by JAX."""
    rows = x.astype(jnp.float32)
    rows = rows - jnp.mean(rows, axis=-1, keepdims=True)
    rows = rows * lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + eps)
    scale, bias = (lax.broadcast_to_rank(row, x.ndim) for row in (scale, bias))
    return (rows * scale + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... W"], scale: Float[Array, "W"], bias: Float[Array, "W"], eps: float
) -> Float[Array, "... W"]:
    """Layer normalisation, computed in float32 and returned in the dtype of x."""
    scale, bias = (lax.broadcast_to_rank(row, x.ndim) for row in (scale, bias))
    return (_standardise(x, eps)[0] * scale + bias).astype(x.dtype)


def _standardise(x: Array, eps: float) -> tuple[Array, Array]:
    """x standardised to mean 0 and variance 1 in float32, and the factor applied."""
    x = x.astype(jnp.float32)
    return _unit_rms(x - x.mean(-1, keepdims=True), eps)


def _layer_norm_backward(eps: float, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    # Hand-written: in the derivative that JAX generates, XLA:CPU computes the sums over rows and columns one entry at a
    # time, ten times slower.
    x, scale = residuals
    W, dtype = x.shape[-1], x.dtype
    x, gradient = defer_statistics(x, gradient.astype(jnp.float32))
    x, factor = _standardise(x, eps)
    inner = gradient * lax.broadcast_to_rank(scale, x.ndim)
    outer = factor * (inner - row_sums(inner) / W - x * (row_sums(inner * x) / W))
    return outer.astype(dtype), column_sums(gradient * x), column_sums(gradient)


layer_norm.defvjp(lambda x, scale, bias, eps: (layer_norm(x, scale, bias, eps), (x, scale)), _layer_norm_backward)
