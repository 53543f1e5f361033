"""Roofline of every part of a step: the larger of operations over the compute rate and bytes over the bandwidth.

Operations are those of the algorithm that the library runs (absorbed key and value projections, packed texts) on valid
patches and real tokens; bytes are the minimum that has to move through memory (`pathflip_jax/model/flops.py`). Prints a
Markdown table, the source of ROOFLINE.md, where `floor` is the lower bound of a part's time.

With `--measure`, the base train step of `step.py` runs on this machine under JAX's profiler. The table compares each
part's time with its lower bound at the rate of this machine's matrix products, and the peak memory and the longest
operations are printed.

    python benchmarks/roofline.py --device cpu --regions 24 --batch 2
    python benchmarks/roofline.py --measure
    python benchmarks/roofline.py --measure --device h200 --batch 64 --dtype bfloat16
    python benchmarks/roofline.py --products
    python benchmarks/roofline.py --device h200 --batch 64 --dtype bfloat16
"""

import argparse
import gzip
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import keep_freed
from sides import BASE, JOBS, SMALL, Job, Peak, make_inputs, our_batch, our_training

from pathflip_jax.model import flops
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.flops import Part, Work

# Operations per second by dtype, and bytes per second of memory: data sheets; `cpu` is two cores as measured by
# benchmarks/step.py (matrix products) and by a copy of 1 GB.
DEVICES = {
    "cpu": ({"float32": 0.25e12, "bfloat16": 0.25e12}, 20e9),
    "h200": ({"float32": 494e12, "bfloat16": 989e12}, 4.8e12),  # float32 as TF32
    "v5e": ({"float32": 98e12, "bfloat16": 197e12}, 0.82e12),
}
# Scopes in the names of the model's operations, and the parts of the table that each contains.
SCOPES = {
    "patch_projection": ("patch projection",),
    "cross_attention": ("queries: projections of cross-attention", "patches: scores and pooling"),
    "query_self_attention": ("queries: self-attention",),
    "query_feed_forward": ("queries: feed-forward",),
    "region_layers": (),
    "text_attention": ("text: projections", "text: attention"),
    "text_feed_forward": ("text: feed-forward",),
    "optimizer": ("optimizer",),
}
# Matrix products of a step on a CPU: large ones, and the many small ones of attention.
PRODUCTS = {
    "large": ((2048, 2048), (2048, 2048)),
    "feed-forward of texts": ((1536, 768), (768, 3072)),
    "scores over the patches of 256 regions": ((256, 192, 256), (256, 256, 256)),
    "scores of the heads of texts": ((192, 96, 64), (192, 64, 96)),
    "pooling of the heads of texts": ((192, 96, 96), (192, 96, 64)),
    "scores of the heads of queries": ((3084, 8, 64), (3084, 64, 8)),
    "a whole slide of PathFLIP2 through a kernel": ((65536, 512), (512, 512)),
}
LENGTHS = Path(__file__).parent / "token_lengths.json"


class Shapes(NamedTuple):
    """Shapes of a step: slides, regions and valid patches of each, and the lengths of all texts of one slide."""

    slides: int
    regions: int
    patches: int
    lengths: tuple[int, ...]


def typical_lengths() -> tuple[int, ...]:
    """The token lengths of a typical slide's caption and subcaptions."""
    return tuple(json.loads(LENGTHS.read_text())["slides"][0])


def parts(config: PathFLIPConfig, shapes: Shapes, width: int, training: bool) -> list[Part]:
    """The parts of a step of these shapes."""
    B, squares = shapes.slides, sum(n * n for n in shapes.lengths)
    work = Work(B, B * shapes.regions, B * shapes.patches, B * sum(shapes.lengths), B * squares)
    return flops.parts(config, work, width, training)


