"""The one switch between the forms that XLA needs on a CPU and those that every other platform compiles.

It is thrown where a program is traced, so that no other platform's program holds what is there for a CPU. Which form a
platform gets, and what each costs there, is read from compiled programs by `benchmarks/tpu_programs.py`.
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import jax
from jax import lax

T = TypeVar("T")


def traced_for() -> str:
    """The platform that is traced for: that of the mesh in use, whose devices need not be here, else the backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def by_platform(*, cpu: Callable, default: Callable) -> Callable:
    """The function that is `cpu` in programs for a CPU and `default` in all others; both compute the same.

    It has them as attributes, for comparisons of one with the other.
    """

    @wraps(default)
    def chosen(*arguments):
        return (cpu if traced_for() == "cpu" else default)(*arguments)

    chosen.cpu, chosen.default = cpu, default
    return chosen


def unchanged(x: T) -> T:
    """The plain form of a fusion barrier, for an array or several."""
    return x


# XLA for CPU fuses producers into consumers even where that computes them again for each; here fusion ends.
fusion_barrier = by_platform(cpu=lax.optimization_barrier, default=unchanged)
