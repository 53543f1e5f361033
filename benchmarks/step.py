"""Training step and inference, compared with PyTorch in the released style and competent PyTorch, in one run.

Every measurement is a separate process (`sides.py`) that exits before the next starts; the sides take turns, and a
figure is the median over rounds of the ratio within a round. Before anything is timed, the sides encode the same slides
and texts with the same weights and must agree to 1e-4. If a side cannot run, the benchmark stops, so that no ratio
comes from one side alone. A ratio above 1 means that ours is better. If the released side takes more than 15% longer
than the released code took, scaled by the rate of this machine's matrix products, its time is capped at that limit.

    python benchmarks/step.py --rounds 3 --json benchmarks/results/step.json
    python benchmarks/step.py --family pathflip2 --rounds 3 --json benchmarks/results/step_pathflip2.json
    python benchmarks/step.py --jobs encode_slide_base --rounds 1
    python benchmarks/step.py --device cuda --dtype bfloat16 --batch 16

On a CPU, every side keeps the memory that it frees (`machine.keep_freed`): otherwise the steps of the released side are
a quarter slower, because the system clears the pages of each tensor.

Memory is the peak resident size after warm-up (on a GPU the device's peak) minus 16 bytes per parameter for weights,
gradients and both moments, which every side must hold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sides
import sides_pathflip2
from machine import describe
from roofline import large_product, torch_product_rate
from sides import Job

from pathflip_jax.model import flops
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig

HERE = Path(__file__).parent
STEPS = {"train_base": 2, "train_whole_slide": 1, "encode_slide_base": 5, "encode_text": 5, "encode_whole_slide": 2}
AGREE = 1e-4
# Seconds a slide of the released code on two cores whose float32 matrix products ran at 250 GFLOP/s.
RELEASED_SECONDS = {"train_base": 9.7, "train_whole_slide": 80.0, "encode_slide_base": 1.07}
RELEASED_RATE, SLACK = 250e9, 1.15


class Compared(NamedTuple):
    """Comparison of one model family: the script that runs a side, and its sides, jobs and sizes.

    The second side is the yardstick; the names of its ratios have no side in them.
    """

    script: str
    sides: tuple[str, ...]
    jobs: dict[str, Job]
    base: ModelConfig
    small: ModelConfig


def _compared(module, config: type[ModelConfig]) -> Compared:
    family = module.FAMILY
    return Compared(f"{module.__name__}.py", family.sides, family.jobs, config(**family.base), config(**family.small))


FAMILIES = {
    "pathflip": _compared(sides, PathFLIPConfig),
    "pathflip2": _compared(sides_pathflip2, PathFLIP2Config),
}


class SideError(RuntimeError):
    """Error of a side that could not run, or whose results differ from the others'."""


