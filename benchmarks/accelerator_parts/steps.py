"""Train steps at growing batches: speed, utilisation, predicted and actual memory, and the longest operations."""

import dataclasses
import gzip
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sides
import sides_pathflip2
from roofline import shares
from sides import Job, Peak, make_inputs, our_batch, our_parameters, our_training

from accelerator_parts import CURE, FAULT, Context, Row, Rows

GB, GIB = 1e9, 2**30
BATCHES, SMALL_BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 2)
REGIONS = {"pathflip": 24, "pathflip2": 16}  # as the jobs of step.py
LONGEST = 12
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class Training:
    """A family's model and optimizer on the device, and its step compiled for batches of any size."""

    def __init__(self, family: str, context: Context, **settings: Any) -> None:
        import jax

        from pathflip_jax.losses.pathflip2 import SigmoidLossConfig
        from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig
        from pathflip_jax.training.objectives import sigmoid_alignment

        module = sides if family == "pathflip" else sides_pathflip2
        self.sizes = module.SMALL if context.small else module.BASE
        self.regions = 2 if context.small else REGIONS[family]
        kind, stage = PathFLIPConfig, None
        if family == "pathflip2":
            kind, stage = PathFLIP2Config, sigmoid_alignment(SigmoidLossConfig())
        self.config = dataclasses.replace(kind(**self.sizes), compute_dtype=context.dtype, **settings)
        self.step, optimizer = our_training(self.config, stage)
        self.params = our_parameters(self.config, None)
        self.opt_state = jax.jit(optimizer.init)(self.params)

    def batch(self, slides: int, regions: int | None = None) -> sides.Batch:
        """Batch of that many slides on the device."""
        job = Job("train", slides, regions or self.regions)
        return our_batch(job, make_inputs(job, self.sizes))

    def compile(self, batch: sides.Batch):
        """Compile the step for batches of these shapes (arrays or their shapes)."""
        return self.step.lower(self.params, {}, self.opt_state, batch, np.int32(0)).compile()

    def run(self, compiled, batch: sides.Batch, steps: int) -> list[float]:
        """Run that many steps; the seconds of each."""
        import jax

        seconds = []
        for number in range(steps):
            start = time.perf_counter()
            given = self.params, {}, self.opt_state, batch, np.int32(number)
            self.params, self.opt_state, metrics = jax.block_until_ready(compiled(*given))
            seconds.append(time.perf_counter() - start)
        if not np.isfinite(float(metrics["loss"])):
            raise FloatingPointError(f"the loss is {float(metrics['loss'])} after {steps} steps")
        return seconds


def whole_bytes(compiled) -> int:
    """Bytes that the compiler planned for a program with its arguments."""
    from pathflip_jax.runtime import memory

    return compiled.memory_analysis().argument_size_in_bytes + memory.needed_bytes(compiled)


def run(context: Context, family: str) -> Rows:
    """One row per batch size until one does not fit, then the longest operations of the largest that did."""
    import jax

    from pathflip_jax.model import flops
    from pathflip_jax.monitoring.telemetry import peak
    from pathflip_jax.runtime import memory
    from pathflip_jax.runtime.sharding import make_mesh

    training, ran = Training(family, context), None
    if context.platform == "cpu":
        peak_rate = peak(make_mesh(), context.dtype)
    else:
        peak_rate = peak(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), context.dtype)
    start = time.monotonic()
    for slides in SMALL_BATCHES if context.small else BATCHES:
        if time.monotonic() - start > context.limit / 2:
            yield Row(
                "growing batches", {"slides": slides, "note": "not tried: half of the part's time limit is used up"}
            )
            break
        try:
            batch = training.batch(slides)
            compiled = training.compile(batch)
            needed, free = memory.needed_bytes(compiled), memory.free_bytes(jax.local_devices()[0])
            if free is not None and needed > free:
                told = f"refused before it ran: {needed / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free"
                yield Row("growing batches", {"slides": slides, "note": told})
                break
            gauge = Peak("ours", context.platform)
            seconds = statistics.median(training.run(compiled, batch, 3 if context.small else 8)[2:])
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            fault = f"{slides} slides ran out of memory ({str(error).splitlines()[0]})"
            yield Row(
                "growing batches",
                {
                    "slides": slides,
                    FAULT: fault,
                    CURE: "the memory check missed it: fix pathflip_jax/runtime/memory.py",
                },
            )
            break
        useful = float(jax.jit(lambda b: flops.model_flops(training.config, b.patch_mask, b.text_rows))(batch))
        found = {
            "slides": slides,
            "slides_per_second": slides / seconds,
            "step_ms": 1e3 * seconds,
            "utilisation": useful / seconds / peak_rate.rate if peak_rate else None,
            "peak_gb": gauge.bytes() / GB,
            "planned_gb": whole_bytes(compiled) / GB,
        }
        yield Row("growing batches", found)
        ran = compiled, batch
    if peak_rate:
        yield Row("utilisation", {"counted against": peak_rate.source, "TFLOP/s": peak_rate.rate / 1e12})
    if ran:
        yield from profile(training, *ran)


def profile(training: Training, compiled, batch: sides.Batch) -> Rows:
    """Longest operations of a step, from the trace of `jax.profiler`."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            training.run(compiled, batch, 1)
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(trace) as file:
            events = json.load(file)["traceEvents"]
    _, operations = shares(device_events(events), compiled.as_text())
    total = sum(operations.values())
    for name, seconds in sorted(operations.items(), key=lambda item: -item[1])[:LONGEST]:
        row = {"operation": name, "ms": 1e3 * seconds, "share": seconds / total}
        yield Row(f"longest operations, {len(batch.patches)} slides a step", row)


def device_events(events: list[dict]) -> list[dict]:
    """Device events, each with the name of its operation in `args.hlo_op`.

    A GPU has one line of events per stream, a TPU one line of operations; on a CPU, operations are mixed with other
    calls. Other lines of a device summarise these (steps, modules, scopes) and would count time twice.
    """
    lines = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    with_streams = {pid for (pid, _), name in lines.items() if name.startswith("Stream")}
    with_operations = {pid for (pid, _), name in lines.items() if name == "XLA Ops"} - with_streams
    found = []
    for event in events:
        if "dur" not in event:
            continue
        pid, line, about = event.get("pid"), lines.get((event.get("pid"), event.get("tid")), ""), event.get("args", {})
        if pid in with_streams:
            kept = line.startswith("Stream")
        elif pid in with_operations:
            kept = line == "XLA Ops"
        else:
            kept = "hlo_op" in about
        if kept:
            found.append(event | {"args": {"hlo_op": about.get("hlo_op", event["name"])}})
    return found
