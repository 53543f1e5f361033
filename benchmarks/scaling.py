"""Scaling of step time and memory with regions R, slides B and subcaptions K; every point in a separate process.

The step is the one that `pathflip train` compiles for the base config (clip, AdamW, dropout), on random features and
texts of typical lengths. One of R, B, K varies while the others stay at `--at-regions`, `--at-batch`,
`--at-subcaptions`. Time is the median over the steps. Peak memory is the highest resident size while the steps run,
after compilation (VmHWM, reset through clear_refs), or on an accelerator the device's own peak. On a CPU the process
keeps the memory that it frees (`machine.keep_freed`), because the cost of clearing pages again grows faster than the
step's work.

The exponent over the patches is the slope of a least-squares line through log(y - y0) over log(N - N0), where y0 and N0
belong to a step with one region, so that costs that do not depend on patches (texts, optimizer, parameters) are left
out on both axes. It is given over all R and over the larger half of them, where growth faster than linear would show.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot benchmarks/results/scaling.png
    python benchmarks/scaling.py --small            # a small model: takes minutes
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import describe, keep_freed, reset_peak, resident_peak

AXES = {"regions": "R", "batch": "B", "subcaptions": "K"}
CAPTION, SUBCAPTION, ROW_STEP = 222, 58, 128  # mean tokens of real captions and subcaptions
WANTED = 1.05  # largest accepted exponent
DATA_SIZES = {"feature_dim": 512, "vocab_size": 30523}  # training takes these from its records and tokenizer
SMALL = {
    "feature_dim": 64, "embed_dim": 64, "hidden": 128, "layers": 2, "heads": 4, "intermediate": 512,
    "region_heads": 4, "text_region_heads": 4, "vocab_size": 1000,
}  # fmt: skip


class Point(NamedTuple):
    """Sizes of a step."""

    regions: int
    batch: int
    subcaptions: int


def make_points(options: argparse.Namespace) -> dict[str, list[Point]]:
    """Points of each curve, smallest first; the curve of regions is preceded by one region, the fixed part."""
    centre = Point(options.at_regions, options.at_batch, options.at_subcaptions)
    curves = {axis: [centre._replace(**{axis: n}) for n in sorted(getattr(options, axis))] for axis in AXES}
    curves["regions"].insert(0, centre._replace(regions=1))
    return curves


def make_batch(point: Point, slots: int, width: int, vocabulary: int):
    """Random features and tokens in the shapes of the input pipeline, with one text group for all slides."""
    from pathflip_jax.data.batches.packing import TextRows, pack, row_lengths
    from pathflip_jax.data.batches.pipeline import Batch

    rng = np.random.default_rng(0)
    R, B, K = point
    patches = rng.standard_normal((B, R, slots, width), np.float32).astype(np.float16)
    lengths = ([CAPTION] + [SUBCAPTION] * K) * B
    packed = pack([rng.integers(5, vocabulary - 1, n, dtype=np.int32) for n in lengths], row_lengths(ROW_STEP, CAPTION))
    rows = tuple(TextRows(*(x[None] for x in group)) for group in packed.rows)
    number = np.arange(B, dtype=np.int32)
    return Batch(patches, np.ones((B, R, slots), bool), rows, packed.cls_index.reshape(B, 1 + K), number, number)


def run_point(point: Point, options: argparse.Namespace) -> dict:
    """Seconds and bytes of one point, measured in this process."""
    import jax
    from flax import nnx

    from pathflip_jax.model.config import PathFLIPConfig
    from pathflip_jax.model.parameters import flatten, unflatten
    from pathflip_jax.model.pathflip import PathFLIP
    from pathflip_jax.runtime.compilation import compiler_options
    from pathflip_jax.settings.kinds import AlignmentSettings
    from pathflip_jax.training.objectives import alignment
    from pathflip_jax.training.optim import learning_rate, make_optimizer
    from pathflip_jax.training.step import make_step

    config, device = AlignmentSettings(), jax.devices()[0]
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    sizes = dataclasses.asdict(config.model) | DATA_SIZES | (SMALL if options.small else {}) | {"compute_dtype": dtype}
    del sizes["bert"]
    model = PathFLIPConfig.from_dict(sizes)
    schedule = learning_rate(config.optim, 1000, 1000)
    optimizer = make_optimizer(config.optim, schedule)
    step = make_step(alignment(config.loss), lambda p, _: unflatten(model, p), optimizer, schedule, 1, seed=0)
    params = jax.jit(lambda key: flatten(PathFLIP(model, nnx.Rngs(key))))(jax.random.key(0))
    opt_state = jax.jit(optimizer.init)(params)
    batch = jax.device_put(make_batch(point, options.slots, model.feature_dim, model.vocab_size))
    step = jax.jit(step, donate_argnums=(0, 2), compiler_options=compiler_options())
    compiled = step.lower(params, {}, opt_state, batch, np.int32(0)).compile()
    params, opt_state, metrics = compiled(params, {}, opt_state, batch, np.int32(0))
    jax.block_until_ready((params, metrics))
    stats = device.memory_stats()
    if not stats:
        reset_peak()
    seconds = []
    for number in range(1, options.steps + 1):
        start = time.perf_counter()
        params, opt_state, metrics = compiled(params, {}, opt_state, batch, np.int32(number))
        jax.block_until_ready((params, opt_state, metrics))
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(float(metrics["loss"])):
        raise FloatingPointError(f"{point}: the loss is {metrics['loss']}")
    stats, analysis = device.memory_stats(), compiled.memory_analysis()
    return {
        **point._asdict(),
        "patches": point.batch * point.regions * options.slots,
        "text_tokens": sum(group.tokens.size for group in batch.text_rows),
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "peak_bytes": stats["peak_bytes_in_use"] if stats else resident_peak(),
        "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
        "device": f"{device.platform}: {device.device_kind}",
        "dtype": dtype,
        "parameters": sum(x.size for x in params.values()),
    }


def run_apart(point: Point, arguments: list[str]) -> dict:
    """Run `run_point` in a separate process and wait for it. Raises RuntimeError with its last output if it fails."""
    command = [sys.executable, __file__, *arguments, "--point", *map(str, point)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"{point} ended with code {done.returncode} (-9: out of memory): {last}")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x by least squares. Raises ValueError if the logarithm or the line is undefined."""
    if len(x) < 2 or min(*x, *y) <= 0:
        raise ValueError(
            f"no exponent of {y} over {x}: expected two points or more, all above the point with one region"
        )
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fit(curve: list[dict]) -> dict[str, dict]:
    """Exponents of time and peak memory over patches, relative to the first point, which has one region."""
    first, *rest = curve
    found = {}
    for name in ("seconds", "peak_bytes", "temporary_bytes"):
        if any(point[name] is None for point in curve):
            continue
        x, y = ([point[key] - first[key] for point in rest] for key in ("patches", name))
        larger = max(2, len(rest) - len(rest) // 2)
        found[name] = {
            "fixed": first[name],
            "exponent": exponent(x, y),
            "exponent_larger": exponent(x[-larger:], y[-larger:]),
            "over_regions": [point["regions"] for point in rest],
            "over_regions_larger": [point["regions"] for point in rest[-larger:]],
        }
    return found


def plot(curves: dict[str, list[dict]], fits: dict[str, dict], path: Path, title: str) -> None:
    """Plot time and memory over each axis; log-log for the regions, with a linear law for comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for row, (key, unit, label) in enumerate((("seconds", 1, "s per step"), ("peak_bytes", 1e9, "peak memory, GB"))):
        for column, (axis, letter) in enumerate(AXES.items()):
            panel, points = panels[row, column], curves[axis]
            x, y = [point[axis] for point in points], [point[key] / unit for point in points]
            panel.plot(x, y, "o-", color="#1f5a96", markersize=4)
            panel.set_xlabel(f"{letter}, {axis}")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
            if axis == "regions":
                slope = (y[-1] - y[0]) / (x[-1] - x[0])
                line = [y[0] + slope * (n - x[0]) for n in x]
                panel.plot(x, line, "--", color="#999999", label="linear, first to last point")
                panel.set(xscale="log", yscale="log", title=f"exponent {fits[key]['exponent']:.2f} over the patches")
                panel.legend(frameon=False)
            else:
                panel.set_ylim(0, 1.1 * max(y))
            panel.set_xticks(x, list(map(str, x)))
            panel.xaxis.minorticks_off()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """Command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, nargs="+", default=[8, 24, 64, 128, 256])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--subcaptions", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--at-regions", type=int, default=24, help="regions while the others vary")
    parser.add_argument("--at-batch", type=int, default=1, help="slides while the others vary")
    parser.add_argument("--at-subcaptions", type=int, default=8, help="subcaptions while the others vary")
    parser.add_argument("--slots", type=int, default=256, help="patches per region (256)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per point (5)")
    parser.add_argument("--small", action="store_true", help="a small model instead of the base config")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="compute dtype; by default float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument(
        "--point", type=int, nargs=3, metavar=("R", "B", "K"), help="only measure one point and print JSON"
    )
    return parser