def run_side(side: str, job: str, options: argparse.Namespace, *more: str) -> dict:
    """Run `sides.py` once and return the JSON of its last line."""
    command = [
        sys.executable,
        str(HERE / FAMILIES[options.family].script),
        "--side",
        side,
        "--job",
        job,
        "--device",
        options.device,
    ]
    command += ["--dtype", options.dtype] + ["--small"] * options.small
    for name in ("batch", "regions"):
        if getattr(options, name):
            command += [f"--{name}", str(getattr(options, name))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if options.device == "cuda":
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SideError(f"{side} could not run {job} (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_agreement(options: argparse.Namespace) -> float:
    """Largest difference between sides in slides, regions, texts and losses of one small batch in float32."""
    family, sides = FAMILIES[options.family], options.sides
    plain = argparse.Namespace(**vars(options) | {"dtype": "float32", "batch": 2, "regions": 3})
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(Path(folder), family.small if options.small else family.base)
        found = {}
        for side in sides:
            outputs = Path(folder) / f"{side}.npz"
            run_side(
                side,
                "train_base",
                plain,
                "--weights",
                folder,
                "--outputs",
                str(outputs),
                "--steps",
                "0",
                "--warmup",
                "0",
            )
            with np.load(outputs) as archive:
                found[side] = [archive[name] for name in sorted(archive.files)]
    worst = 0.0
    for side in sides[1:]:
        for mine, theirs in zip(found["ours"], found[side], strict=True):
            error = float(np.abs(mine.reshape(theirs.shape) - theirs).max() / max(1.0, np.abs(theirs).max()))
            worst = max(worst, error)
            if not error <= AGREE:
                raise SideError(
                    f"ours and {side} differ by {error:.1e}, at most {AGREE:.0e} is allowed, so they are not compared"
                )
    return worst


def _write_weights(folder: Path, config: ModelConfig) -> None:
    """Write random weights under the released names; none of them is zero or at its initial value."""
    from pathflip_jax.convert.families import conversion_of
    from pathflip_jax.convert.pytorch import torch_shapes
    from pathflip_jax.export.pytorch import write_checkpoint

    rng, state = np.random.default_rng(1), {}
    for name, shape in torch_shapes(config).items():
        drawn = rng.standard_normal(shape).astype(np.float32)
        one = len(shape) == 1 and name.endswith("weight")  # of a normalisation
        state[name] = np.asarray(one + drawn * np.float32(1 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1))
    state |= {name: np.array(2.659, np.float32) for name in state if name.endswith("logit_scale")}
    words = next(state[name] for name in state if name.endswith("word_embeddings.weight"))
    state |= conversion_of(config).unused(config, words)
    write_checkpoint(folder / "model.safetensors", state)


def matrix_rate(device: str, dtype: str, small: bool) -> float:
    """Operations per second of a large matrix product in PyTorch, the rate available to the yardstick."""
    return torch_product_rate(*large_product(device, small), dtype, device)


def measure(options: argparse.Namespace) -> dict:
    """All rounds of all jobs: times, peaks and ratios by name."""
    family = FAMILIES[options.family]
    parameters = flops.parameters(family.small if options.small else family.base)
    times = {job: {side: [] for side in options.sides} for job in options.jobs}
    peaks = {job: {side: [] for side in options.sides} for job in options.jobs}
    for job in options.jobs:
        for number in range(options.rounds):
            order = options.sides[number % len(options.sides) :] + options.sides[: number % len(options.sides)]
            for side in order:
                steps, warmup = STEPS[job] * (3 if side == "ours" else 1), 2 if side in ("ours", "competent") else 1
                if options.small:
                    steps, warmup = 1, 1
                row = run_side(side, job, options, "--steps", str(steps), "--warmup", str(warmup))
                times[job][side].append(statistics.median(row["seconds"]))
                peaks[job][side].append(row["peak_bytes"])
                print(
                    f"{job:18} {side:10} {times[job][side][-1]:9.3f} s  {row['peak_bytes'] / 1e9:6.2f} GB", flush=True
                )
    ratios = {}
    for job in options.jobs:
        for side in options.sides[1:]:
            suffix = "" if side == family.sides[1] else f"_{side}"
            pairs = list(zip(times[job][side], times[job]["ours"], strict=True))
            ratios[job + suffix] = statistics.median(theirs / ours for theirs, ours in pairs)
            if family.jobs[job].kind == "train":
                spare = 16 * parameters
                pairs = list(zip(peaks[job][side], peaks[job]["ours"], strict=True))
                ratio = statistics.median((theirs - spare) / (ours - spare) for theirs, ours in pairs)
                ratios[f"memory_{job}{suffix}"] = ratio
    return {"times": times, "peak_bytes": peaks, "ratios": ratios, "parameters": parameters}


def allowed_seconds(job: str, rate: float) -> float:
    """Longest accepted step of the released side: 15% more than the released code, at this rate."""
    return sides.JOBS[job].slides * SLACK * RELEASED_SECONDS[job] * RELEASED_RATE / rate


def hold_to_yardstick(found: dict, rate: float) -> dict[str, float]:
    """Cap the time of a released side that is too slow, which lowers its ratios; returns the factors by job."""
    factors = {}
    for job in RELEASED_SECONDS:
        if job in found["times"] and "released" in found["times"][job]:
            factor = allowed_seconds(job, rate) / statistics.median(found["times"][job]["released"])
            if factor < 1:
                factors[job] = factor
                found["ratios"][job] *= factor
    return factors


def main() -> int:
    """Check, measure, print the table, write the JSON; the exit code is 1 if a side failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="pathflip", help="model family (default pathflip)")
    parser.add_argument("--jobs", nargs="+", metavar="JOB", help="jobs of the family (default: all)")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="ours and at least one other (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="slides per step, instead of each job's")
    parser.add_argument("--regions", type=int, help="regions per slide, instead of each job's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check that everything works")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    family = FAMILIES[options.family]
    for name, known in (("jobs", family.jobs), ("sides", family.sides)):
        chosen = getattr(options, name) or list(known)
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(
                f"--{name} {' '.join(unknown)}: unknown for {options.family}; expected some of {', '.join(known)}"
            )
        setattr(options, name, [one for one in known if one in chosen])
    if "ours" not in options.sides or len(options.sides) < 2:
        parser.error("--sides: expected ours and at least one other")
    try:
        error = check_agreement(options)
        print(f"{', '.join(options.sides)} agree: largest difference {error:.1e}")
        rate = matrix_rate(options.device, options.dtype, options.small)
        print(f"matrix products run at {rate / 1e9:.0f} GFLOP/s in {options.dtype}")
        found = measure(options)
    except SideError as failure:
        print(failure, file=sys.stderr)
        return 1
    held = {}
    if options.device == "cpu" and options.dtype == "float32":
        if options.family == "pathflip" and not (options.small or options.batch or options.regions):
            held = hold_to_yardstick(found, rate)
    width = max(map(len, found["ratios"]))
    for name, ratio in found["ratios"].items():
        print(f"{name:{width}}  {ratio:6.2f}")
    for job in held:
        took, allowed = statistics.median(found["times"][job]["released"]), allowed_seconds(job, rate)
        limit = f"the limit at {rate / 1e9:.0f} GFLOP/s"
        print(f"{job}: the released side took {took:.2f} s per step and is capped at {allowed:.2f} s, {limit}")
    if options.json:
        described = describe("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
        described |= {"device": options.device, "matrix_gflops": round(rate / 1e9, 1)}
        if options.device == "cuda":
            import torch

            described["accelerator"] = torch.cuda.get_device_name()
        names = ("family", "jobs", "sides", "rounds", "batch", "regions", "dtype", "small")
        settings = {name: getattr(options, name) for name in names} | {"agreement": error, "held_to": held}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": described, "settings": settings} | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
