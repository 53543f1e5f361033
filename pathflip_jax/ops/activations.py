"""Activation functions as PyTorch computes them."""

import math

import jax
from jaxtyping import Array


def gelu(x: Array) -> Array:
    """Exact GELU, by erf; `jax.nn.gelu` uses the costlier erfc."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x: Array) -> Array:
    """GELU's approximation by a sigmoid, as in CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)