def table(found: list[Part], rate: float, bandwidth: float, slides: int) -> str:
    """The parts as a Markdown table, largest lower bound first."""
    total = sum(part.floor(rate, bandwidth) for part in found)
    rows = ["| part | GFLOP a slide | MB a slide | bound by | floor, ms a slide | share |", "|---|---|---|---|---|---|"]
    for part in sorted(found, key=lambda part: -part.floor(rate, bandwidth)):
        floor = part.floor(rate, bandwidth)
        bound = "arithmetic" if part.operations / rate >= part.bytes / bandwidth else "memory"
        rows.append(
            f"| {part.name} | {part.operations / slides / 1e9:.1f} | {part.bytes / slides / 1e6:.0f} | {bound} | "
            f"{1e3 * floor / slides:.2f} | {floor / total:.0%} |"
        )
    operations = sum(part.operations for part in found)
    rows.append(f"| all | {operations / slides / 1e9:.1f} | | | {1e3 * total / slides:.2f} | 100% |")
    return "\n".join(rows)


class Measured(NamedTuple):
    """A profiled train step: thread seconds by part and by operation, wall seconds, and peak bytes."""

    parts: dict[str, float]
    operations: dict[str, float]
    seconds: float
    peak_bytes: int


def measure(job: Job, sizes: dict, dtype: str) -> Measured:
    """Profile one train step of `step.py` on this machine, compiled as in training."""
    import jax
    from flax import nnx

    from pathflip_jax.model.parameters import flatten
    from pathflip_jax.model.pathflip import PathFLIP

    config = PathFLIPConfig(**sizes, compute_dtype=dtype)
    batch = our_batch(job, make_inputs(job, sizes))
    step, optimizer = our_training(config)
    params = jax.jit(lambda: flatten(PathFLIP(config, nnx.Rngs(0))))()
    opt_state = jax.jit(optimizer.init)(params)
    compiled = step.lower(params, {}, opt_state, batch, np.int32(0)).compile()
    peak = Peak("ours", jax.default_backend())
    seconds = []
    for number in range(5):
        start = time.perf_counter()
        params, opt_state, _ = jax.block_until_ready(compiled(params, {}, opt_state, batch, np.int32(number)))
        seconds.append(time.perf_counter() - start)
    peak_bytes = peak.bytes()  # before the trace, which takes memory too
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=False):
            jax.block_until_ready(compiled(params, {}, opt_state, batch, np.int32(number)))
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(trace) as file:
            events = json.load(file)["traceEvents"]
    return Measured(*shares(events, compiled.as_text()), statistics.median(seconds[2:]), peak_bytes)


def shares(events: list[dict], program: str) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a trace's events by part and by operation; `program` is the compiled HLO with their scopes."""
    scope_of = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', program, re.MULTILINE))
    found, operations = dict.fromkeys((*SCOPES, "other"), 0.0), Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if operation is not None and "dur" in event:
            path = [part for part in re.split(r"[/()]", scope_of.get(operation, "")) if part]
            scope = next((scope for scope in SCOPES if scope in path), "other")
            gradient = ", gradient" * ("transpose" in path)
            name = f"{scope}: {path[-1]}{gradient}" if path else operation.rstrip(".0123456789")
            found[scope] += event["dur"] / 1e6
            operations[name] += event["dur"] / 1e6
    return found, dict(operations)


def measured_table(found: dict[str, float], seconds: float, floors: list[Part], rate: float, bandwidth: float) -> str:
    """Markdown table of each part's time and lower bound; the step's seconds are split by thread time."""
    total, by_name = sum(found.values()), {part.name: part.floor(rate, bandwidth) for part in floors}
    rows = ["| part | measured, ms a step | share | floor, ms | of the floor |", "|---|---|---|---|---|"]
    for scope, thread_seconds in sorted(found.items(), key=lambda item: -item[1]):
        took, floor = seconds * thread_seconds / total, sum(by_name[name] for name in SCOPES.get(scope, ()))
        times = f"{took / floor:.2f}x" if floor else ""
        least = f"{1e3 * floor:.0f}" if floor else ""
        rows.append(
            f"| {scope.replace('_', ' ')} | {1e3 * took:.0f} | {thread_seconds / total:.0%} | {least} | {times} |"
        )
    floor = sum(by_name.values())
    rows.append(f"| all | {1e3 * seconds:.0f} | 100% | {1e3 * floor:.0f} | {seconds / floor:.2f}x |")
    return "\n".join(rows)


