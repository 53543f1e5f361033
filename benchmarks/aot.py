"""A TPU pod, predicted without a TPU: compile the training step for a topology, read memory and traffic, estimate.

libtpu compiles for machines that are not there (`pip install pathflip-jax[aot]`). The step is that of `pathflip train`
with a config, on batches of the shapes that its pipeline makes (texts of real lengths, packed). Each chip has
`--slides` slides, so that 256 chips see 4,096. The last line printed is

    peak_bytes=… largest_batch=… efficiency_exposed=…% efficiency_overlapped=…%

The compiler takes minutes for all layers, so steps of few are compiled (`--fit`) and bytes continued in a straight
line, in pairs because every second layer looks at patches; `--whole` compiles all and says how far the line was off.
Peak memory has a part that does not grow with the batch (parameters, moments and float32 gradients, all known) and one
that does: `largest_batch` is the largest batch, in steps of `--step` slides per chip, whose sum fits what the compiler
allows itself of the chip; `--confirm` compiles it, all layers.

    compute     useful FLOPs of a chip's slides (roofline.py) over half of the chip's published bf16 rate
    exposed     compute / (compute + bytes on the wire over the published link rate)
    overlapped  the same, without collectives that the schedule puts compute beside (traffic.py); the JSON also has
                `bounded`, where compute hides no more than the compiler's estimate of its time

`--no-overlap` compiles without the options that make a TPU compute while it sends (`compilation.TPU_OVERLAP`), which
shows what they are worth. In the plot, a line goes through the compiled topologies of a chip: the time that n chips
wait is a share of (n - 1) / n, as round a ring, and one of n - 1, as of gathers of all slides, by least squares.

Single slices only: traffic between slices, over the data centre's network, is not counted.

    python benchmarks/aot.py --topology v5e:16x16 --json benchmarks/results/aot.json
    python benchmarks/aot.py --topology v5e:2x4 --whole --confirm
    python benchmarks/aot.py --plot benchmarks/results/aot.png --json benchmarks/results/aot.json
    python benchmarks/aot.py --topology v6e:16x16 --fsdp 16 -- --config.model.remat=False
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import describe
from roofline import LENGTHS, Shapes, parts
from sides import S
from traffic import Traffic, read_traffic

from pathflip_jax.model.config import PathFLIPConfig

# Rates of the chips, from cloud.google.com/tpu/docs/v5e and /v6e: bf16 FLOP/s; bytes/s to the other chips, one way of
# "bidirectional inter-chip interconnect bandwidth" (400 and 800 GB/s).
CHIPS = {"v5e": (197e12, 200e9), "v6e": (918e12, 400e9)}
UTILISATION = 0.5  # of the peak, assumed
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
DATA_SIZES = (512, 30523)  # width of CONCH features and BERT's vocabulary, which training takes from its data
SIMULATED_GROUPS = 64


class Compiled(NamedTuple):
    """What the compiler says of a step of so many layers: a chip's bytes, its traffic and FLOPs; seconds to compile."""

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
        """Those of the peak that stay whatever the batch: parameters, two moments, float32 gradients, and code."""
        return 4 * self.parameter_bytes + self.code_bytes

    def line_to(self, more: "Compiled", layers: int) -> "Compiled":
        """The straight line through two steps, continued to so many layers."""
        share = (layers - self.layers) / (more.layers - self.layers)
        continued = {
            name: getattr(self, name) + share * (getattr(more, name) - getattr(self, name))
            for name in self._fields[2:-1]
        }
        return self._replace(layers=layers, seconds=self.seconds + more.seconds, **continued)


class Efficiency(NamedTuple):
    """The share of a step that is useful compute.

    `exposed` waits for all traffic, `overlapped` for what is sent with no compute beside it, `bounded` also for what
    the compute beside has no time to hide.
    """

    exposed: float
    overlapped: float
    bounded: float


def predict(compute_seconds: float, found: Compiled, link: float) -> Efficiency:
    """The fixed formula: compute over compute and communication."""
    sent = (found.wire_bytes, found.synchronous_bytes, found.waited_bytes)
    return Efficiency(*(compute_seconds / (compute_seconds + bytes_ / link) for bytes_ in sent))


