"""Memory check: the compiler's planned bytes against the device's peak, and refusal of an oversized step."""

import math

from sides import Batch, Peak

from accelerator_parts import CURE, FAULT, Context, Row, Rows
from accelerator_parts.steps import GB, Training, whole_bytes

MORE, LESS = 1.05, 0.5  # actual over planned bytes, on a device that reports its peak
TABLE = "planned and true"


def run(context: Context) -> Rows:
    """Steps of both families, with and without recomputation, the smallest first: a device's peak only grows."""
    import jax

    slides = 2 if context.small else 8
    cases = []
    for family in ("pathflip2", "pathflip"):
        for remat in (False,) if context.small else (True, False):
            training = Training(family, context, remat=remat)
            compiled = training.compile(training.batch(slides))
            cases.append((whole_bytes(compiled), family, remat))
            del training, compiled
    for planned, family, remat in sorted(cases):
        training = Training(family, context, remat=remat)
        batch = training.batch(slides)
        compiled = training.compile(batch)
        gauge = Peak("ours", context.platform)
        training.run(compiled, batch, 3)
        name = f"{family}, {slides} slides{', remat' * remat}"
        yield Row(TABLE, {"step": name} | judge(planned, gauge.bytes(), context.platform))
        last = training, compiled, batch
        del training, batch, compiled
    yield from refuse(*last, jax.local_devices()[0])


def judge(planned: int, true: int, platform: str) -> dict:
    """Planned and actual memory, with a fault if the device used more than planned or the plan is far too high.

    On a CPU the actual memory is the resident size of the process, including Python and its libraries.
    """
    found = {"planned_gb": planned / GB, "true_gb": true / GB, "true_over_planned": true / planned}
    if platform != "cpu" and not LESS <= true / planned <= MORE:
        found |= {
            FAULT: f"{true / GB:.2f} GB were used, {planned / GB:.2f} GB planned: the memory check misjudges steps",
            CURE: "compare memory_analysis() and memory_stats() of this device; fix pathflip_jax/runtime/memory.py",
        }
    return found


def refuse(training: Training, compiled, batch: Batch, device) -> Rows:
    """Check that a step of twice the free memory is refused with a cure, before it runs."""
    from pathflip_jax.runtime import memory

    free = memory.free_bytes(device)
    if free is None:
        note = f"{device.device_kind} does not report its free memory, so no step is refused on it"
        yield Row("refused", {"note": note})
        return
    times = math.ceil(2 * free / memory.needed_bytes(compiled))
    slides = times * len(batch.patches)
    try:
        compiled = training.compile(enlarge(batch, times))
        memory.check_step(compiled, slides, 1, False, 1, 0)
    except Exception as refusal:  # a device's compiler may refuse first, with its own exception class
        yield Row("refused", {"slides": slides, "said": str(refusal).splitlines()[0]})
        return
    fault = f"a step of {slides} slides was not refused although only {free / GB:.1f} GB are free"
    yield Row("refused", {"slides": slides, FAULT: fault, CURE: "fix pathflip_jax/runtime/memory.py"})


def enlarge(batch: Batch, times: int) -> Batch:
    """Shapes of a batch with `times` as many slides, its one text group also `times` as long."""
    import jax

    def grow(x, axis: int):
        shape = (*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return Batch(
        grow(batch.patches, 0),
        grow(batch.patch_mask, 0),
        jax.tree.map(lambda x: grow(x, 1), batch.text_rows),
        grow(batch.text_index, 0),
        grow(batch.related, 0),
    )
