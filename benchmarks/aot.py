"""Ahead-of-time prediction of a TPU pod: compile the training step for a topology, read memory and traffic, estimate.

libtpu compiles without the hardware (`pip install pathflip-jax[aot]`). The step is that of `pathflip train`
with a config, on batches of the shapes that its pipeline makes (texts of real lengths, packed). Each chip has
`--slides` slides, so that 256 chips have 4,096; with `--region N`, N chips share the regions of these slides. The last
line printed is

    peak_bytes=… largest_batch=… efficiency_exposed=…% efficiency_overlapped=…%

All layers are compiled, which takes minutes. For models that are too deep, `--fit` compiles steps with two small
numbers of layers instead and extrapolates bytes linearly; give even numbers, because every second layer attends to
patches. With `--whole` it also reports the error of the extrapolation. At twelve layers it saves no time: the compiler
generates machine code once for all identical layers. Peak memory has a part that does not grow with the batch
(parameters, moments and float32 gradients, all known) and a part that does: `largest_batch` is the largest batch, in
steps of `--step` slides per chip, for which both together fit in the memory that the compiler may use on a chip;
`--confirm` compiles it with all layers.

    compute     useful FLOPs of a chip's slides (roofline.py) over half of the chip's published bf16 rate
    exposed     compute / (compute + bytes on the wire over the published link rate)
    overlapped  the same, without collectives that the schedule overlaps with compute (traffic.py); the JSON also has
                `bounded`, where compute hides communication for no longer than the compiler's estimate of its time

`--no-overlap` compiles without the options that overlap a TPU's computation and communication
(`runtime.compilation.TPU_OVERLAP`), which shows their effect. In the plot, a line is fitted to the compiled topologies
of a chip: the waiting time of n chips has a term in (n - 1) / n, as in a ring, and one in n - 1, as in gathers of all
slides, by least squares.

Single slices only: traffic between slices, over the data centre's network, is not counted.

    python benchmarks/aot.py --topology v5e:16x16 --json benchmarks/results/aot.json
    python benchmarks/aot.py --topology v5e:2x4 --fit 2 4 --whole --confirm
    python benchmarks/aot.py --plot benchmarks/results/aot.png --json benchmarks/results/aot.json
    python benchmarks/aot.py --topology v6e:16x16 --fsdp 16 -- --config.model.remat=False
    python benchmarks/aot.py --topology v5e:2x4 --region 8 --slides 1 --step 1 -- --config.data.regions=1024
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import describe
from roofline import LENGTHS, Shapes, parts
from sides import S
from topology import ENVIRONMENT, hbm_limit, lower, make_mesh, open_topology, with_layers
from traffic import Traffic, read_traffic

# Rates of the chips, from cloud.google.com/tpu/docs/v5e and /v6e: bf16 FLOP/s; bytes/s to the other chips, one way of
# "bidirectional inter-chip interconnect bandwidth" (400 and 800 GB/s).
CHIPS = {"v5e": (197e12, 200e9), "v6e": (918e12, 400e9)}
UTILISATION = 0.5  # fraction of the peak rate that compute reaches, assumed


class Compiled(NamedTuple):
    """Compiler's figures for a step with that many layers: bytes, traffic and FLOPs per chip; seconds to compile."""

    layers: int
    slides: int
    peak_bytes: float
    parameter_bytes: float
    code_bytes: float
    wire_bytes: float
    synchronous_bytes: float
    waited_bytes: float
    flops: float
    seconds: float

    @property
    def fixed_bytes(self) -> float:
        """Part of the peak that does not depend on the batch: parameters, two moments, float32 gradients, and code."""
        return 4 * self.parameter_bytes + self.code_bytes

    def extrapolate(self, more: "Compiled", layers: int) -> "Compiled":
        """Linear extrapolation of two steps to that many layers."""
        share = (layers - self.layers) / (more.layers - self.layers)
        continued = {
            name: getattr(self, name) + share * (getattr(more, name) - getattr(self, name))
            for name in self._fields[2:-1]
        }
        return self._replace(layers=layers, seconds=self.seconds + more.seconds, **continued)