def largest_batch(peak: float, fixed: float, slides: int, limit: float, step: int) -> int:
    """The most slides a chip holds, a multiple of `step`: `fixed` bytes stay, the rest of `peak` grows with slides."""
    return max(int((limit - fixed) * slides / (peak - fixed)) // step * step, 0)


def step_flops(config, layers: int, slides: int) -> float:
    """Useful FLOPs of one step over so many full slides with texts of real lengths; without the optimizer's."""
    data, model = config.data, with_layers(config, layers)
    lengths, patches = json.loads(LENGTHS.read_text())["slides"], data.regions * (data.patch_slots or S)
    forward = (parts(model, Shapes(slides, data.regions, patches, tuple(own)), 2, training=False) for own in lengths)
    return 3 * sum(part.operations for found in forward for part in found) / len(lengths)


def open_topology(name: str) -> list:
    """The devices of a topology. Raises ModuleNotFoundError without libtpu, ValueError for an unknown name."""
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "libtpu is not installed, which compiles for TPUs: pip install pathflip-jax[aot]"
        ) from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of the runtime: its type differs between versions
        raise ValueError(f"--topology {name}: {error}; expected a name such as v5e:2x4 or v6e:16x16") from None


def hbm_limit(device) -> float:
    """What the compiler allows itself of a chip's memory, in bytes, as it says when asked for more."""
    import jax
    from jax.sharding import SingleDeviceSharding

    huge = jax.ShapeDtypeStruct((2**36,), np.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return float(found[1]) * 2**30
        raise
    raise RuntimeError(f"{device.device_kind}: 256 GiB were not refused, so the limit of its memory is not known")


def make_batch(config, slides: int, chips: int, sharding):
    """The shapes of a batch, placed: as many rows for texts as groups of real lengths take (`set_text_rows`)."""
    import jax

    from pathflip_jax.data.pipeline import Batch
    from pathflip_jax.data.tokens import TextRows, enough_rows, row_lengths
    from pathflip_jax.run_data import choose_groups

    data, B = config.data, slides * chips
    groups = choose_groups(B, chips * config.train.accumulate)
    longest = [data.caption_length] + [data.subcaption_length] * data.subcaptions
    lengths = [np.minimum(own[: len(longest)], longest) for own in json.loads(LENGTHS.read_text())["slides"]]
    rng = np.random.default_rng(0)
    drawn = [
        np.concatenate([lengths[i] for i in rng.integers(len(lengths), size=B // groups)]).tolist()
        for _ in range(SIMULATED_GROUPS)
    ]
    widths = row_lengths(data.row_step, max(data.caption_length, data.subcaption_length))
    counts = zip(enough_rows(drawn, widths), widths, strict=True)
    R, slots = data.regions, data.patch_slots or S

    def of(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = tuple(TextRows(*[of((groups, n, width), np.int32)] * 3) for n, width in counts if n)
    patches, mask = of((B, R, slots, DATA_SIZES[0]), np.float16), of((B, R, slots), np.bool_)
    number = of((B,), np.int32)
    return Batch(patches, mask, rows, of((B, 1 + data.subcaptions), np.int32), number, number)


def lower(config, layers: int, slides: int, mesh):
    """The training step of a config with so many layers, lowered for a mesh; and the bytes of parameters on a chip."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from pathflip_jax import sharding
    from pathflip_jax.losses import LossConfig
    from pathflip_jax.model.pathflip import abstract_params, unflatten
    from pathflip_jax.optim import OptimConfig, learning_rate, make_optimizer
    from pathflip_jax.stage import alignment, make_step

    model = with_layers(config, layers)
    schedule = learning_rate(OptimConfig(**config.optim), 1000, 1000)
    optimizer = make_optimizer(OptimConfig(**config.optim), schedule)
    stage = alignment(LossConfig(**config.loss), sharding.by_slide(mesh))
    step = make_step(
        stage, lambda p, _: unflatten(model, p), optimizer, schedule, config.train.accumulate, config.train.seed
    )

    def placed(tree):
        places = sharding.placements(mesh, tree)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)

    params = placed(abstract_params(model))
    opt_state = placed(jax.eval_shape(optimizer.init, params))
    whole = NamedSharding(mesh, P())
    batch = make_batch(config, slides, mesh.size, NamedSharding(mesh, sharding.BATCH))
    places = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in params.values())
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*places, whole))
        number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        return jitted.lower(params, {}, opt_state, batch, number), held


def with_layers(config, layers: int) -> PathFLIPConfig:
    """The config's model with so many layers."""
    from pathflip_jax.train import model_config

    return PathFLIPConfig.from_dict(model_config(config, *DATA_SIZES).to_dict() | {"layers": layers})


def compile_step(
    config, layers: int, slides: int, mesh, chip: str, overlap: bool, keep: Path | None
) -> tuple[Compiled, Traffic]:
    """Compile a step: what it takes, and its traffic; its HLO goes to the folder `keep`.

    Raises MemoryError where it does not fit the chip.
    """
    import jax

    from pathflip_jax.compilation import compiler_options

    lowered, held = lower(config, layers, slides, mesh)
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=compiler_options(platform="tpu") if overlap else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(f"{slides} slides a chip do not fit: {str(error).splitlines()[0]}") from None
        raise
    seconds = time.perf_counter() - start
    plan, traffic = compiled.memory_analysis(), read_traffic(program := compiled.as_text(), mesh.size)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{chip}_{mesh.size}_layers{layers}_slides{slides}.txt").write_text(program)
    own = plan.output_size_in_bytes - plan.alias_size_in_bytes
    code = plan.generated_code_size_in_bytes
    peak = plan.argument_size_in_bytes + own + plan.temp_size_in_bytes + code
    rate, link = CHIPS[chip]
    waited = traffic.waited_bytes(step_flops(config, layers, slides) / (UTILISATION * rate), link)
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
    """The largest collectives of a program, by kind, dtype and source."""
    rows = sorted(traffic.collectives, key=lambda x: -x.wire_bytes)[:most]
    return "\n".join(
        f"  {x.kind} {'/'.join(x.dtypes)} of {x.bytes / 1e6:.1f} MB over {x.devices}, "
        f"{'overlapped' if x.overlaps else 'waited for'}: {x.source or 'several'}"
        for x in rows
    )


def make_mesh(devices: list, fsdp: int):
    """The mesh of `pathflip train` over a topology's devices. Raises ValueError where fsdp does not divide them."""
    import jax
    from jax.sharding import AxisType

    from pathflip_jax.sharding import AXES

    if len(devices) % fsdp:
        raise ValueError(f"--fsdp {fsdp}: {len(devices)} devices cannot be shared out so")
    shape, types = (len(devices) // fsdp, fsdp, 1), (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def run(options: argparse.Namespace) -> dict:
    """Compile and predict as the options say; prints what it finds, the summary last."""
    from pathflip_jax import settings

    chip = options.topology.partition(":")[0]
    if chip not in CHIPS:
        raise ValueError(f"--topology {options.topology}: rates are known of {', '.join(CHIPS)}")
    config, _ = settings.parse([f"--config={options.config}", "--workdir=.", *options.more])
    devices = open_topology(options.topology)
    mesh, limit = make_mesh(devices, options.fsdp), hbm_limit(devices[0])
    layers, slides = config.model.layers, options.slides
    print(f"{options.topology}: {len(devices)} devices of {limit / 2**30:.2f} GiB, {slides} slides each")

    def compiled(layers: int, slides: int = slides) -> Compiled:
        found, traffic = compile_step(config, layers, slides, mesh, chip, options.overlap, options.hlo)
        print(f"{layers} layers, {slides} slides a chip, compiled in {found.seconds:.0f} s: {gigabytes(found)}")
        print(show(traffic), flush=True)
        return found

    found, result = take_bytes(options, compiled, layers)
    batch = largest_batch(found.peak_bytes, found.fixed_bytes, slides, limit, options.step)
    while options.confirm and batch:
        try:
            result["confirmed"] = compiled(layers, batch)._asdict()
            break
        except MemoryError as error:
            print(error, flush=True)
            batch -= options.step
    rate, link = CHIPS[chip]
    compute = step_flops(config, layers, slides) / (UTILISATION * rate)
    efficiency = predict(compute, found, link)
    print(
        f"peak_bytes={found.peak_bytes:.0f} largest_batch={batch * len(devices)} "
        f"efficiency_exposed={efficiency.exposed:.1%} efficiency_overlapped={efficiency.overlapped:.1%}"
    )
    return result | {
        "devices": len(devices), "hbm_limit_bytes": limit, "compute_seconds": compute, "peak_bytes": found.peak_bytes,
        "largest_batch_per_chip": batch, "largest_batch": batch * len(devices), "efficiency": efficiency._asdict(),
    }  # fmt: skip


def take_bytes(options: argparse.Namespace, compiled: Callable[[int], Compiled], layers: int) -> tuple[Compiled, dict]:
    """A step of all layers, compiled or by a straight line or both; and what was found on the way."""
    found, result = None, {}
    if options.fit:
        few, more = (compiled(n) for n in options.fit)
        found = few.line_to(more, layers)
        result |= {"compiled": [few._asdict(), more._asdict()], "line": found._asdict()}
        print(f"{layers} layers by a straight line: {gigabytes(found)}")
    if options.whole:
        whole = compiled(layers)
        result["whole"] = whole._asdict()
        if found is not None:
            names = [name for name in Compiled._fields[2:-1] if getattr(whole, name)]
            result["deviation"] = {name: getattr(found, name) / getattr(whole, name) - 1 for name in names}
            print("the line was off by", ", ".join(f"{n} {x:+.1%}" for n, x in result["deviation"].items()))
        found = whole
    return found, result


def gigabytes(found: Compiled) -> str:
    """Peak and traffic, for people."""
    return (
        f"peak {found.peak_bytes / 1e9:.2f} GB, {found.wire_bytes / 1e9:.3f} GB on the wire of a chip, "
        f"{found.synchronous_bytes / 1e9:.3f} GB of them with no compute beside"
    )


def between(devices: np.ndarray, efficiency: np.ndarray, chips: np.ndarray) -> np.ndarray:
    """The efficiency of other numbers of chips; one chip waits for nobody."""

    def shares(n: np.ndarray) -> np.ndarray:
        terms = np.stack([(n - 1) / n, n - 1], axis=-1)
        return terms if len(devices) > 1 else terms[:, :1]  # one topology says nothing of what grows

    share, *_ = np.linalg.lstsq(shares(devices), 1 / efficiency - 1)
    return 1 / (1 + shares(chips) @ share)


def plot(results: dict[str, dict], path: Path) -> None:
    """Efficiency over the chips of each kind, from one chip, which waits for nobody."""
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
                panel.plot(chips, 100 * between(devices, found, chips), line, color=colour, linewidth=1)
                panel.plot(devices, 100 * found, point, color=colour, markersize=4, label=f"{chip}, {kind}")
    panel.set(xscale="log", xlabel="chips, 16 slides each", ylabel="useful compute, % of the step")
    panel.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
    panel.xaxis.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="v5e:2x4, v5e:8x8, v5e:16x16, v6e:16x16 or another of these chips")
    parser.add_argument("--config", default="align_large", help="config to train (default align_large)")
    parser.add_argument("--slides", type=int, default=16, help="slides per chip (16)")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share one copy of the parameters (1)")
    parser.add_argument("--fit", type=int, nargs="*", default=[2, 4], metavar="LAYERS", help="two numbers, or none")
    parser.add_argument("--whole", action="store_true", help="compile all layers: minutes")
    parser.add_argument("--confirm", action="store_true", help="compile all layers at the largest batch: minutes")
    parser.add_argument("--step", type=int, default=8, help="slides per chip that the largest batch is a multiple of")
    parser.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction, default=True, help="send while computing (default)"
    )
    parser.add_argument("--hlo", type=Path, help="folder to keep the compiled programs in")
    parser.add_argument("--plot", type=Path, help="PNG of all results in --json")
    parser.add_argument("--json", type=Path, help="file to write; the results of other topologies stay in it")
    parser.add_argument("more", nargs="*", metavar="-- SETTING", help="settings as for pathflip train")
    return parser


def main() -> int:
    """Predict for a topology, plot what is known, or both; 1 where the input cannot be used."""
    options = make_parser().parse_args()
    if len(options.fit) not in (0, 2) or not (options.fit or options.whole):
        print("--fit: give two numbers of layers, or none with --whole", file=sys.stderr)
        return 2
    if options.plot and not (options.json and (options.topology or options.json.exists())):
        print("--plot: name the file with the results by --json", file=sys.stderr)
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
    """Put a result beside those of other topologies."""
    content = json.loads(options.json.read_text()) if options.json.exists() else {"results": {}}
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "plot", "hlo", "topology")}
    machine = describe("jax", "jaxlib", "libtpu", "flax", "optax")
    name = options.topology + (f" fsdp={options.fsdp}" if options.fsdp > 1 else "")
    name += "" if options.overlap else " no overlap"
    content["results"][name] = found | {"machine": machine, "settings": settings}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
