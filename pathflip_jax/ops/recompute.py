"""Values computed again for the gradient in place of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array


def defer_until(x: Array, gradient: Array) -> tuple[Array, Array]:
    """Both, but x only when `gradient` is there: what is computed of it once more is not computed ahead and kept.

    On every platform: without it XLA finds that the forward pass computes the same, and keeps that.
    """
    return lax.optimization_barrier((x, gradient))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recompute(function: Callable[[Array, Any], Array], x: Array, module: Any) -> Array:
    """function(x, module), whose inner values are computed again for the gradient: memory for a little time."""
    return function(x, module)


def _recompute_backward(function: Callable[[Array, Any], Array], kept: tuple[Array, Any], gradient: Array):
    x, gradient = defer_until(kept[0], gradient)
    return jax.vjp(function, x, kept[1])[1](gradient)


recompute.defvjp(lambda function, x, module: (function(x, module), (x, module)), _recompute_backward)