def main() -> int:
    """Measure every point, print the tables, write plot and JSON; the exit code is 1 if a point could not be run."""
    options = make_parser().parse_args()
    if options.point:
        keep_freed()
        print(json.dumps(run_point(Point(*options.point), options)))
        return 0
    if min(options.regions) < 2:
        print(
            f"--regions {min(options.regions)}: expected 2 or more; one region is always measured as the fixed part",
            file=sys.stderr,
        )
        return 2
    arguments = [f"--slots={options.slots}", f"--steps={options.steps}"]
    arguments += ["--small"] * options.small + [f"--dtype={options.dtype}"] * bool(options.dtype)
    described, done, curves = describe("jax", "jaxlib", "flax", "optax", "numpy"), {}, {}
    for axis, points in make_points(options).items():
        print(f"\n{AXES[axis]:>5}{'patches':>9}{'s/step':>10}{'peak GB':>9}", flush=True)
        for point in points:
            try:
                done[point] = done.get(point) or run_apart(point, arguments)
            except RuntimeError as error:
                print(f"{error}\nno exponent without this point", file=sys.stderr)
                return 1
            found = done[point]
            sizes = f"{found['patches']:>9}{found['seconds']:>10.3f}{found['peak_bytes'] / 1e9:>9.2f}"
            print(f"{getattr(point, axis):>5}{sizes}", flush=True)
        curves[axis] = [done[point] for point in points]
    fits = fit(curves["regions"])
    print()
    for name, found in fits.items():
        over = ", ".join(map(str, found["over_regions"]))
        larger = ", ".join(map(str, found["over_regions_larger"]))
        print(f"{name}: exponent {found['exponent']:.3f} over R {over}; {found['exponent_larger']:.3f} over R {larger}")
    print(f"relative to the step with one region; target: at most {WANTED}")
    device = f"{curves['regions'][0]['device']}, {curves['regions'][0]['dtype']}"
    if options.plot:
        plot(curves, fits, options.plot, f"PathFLIP train step{' (small model)' * options.small} on {device}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "plot", "point")}
        content = {"machine": described | {"device": device}, "settings": settings, "results": curves, "fits": fits}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
