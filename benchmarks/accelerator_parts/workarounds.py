"""What was done for XLA on CPUs, with and without, on this device: the step's time and memory.

A workaround is taken out by putting its plain form in its place before the step is traced; the losses must agree.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

from accelerator_parts import CURE, FAULT, Context, Row, Rows
from accelerator_parts.steps import GB, Training, whole_bytes

AGREE = 0.01  # of the loss, whose sums are rounded otherwise in bfloat16
REDRAWN = "dropout drawn by jax.random"  # other entries fall, and the loss is another


def run(context: Context, family: str) -> Rows:
    """The train step as it is, then without each workaround, then without any; at small sizes the first and last."""
    slides, forms, first = 2 if context.small else 16, plain_forms(), None
    for name in list(forms)[:: len(forms) - 1] if context.small else forms:
        with replace(forms[name]):
            row, loss = measure(Training(family, context), slides, 3 if context.small else 8)
        first = loss if first is None else first
        if REDRAWN not in name and abs(loss - first) > AGREE * abs(first):
            row[FAULT] = f"{family} {name}: the loss is {loss:.4f}, as it is {first:.4f}"
            row[CURE] = "one of the two forms is wrong on this device"
        yield Row(f"{family}, {slides} slides", {"step": name} | row)


def measure(training: Training, slides: int, steps: int) -> tuple[dict[str, float], float]:
    """Milliseconds and planned bytes of a step; and the loss of the first, before which nothing was learnt."""
    import jax
    import numpy as np

    batch = training.batch(slides)
    compiled = training.compile(batch)
    given = training.params, {}, training.opt_state, batch, np.int32(0)
    training.params, training.opt_state, metrics = compiled(*given)
    jax.block_until_ready(training.params)
    seconds = statistics.median(training.run(compiled, batch, steps)[1:])
    return {"ms": 1e3 * seconds, "planned_gb": whole_bytes(compiled) / GB}, float(metrics["loss"])


def plain_forms() -> dict[str, dict[Any, Callable]]:
    """Each workaround's functions, and what stands in their place without it."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from pathflip_jax.ops.dropout import drop
    from pathflip_jax.ops.matmul import column_sums, row_sums

    def plain_drop(x, rate: float, seed):
        kept = jax.random.bernoulli(jax.random.wrap_key_data(seed), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)

    barriers = {lax.optimization_barrier: lambda operand: operand}
    sums = {
        row_sums: lambda x: jnp.sum(x, -1, keepdims=True),
        column_sums: lambda x: jnp.sum(x.reshape(-1, x.shape[-1]), 0),
    }
    hashed = {drop: plain_drop}
    return {
        "as it is": {},
        "without fusion barriers": barriers,
        "sums as sums, not products": sums,
        "neither barriers nor products": barriers | sums,
        REDRAWN: hashed,
        f"none of them, {REDRAWN}": barriers | sums | hashed,
    }


@contextlib.contextmanager
def replace(functions: dict[Any, Callable]) -> Iterator[None]:
    """Put others in the place of functions, wherever the library holds them by name; what was traced is forgotten."""
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
