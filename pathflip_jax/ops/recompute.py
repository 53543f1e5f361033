"""Rematerialisation: values recomputed in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from pathflip_jax.ops.platform import by_platform


def defer_until(x: Array, gradient: Array) -> tuple[Array, Array]:
    """Both arrays, with x made to depend on `gradient`, so that its recomputation waits for the backward pass.

    Without this dependency XLA merges the recomputation with the forward pass and keeps the result, on every platform.
    """
    return lax.optimization_barrier((x, gradient))


def undeferred(x: Array, gradient: Array) -> tuple[Array, Array]:
    """No-op counterpart of `defer_until`."""
    return x, gradient


# For per-row statistics. Other platforms recompute them inside the fusion that uses them; a barrier would make XLA:TPU
# write both operands to memory.
defer_statistics = by_platform(cpu=defer_until, default=undeferred)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recompute(function: Callable[[Array, Any], Array], x: Array, module: Any) -> Array:
    """function(x, module) with its intermediates rematerialised in the backward pass, trading time for memory."""
    return function(x, module)


def _recompute_backward(function: Callable[[Array, Any], Array], kept: tuple[Array, Any], gradient: Array):
    x, gradient = defer_until(kept[0], gradient)
    return jax.vjp(function, x, kept[1])[1](gradient)


recompute.defvjp(lambda function, x, module: (function(x, module), (x, module)), _recompute_backward)
