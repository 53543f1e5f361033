"""The only switch between implementations for XLA:CPU and those for all other platforms.

It is resolved at trace time, so programs for other platforms contain no CPU workarounds. `benchmarks/tpu_programs.py`
reads from compiled programs which implementation a platform gets, and its cost.
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import jax
from jax import lax

T = TypeVar("T")


def target_platform() -> str:
    """Target platform of the trace: that of the current mesh, whose devices may be abstract, else the backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def by_platform(*, cpu: Callable, default: Callable) -> Callable:
    """A function that runs `cpu` in programs for a CPU and `default` in all others; both compute the same result.

    Both are its attributes, so that tests can compare them.
    """

    @wraps(default)
    def chosen(*arguments):
        return (cpu if target_platform() == "cpu" else default)(*arguments)

    chosen.cpu, chosen.default = cpu, default
    return chosen


def unchanged(x: T) -> T:
    """No-op counterpart of a fusion barrier, for one array or several."""
    return x


# Fusion barrier: XLA:CPU fuses producers into consumers even where that recomputes them for each consumer.
fusion_barrier = by_platform(cpu=lax.optimization_barrier, default=unchanged)