class Efficiency(NamedTuple):
    """Fraction of a step that is useful compute.

    `exposed` waits for all traffic, `overlapped` for traffic without concurrent compute, `bounded` also for traffic
    that the concurrent compute is too short to hide.
    """

    exposed: float
    overlapped: float
    bounded: float


def predict(compute_seconds: float, found: Compiled, link: float) -> Efficiency:
    """Efficiency by a fixed formula: compute over compute plus communication."""
    sent = (found.wire_bytes, found.synchronous_bytes, found.waited_bytes)
    return Efficiency(*(compute_seconds / (compute_seconds + bytes_ / link) for bytes_ in sent))


def largest_batch(peak: float, fixed: float, slides: int, limit: float, step: int) -> int:
    """Largest number of slides per chip, a multiple of `step`; the part of `peak` above `fixed` grows with slides."""
    return max(int((limit - fixed) * slides / (peak - fixed)) // step * step, 0)


def step_flops(config, layers: int, slides: int) -> float:
    """Useful FLOPs of one step over that many full slides with texts of real lengths, without the optimizer."""
    data, model = config.data, with_layers(config, layers)
    lengths, patches = json.loads(LENGTHS.read_text())["slides"], data.regions * (data.patch_slots or S)
    forward = (parts(model, Shapes(slides, data.regions, patches, tuple(own)), 2, training=False) for own in lengths)
    return 3 * sum(part.operations for found in forward for part in found) / len(lengths)


def compile_step(
    config, layers: int, slides: int, mesh, chip: str, overlap: bool, keep: Path | None
) -> tuple[Compiled, Traffic]:
    """Compile a step and return its memory and traffic; its HLO is written to the folder `keep`.

    Raises MemoryError if the step does not fit on the chip.
    """
    import jax

    from pathflip_jax.runtime.compilation import compiler_options

    lowered, held = lower(config, layers, slides, mesh)
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=compiler_options(platform="tpu") if overlap else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(f"{slides} slides per chip do not fit: {str(error).splitlines()[0]}") from None
        raise
    seconds = time.perf_counter() - start
    plan, program = compiled.memory_analysis(), compiled.as_text()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{chip}_{mesh.size}_layers{layers}_slides{slides}.txt").write_text(program)
    traffic = read_traffic(program, mesh.size)
    own = plan.output_size_in_bytes - plan.alias_size_in_bytes
    code = plan.generated_code_size_in_bytes
    peak = plan.argument_size_in_bytes + own + plan.temp_size_in_bytes + code
    rate, link = CHIPS[chip]
    compute = step_flops(config, layers, slides) / mesh.shape["region"] / (UTILISATION * rate)
    waited = traffic.waited_bytes(compute, link)
    flops = compiled.cost_analysis()["flops"]
    found = Compiled(
        layers,
        slides,
        peak,
        held,
        code,
        traffic.wire_bytes,
        traffic.synchronous_bytes,
        waited,
        flops,
        round(seconds, 1),
    )
    return found, traffic


def show(traffic: Traffic, most: int = 6) -> str:
    """The largest collectives of a program as text, with kind, dtype and source."""
    rows = sorted(traffic.collectives, key=lambda x: -x.wire_bytes)[:most]
    return "\n".join(
        f"  {x.kind} {'/'.join(x.dtypes)} of {x.bytes / 1e6:.1f} MB over {x.devices}, "
        f"{'overlapped' if x.overlaps else 'not overlapped'}: {x.source or 'several'}"
        for x in rows
    )


def run(options: argparse.Namespace) -> dict:
    """Compile and predict according to the options; print the results, the summary last."""
    from pathflip_jax.training import settings

    chip = options.topology.partition(":")[0]
    if chip not in CHIPS:
        raise ValueError(f"--topology {options.topology}: expected a chip with known rates: {', '.join(CHIPS)}")
    config, _ = settings.parse([f"--config={options.config}", "--workdir=.", *options.more])
    devices = open_topology(options.topology)
    mesh, limit = make_mesh(devices, options.fsdp, options.region), hbm_limit(devices[0])
    layers, slides, shares = config.model.layers, options.slides, len(devices) // options.region
    print(f"{options.topology}: {len(devices)} devices of {limit / 2**30:.2f} GiB, {slides * shares} slides")

    def compiled(layers: int, slides: int = slides) -> Compiled:
        found, traffic = compile_step(config, layers, slides, mesh, chip, options.overlap, options.hlo)
        print(f"{layers} layers, {slides} slides per chip, compiled in {found.seconds:.0f} s: {gigabytes(found)}")
        print(show(traffic), flush=True)
        return found

    found, result = step_figures(options, compiled, layers)
    batch = largest_batch(found.peak_bytes, found.fixed_bytes, slides, limit, options.step)
    while options.confirm and batch:
        try:
            result["confirmed"] = compiled(layers, batch)._asdict()
            break
        except MemoryError as error:
            print(error, flush=True)
            batch -= options.step
    rate, link = CHIPS[chip]
    compute = step_flops(config, layers, slides) / options.region / (UTILISATION * rate)
    efficiency = predict(compute, found, link)
    print(
        f"peak_bytes={found.peak_bytes:.0f} largest_batch={batch * shares} "
        f"efficiency_exposed={efficiency.exposed:.1%} efficiency_overlapped={efficiency.overlapped:.1%}"
    )
    return result | {
        "devices": len(devices), "hbm_limit_bytes": limit, "compute_seconds": compute, "peak_bytes": found.peak_bytes,
        "largest_batch_per_share": batch, "largest_batch": batch * shares, "efficiency": efficiency._asdict(),
    }  # fmt: skip


def step_figures(
    options: argparse.Namespace, compiled: Callable[[int], Compiled], layers: int
) -> tuple[Compiled, dict]:
    """Figures of a step with all layers, compiled, extrapolated or both, and the intermediate results."""
    found, result = None, {}
    if options.fit:
        few, more = (compiled(n) for n in options.fit)
        found = few.extrapolate(more, layers)
        result |= {"compiled": [few._asdict(), more._asdict()], "line": found._asdict()}
        print(f"{layers} layers, extrapolated: {gigabytes(found)}")
    if options.whole or not options.fit:
        whole = compiled(layers)
        result["whole"] = whole._asdict()
        if found is not None:
            names = [name for name in Compiled._fields[2:-1] if getattr(whole, name)]
            result["deviation"] = {name: getattr(found, name) / getattr(whole, name) - 1 for name in names}
            print("errors of the extrapolation:", ", ".join(f"{n} {x:+.1%}" for n, x in result["deviation"].items()))
        found = whole
    return found, result


def gigabytes(found: Compiled) -> str:
    """Peak and traffic as readable text."""
    return (
        f"peak {found.peak_bytes / 1e9:.2f} GB; each chip sends {found.wire_bytes / 1e9:.3f} GB, "
        f"{found.synchronous_bytes / 1e9:.3f} GB of it not overlapped with compute"
    )


def interpolate(devices: np.ndarray, efficiency: np.ndarray, chips: np.ndarray) -> np.ndarray:
    """Efficiency interpolated to other numbers of chips; a single chip has no communication."""

    def shares(n: np.ndarray) -> np.ndarray:
        terms = np.stack([(n - 1) / n, n - 1], axis=-1)
        return terms if len(devices) > 1 else terms[:, :1]  # a single topology cannot determine the growth

    share, *_ = np.linalg.lstsq(shares(devices), 1 / efficiency - 1)
    return 1 / (1 + shares(chips) @ share)


def plot(results: dict[str, dict], path: Path) -> None:
    """Plot efficiency over the number of chips of each kind; a single chip has no communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    chips = np.geomspace(1, 256, 100)
    for colour, chip in zip(("#1f5a96", "#b8511e"), CHIPS, strict=True):
        shown = [r for name, r in results.items() if name.startswith(chip) and " " not in name]
        devices = np.array([r["devices"] for r in shown])
        for kind, line, point in (("overlapped", "-", "o"), ("exposed", "--", "s")):
            if shown:
                found = np.array([r["efficiency"][kind] for r in shown])
                panel.plot(chips, 100 * interpolate(devices, found, chips), line, color=colour, linewidth=1)
                panel.plot(devices, 100 * found, point, color=colour, markersize=4, label=f"{chip}, {kind}")
    panel.set(xscale="log", xlabel="chips, 16 slides each", ylabel="useful compute, % of the step")
    panel.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
    panel.xaxis.minorticks_off()
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """Command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="e.g. v5e:2x4, v5e:8x8, v5e:16x16, v6e:16x16; chips v5e and v6e")
    parser.add_argument("--config", default="align_large", help="config to train (default align_large)")
    parser.add_argument("--slides", type=int, default=16, help="slides per chip, or per --region chips (16)")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share one copy of the parameters (1)")
    parser.add_argument("--region", type=int, default=1, help="devices that share the regions of each slide (1)")
    parser.add_argument(
        "--fit",
        type=int,
        nargs="*",
        default=[],
        metavar="LAYERS",
        help="two numbers of layers to extrapolate from, e.g. 2 4",
    )
    parser.add_argument("--whole", action="store_true", help="with --fit: compile all layers too")
    parser.add_argument("--confirm", action="store_true", help="also compile the largest batch; takes minutes")
    parser.add_argument(
        "--step", type=int, default=8, help="the largest batch is a multiple of this many slides per chip (8)"
    )
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="overlap communication with computation (default)",
    )
    parser.add_argument("--hlo", type=Path, help="folder to keep the compiled programs in")
    parser.add_argument("--plot", type=Path, help="PNG to write, of all results in --json")
    parser.add_argument("--json", type=Path, help="file to write; it keeps the results of other topologies")
    parser.add_argument("more", nargs="*", metavar="-- SETTING", help="settings as for pathflip train")
    return parser