def median_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call, after an untimed one."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def our_product_rate(left: tuple[int, ...], right: tuple[int, ...], dtype: str = "float32") -> float:
    """Operations per second of a matrix product of two shapes in JAX, on the backend in use."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    x, y = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in (left, right))
    return 2 * math.prod(left) * right[-1] / median_seconds(lambda: product(x, y).block_until_ready())


def torch_product_rate(
    left: tuple[int, ...], right: tuple[int, ...], dtype: str = "float32", device: str = "cpu"
) -> float:
    """Operations per second of the same product in PyTorch, on a device."""
    import torch

    x, y = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for shape in (left, right))

    def run() -> None:
        x @ y
        if device != "cpu":
            torch.cuda.synchronize()

    return 2 * math.prod(left) * right[-1] / median_seconds(run)


def large_product(device: str, small: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a square product large enough to run at the full rate of a device; tiny with `small`."""
    n = 256 if small else 2048 if device == "cpu" else 8192
    return (n, n), (n, n)


def print_products() -> int:
    """Print the rates of a step's matrix products in JAX and in PyTorch on the CPU."""
    print("| product | JAX, GFLOP/s | PyTorch, GFLOP/s |\n|---|---|---|")
    for name, shapes in PRODUCTS.items():
        rates = (f"{rate(*shapes) / 1e9:.0f}" for rate in (our_product_rate, torch_product_rate))
        print(f"| {name}: {' x '.join(map(str, shapes))} | {' | '.join(rates)} |")
    return 0


def print_measured(options: argparse.Namespace, bandwidth: float) -> int:
    """Measure a train step of `step.py` and print it with its lower bounds."""
    import jax

    job, sizes = JOBS[options.job], SMALL if options.small else BASE
    job = job._replace(slides=options.batch or job.slides, regions=options.regions or job.regions)
    rate = options.rate or our_product_rate(*large_product(jax.default_backend()), options.dtype)
    shapes = Shapes(job.slides, job.regions, 256 * job.regions, typical_lengths())
    found = measure(job, sizes, options.dtype)
    width = 2 if options.dtype == "bfloat16" else 4
    floors = parts(PathFLIPConfig(**sizes), shapes, width, True)
    print(f"{jax.devices()[0].device_kind}; matrix products in JAX: {rate / 1e9:.0f} GFLOP/s in {options.dtype}")
    print(f"{job.slides} slides of {job.regions} regions per step; peak memory {found.peak_bytes / 1e9:.2f} GB\n")
    print(measured_table(found.parts, found.seconds, floors, rate, bandwidth))
    total = sum(found.operations.values())
    print("\n| longest operations | ms a step | share |\n|---|---|---|")
    for name, seconds in sorted(found.operations.items(), key=lambda item: -item[1])[:12]:
        print(f"| {name} | {1e3 * found.seconds * seconds / total:.0f} | {seconds / total:.0%} |")
    return 0


def main() -> int:
    """Print the table of one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, help="slides per step (2; with --measure, that of the job)")
    parser.add_argument(
        "--regions", type=int, help="regions per slide, of 256 patches each (24; with --measure, that of the job)"
    )
    parser.add_argument("--rate", type=float, help="operations per second, instead of the rate of --device")
    parser.add_argument("--bandwidth", type=float, help="bytes per second, instead of the bandwidth of --device")
    parser.add_argument("--inference", action="store_true", help="only the forward pass")
    parser.add_argument(
        "--measure", action="store_true", help="run the train step of step.py on this machine and compare"
    )
    parser.add_argument(
        "--products", action="store_true", help="print the rates of a step's matrix products on this CPU"
    )
    parser.add_argument(
        "--job", choices=["train_base", "train_whole_slide"], default="train_base", help="job to measure"
    )
    parser.add_argument("--small", action="store_true", help="measure a tiny model, to check that everything works")
    options = parser.parse_args()
    rates, bandwidth = DEVICES[options.device]
    rate, batch, regions = options.rate or rates[options.dtype], options.batch or 2, options.regions or 24
    shapes = Shapes(batch, regions, 256 * regions, typical_lengths())
    width = 2 if options.dtype == "bfloat16" else 4
    bandwidth = options.bandwidth or bandwidth
    if options.measure or options.products:
        keep_freed()
    if options.products:
        return print_products()
    if options.measure:
        return print_measured(options, bandwidth)
    found = parts(PathFLIPConfig(), shapes, width, not options.inference)
    print(table(found, rate, bandwidth, batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
