"""Shapes and dtypes that signatures tell, checked in every call: in the tests of operations, networks and losses."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from beartype import beartype
from flax import nnx

ROOMS = ("pathflip_jax.ops", "pathflip_jax.model", "pathflip_jax.vision", "pathflip_jax.losses")


def arrays_checked(function: Callable) -> Callable:
    """A function whose arrays beartype checks, but not those of NumPy; what else it takes, it may refuse by itself."""
    hints = function.__annotations__
    function.__annotations__ = {
        name: hint for name, hint in hints.items() if "jaxtyping." in repr(hint) and "[ndarray" not in repr(hint)
    }
    checked = beartype(function)

    def check(*arguments: Any, **named: Any) -> Any:
        return checked(*map(_as_jax, arguments), **{name: _as_jax(value) for name, value in named.items()})

    return check


def _as_jax(value: Any) -> Any:
    """An array of NumPy, or a constant of a program, as an array of JAX, which takes them all."""
    if type(value) in (tuple, list):
        return type(value)(map(_as_jax, value))
    if isinstance(value, nnx.Variable):
        return value[...]
    if isinstance(value, jax.Array) or not (hasattr(value, "dtype") and hasattr(value, "__array__")):
        return value
    with jax.ensure_compile_time_eval():
        return jnp.asarray(np.asarray(value))


def install() -> None:
    """Have the rooms imported with their checks, which `strict` switches on: modules are imported once a session."""
    sys.modules["pathflip_shapes"] = sys.modules[__name__]  # a name that the hook can import
    jaxtyping.install_import_hook(ROOMS, "pathflip_shapes.arrays_checked")
    jaxtyping.config.update("jaxtyping_disable", True)


@contextmanager
def strict() -> Iterator[None]:
    """Shapes and dtypes are those of the signatures, and no array is broadcast to another rank unsaid."""
    jaxtyping.config.update("jaxtyping_disable", False)
    try:
        with jax.numpy_rank_promotion("raise"):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", True)