def main() -> int:
    """Predict for a topology, plot the results, or both; the exit code is 1 for unusable input."""
    options = make_parser().parse_args()
    if len(options.fit) not in (0, 2):
        print("--fit: expected two numbers of layers, e.g. --fit 2 4", file=sys.stderr)
        return 2
    if options.plot and not (options.json and (options.topology or options.json.exists())):
        print("--plot: pass the file with the results by --json", file=sys.stderr)
        return 2
    os.environ.update(ENVIRONMENT)  # before jax is imported
    if options.topology:
        try:
            found = run(options)
        except (ModuleNotFoundError, ValueError, MemoryError) as error:
            print(error, file=sys.stderr)
            return 1
        if options.json:
            save(options, found)
    if options.plot:
        plot(json.loads(options.json.read_text())["results"], options.plot)
    return 0


def save(options: argparse.Namespace, found: dict) -> None:
    """Add a result to the file; results of other topologies stay in it."""
    content = json.loads(options.json.read_text()) if options.json.exists() else {"results": {}}
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "plot", "hlo", "topology")}
    machine = describe("jax", "jaxlib", "libtpu", "flax", "optax")
    axes = {"fsdp": options.fsdp, "region": options.region}
    told = [f"{axis}={size}" for axis, size in axes.items() if size > 1] + ["no overlap"] * (not options.overlap)
    name = " ".join([options.topology, *told, *options.more])
    content["results"][name] = found | {"machine": machine, "settings": settings}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
