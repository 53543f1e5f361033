"""Values computed again for the gradient in place of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from pathflip_jax.ops.platform import by_platform


def defer_until(x: Array, gradient: Array) -> tuple[Array, Array]:
    """Both, but x only when `gradient` is there: what is computed of it once more is not computed ahead and kept.

    Without it XLA finds that the forward pass computes the same, and keeps that, on every platform.
    """
    return lax.optimization_barrier((x, gradient))


def undeferred(x: Array, gradient: Array) -> tuple[Array, Array]:
    """The plain form of `defer_until`."""
    return x, gradient


# Of a row's few statistics, which other platforms compute again within the fusion that asks for them: XLA for TPU would
# write both operands of a barrier to memory.
defer_statistics = by_platform(cpu=defer_until, default=undeferred)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recompute(function: Callable[[Array, Any], Array], x: Array, module: Any) -> Array:
    """function(x, module), whose inner values are computed again for the gradient: memory for a little time."""
    return function(x, module)


def _recompute_backward(function: Callable[[Array, Any], Array], kept: tuple[Array, Any], gradient: Array):
    x, gradient = defer_until(kept[0], gradient)
    return jax.vjp(function, x, kept[1])[1](gradient)


recompute.defvjp(lambda function, x, module: (function(x, module), (x, module)), _recompute_backward)
