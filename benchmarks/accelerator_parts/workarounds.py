"""Ablation of the workarounds for XLA on CPUs, on this device: the step's time and memory.

The library switches these forms by platform (`pathflip_jax.ops.platform`). Here the step on a CPU is compiled with the
plain forms, and on any other device with the CPU forms, by replacing functions before tracing; the losses must agree.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

from accelerator_parts import CURE, FAULT, Context, Row, Rows
from accelerator_parts.steps import GB, Training, whole_bytes

AGREE = 0.01  # relative difference of the losses, whose sums round differently in bfloat16
REDRAWN = "dropout drawn by jax.random"  # drops other entries, so that the loss differs


def run(context: Context, family: str) -> Rows:
    """The train step as shipped, then with each form in turn, then with all; at small sizes the first and last."""
    slides, forms, first = 2 if context.small else 16, compared_forms(context.platform), None
    for name in list(forms)[:: len(forms) - 1] if context.small else forms:
        with replace(forms[name]):
            row, loss = measure(Training(family, context), slides, 3 if context.small else 8)
        first = loss if first is None else first
        if REDRAWN not in name and abs(loss - first) > AGREE * abs(first):
            row[FAULT] = f"{family} {name}: the loss is {loss:.4f}, as shipped {first:.4f}"
            row[CURE] = "one of the two forms is wrong on this device"
        yield Row(f"{family}, {slides} slides", {"step": name} | row)


def measure(training: Training, slides: int, steps: int) -> tuple[dict[str, float], float]:
    """Milliseconds and planned bytes of a step, and the loss of the first, before any update."""
    import jax
    import numpy as np

    batch = training.batch(slides)
    compiled = training.compile(batch)
    given = training.params, {}, training.opt_state, batch, np.int32(0)
    training.params, training.opt_state, metrics = compiled(*given)
    jax.block_until_ready(training.params)
    seconds = statistics.median(training.run(compiled, batch, steps)[1:])
    return {"ms": 1e3 * seconds, "planned_gb": whole_bytes(compiled) / GB}, float(metrics["loss"])


def switches() -> dict[tuple[str, str], list[Callable]]:
    """Operations with one form for CPUs and one for all other platforms, by the names of both forms."""
    from pathflip_jax.ops import attention, matmul, patch_pooling, platform, recompute

    return {
        ("fusion barriers", "no fusion barriers"): [platform.fusion_barrier],
        ("sums as products", "sums as sums"): [matmul.row_sums, matmul.column_sums, patch_pooling.sum_regions],
        ("kernel gradients over joined axes", "kernel gradients over all axes"): [matmul.kernel_gradient],
        ("statistics of norms deferred", "statistics of norms not deferred"): [recompute.defer_statistics],
        ("gradients of attention by sums over keys", "gradients of attention by what was pooled"): [
            attention.score_gradient,
            attention.saved_output,
        ],
    }


def cpu_forms() -> dict[str, dict[Any, Callable]]:
    """CPU forms, each as the switched operations and their replacements."""
    return {cpu: {switch: switch.cpu for switch in found} for (cpu, _), found in switches().items()}


def plain_forms() -> dict[str, dict[Any, Callable]]:
    """Forms of all other platforms, in the same layout, and dropout drawn by `jax.random`."""
    import jax
    import jax.numpy as jnp

    from pathflip_jax.ops.dropout import drop

    def plain_drop(x, rate: float, seed):
        kept = jax.random.bernoulli(jax.random.wrap_key_data(seed), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)

    plain = {name: {switch: switch.default for switch in found} for (_, name), found in switches().items()}
    return plain | {REDRAWN: {drop: plain_drop}}


def compared_forms(platform: str) -> dict[str, dict[Any, Callable]]:
    """The step as shipped on a platform, then with each of the other platforms' forms, then with all of them."""
    others = plain_forms() if platform == "cpu" else cpu_forms() | {REDRAWN: plain_forms()[REDRAWN]}
    together = {function: other for form in others.values() for function, other in form.items()}
    return {"as it is": {}} | others | {f"all of these, {REDRAWN}": together}


@contextlib.contextmanager
def replace(functions: dict[Any, Callable]) -> Iterator[None]:
    """Replace functions wherever the library refers to them by name, and clear traced programs."""
    import jax
    from jax import lax

    modules = [module for name, module in sys.modules.items() if name.startswith("pathflip_jax")] + [lax]
    held = [
        (module, name, value)
        for module in modules
        for name, value in list(vars(module).items())
        if any(value is function for function in functions)
    ]
    by_id = {id(function): other for function, other in functions.items()}
    jax.clear_caches()
    try:
        for module, name, value in held:
            setattr(module, name, by_id[id(value)])
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)
        jax.clear_caches()
