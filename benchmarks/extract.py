"""Slides to features by a published patch encoder, compared with torch loops over timm, end to end and stage by stage.

Drawn slides of several sizes (or `--slides`), random weights under the published names, and the same patches for all
sides of `extract_sides.py`: `ours` is `pathflip prepare`, `plain` a torch loop as extraction tools write it, `tuned`
the best torch of a day. Sides run in turn, each in a process of its own, and a ratio is the median over repeats of the
ratio within a repeat; above 1, ours is faster. Compilation and start are left out of patches/s, and in the time of the
whole process. Then each stage alone (`extract_stages.py`): decoding, transfer and transform, network.

Predictions before the first run, float32 on two cores of a CPU: ours at least 0.75 times as fast as `tuned`, because
XLA's matrix products take more time than those of MKL, and at least as fast as `plain`, which transforms by Pillow and
starts workers for each slide.

    python benchmarks/extract.py --encoder kaiko_vits16 --edge 1792 --json benchmarks/results/extract.json
    python benchmarks/extract.py --encoder uni_v1 --count 5 --edge 896 --json benchmarks/results/extract.json
    python benchmarks/extract.py --encoder uni_v1 hoptimus0 --device cuda --half --edge 20480
    python benchmarks/extract.py --encoder uni_v1 hoptimus0 --aot v5e:2x4 v6e:2x4 --json benchmarks/results/extract.json

Our last batch and that of `tuned` are padded, those of `plain` are not: with few patches per run, choose slides whose
patches fill the last batch.

The torch sides need timm and torchvision; `--packages` is a folder that holds them, where the environment does not.
With `--aot`, nothing is run: the encoder's program is compiled for TPUs that are not attached, in bfloat16, with 256
patches per chip, and its speed is predicted as in `aot.py`: compute at half of the peak, and not faster than the memory
traffic that the compiler counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from extract_sides import SIDES, reduced
from machine import describe
from topology import ENVIRONMENT

from pathflip_jax.vision.recipes import RECIPES, Recipe

HERE = Path(__file__).resolve().parent
BATCHES = {"cpu": 16, "cuda": 256}
PACKAGES = (
    "pathflip-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "numpy",
    "openslide-python",
    "torch",
    "torchvision",
    "timm",
)
SMALL_LAYERS = 2
# timm and torchvision as the tests have them (Makefile), where the environment itself does not.
PACKAGES_FOLDER = next((folder for folder in [Path(sys.prefix) / "originals"] if folder.is_dir()), None)
MOST_WORKERS = 16


class SideError(RuntimeError):
    """Error of a side that could not run."""


def edges(count: int, edge: int) -> list[int]:
    """Edges of slides from 0.6 to 1.4 times `edge` pixels, all different."""
    return [round(edge * factor) for factor in np.linspace(0.6, 1.4, count)] if count > 1 else [edge]


def make_slides(folder: Path, count: int, edge: int) -> Path:
    """Folder with drawn slides of several sizes, written once: one picture, shifted and repeated."""
    from data_prep.layout import plan
    from data_prep.slide_image import render, write_slide

    place = folder / f"slides-{count}-{edge}"
    place.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(count) if not (place / f"S{i:02}.tiff").exists()]
    if missing:
        rng = np.random.default_rng(0)
        picture = render(plan(rng, "glands", 2048), rng)
    for i in missing:
        size = edges(count, edge)[i]
        times = [-(-size // side) for side in picture.shape[:2]]
        shifted = np.roll(picture, (-256 - 96 * i, -256 - 160 * i), (0, 1))
        write_slide(place / f"S{i:02}.tiff", np.tile(shifted, (*times, 1))[:size, :size])
    return place


def tile(slides: Path, recipe: Recipe, out: Path) -> int:
    """Write the patches of all slides of a folder to a file, in the order of our reader; returns their number."""
    from data_prep.slide_files import find_slides
    from data_prep.slides import open_slide
    from data_prep.tiling import tile_slide

    found, count = {}, 0
    for path in find_slides(slides)[0].values():
        with open_slide(path) as slide:
            tiles = tile_slide(slide, recipe.patch_size, recipe.mpp)
            edge = round(tiles.patch_size_level0 / slide.image.level_downsamples[tiles.level])
        found[path.name], found[f"{path.name}/place"] = tiles.coords, np.array([tiles.level, edge, tiles.patch_size])
        count += len(tiles.coords)
    np.savez(out, **found)
    return count


def call(script: str, side: str, recipe: Recipe, weights: Path, options: argparse.Namespace, *more: str) -> str:
    """Run a side or its stages in a process; returns the last line of its output."""
    command = [sys.executable, str(HERE / script), "--side", side, "--encoder", recipe.name, "--weights", str(weights)]
    command += ["--device", options.device, "--workers", str(options.workers), "--batch", str(options.batch)]
    command += ["--half"] * options.half + (["--layers", str(SMALL_LAYERS)] if options.small else [])
    search = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    search += [str(options.packages)] if options.packages and side != "ours" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    if options.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SideError(f"{script} --side {side} --encoder {recipe.name} failed:\n{done.stderr[-3000:]}")
    return (done.stdout.splitlines() or [""])[-1]


def agreement(one: Path, other: Path) -> dict[str, float]:
    """Smallest and mean cosine between the features of two sides, over all patches."""
    cosines = []
    with np.load(one) as mine, np.load(other) as theirs:
        for name in mine.files:
            x, y = (rows[name].astype(np.float64) for rows in (mine, theirs))
            cosines.append((x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)))
    every = np.concatenate(cosines)
    return {"min": float(every.min()), "mean": float(every.mean())}


def ratios(runs: dict[str, list[dict]], key: str) -> dict[str, float]:
    """Median over repeats of each other side's time, as a multiple of ours."""
    return {
        side: statistics.median(theirs[key] / ours[key] for theirs, ours in zip(found, runs["ours"], strict=True))
        for side, found in runs.items()
        if side != "ours"
    }


def measure(recipe: Recipe, options: argparse.Namespace) -> dict:
    """All repeats of all sides with one encoder, and their stages."""
    slides = options.slides or make_slides(options.work, options.count, options.edge)
    weights = options.work / "weights" / f"{recipe.name}{'-small' * options.small}"
    if not weights.exists():
        call("extract_sides.py", "weights", recipe, weights, options)
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        patches = tile(slides, recipe, folder / "tiles.npz")
        given = ["--slides", str(slides), "--tiles", str(folder / "tiles.npz")]
        print(f"{recipe.name}: {patches} patches", flush=True)
        for number in range(options.repeats):
            for side in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
                out, start = folder / f"{side}-{number}", time.perf_counter()
                found = json.loads(call("extract_sides.py", side, recipe, weights, options, *given, "--out", str(out)))
                found["process_seconds"] = time.perf_counter() - start
                if found["patches"] != patches:
                    raise SideError(f"{side} encoded {found['patches']} patches of {patches}")
                runs[side].append(found)
                print(f"  {side:6} {patches / found['seconds']:8.2f} patches/s, {found['seconds']:.1f} s", flush=True)
        agree = {side: agreement(folder / "ours-0/features.npz", folder / f"{side}-0/features.npz")
                 for side in SIDES[1:]}  # fmt: skip
        stages = measure_stages(recipe, weights, options, given) if options.stages else {}
    found = {"patches": patches, "runs": runs, "ratios": ratios(runs, "seconds"), "agreement": agree}
    return found | {"process_ratios": ratios(runs, "process_seconds"), "stages": stages}


def measure_stages(recipe: Recipe, weights: Path, options: argparse.Namespace, given: list[str]) -> dict:
    """Stages of all sides, alone: medians over repeats, and the share of the peak that each network reaches."""
    rate = peak_rate(options)
    sides = ("decode", *SIDES)
    rows = {side: [] for side in sides}
    for number in range(options.repeats):
        for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
            rows[side].append(json.loads(call("extract_stages.py", side, recipe, weights, options, *given)))
    found = {side: {name: statistics.median(row[name] for row in own) for name in own[0]} for side, own in rows.items()}
    operations = reduced(recipe, SMALL_LAYERS * options.small).network.operations()
    for side in SIDES:
        found[side]["share_of_peak"] = found[side]["network"] * operations / rate
    pairs = {side: list(zip(rows["ours"], rows[side], strict=True)) for side in SIDES[1:]}
    found["network_ratios"] = {
        side: statistics.median(ours["network"] / theirs["network"] for ours, theirs in own)
        for side, own in pairs.items()
    }
    return found | {"peak_gflops": rate / 1e9}


def peak_rate(options: argparse.Namespace) -> float:
    """Peak operations per second: of a GPU in half precision by its data sheet, else of a large matrix product."""
    from roofline import large_product, torch_product_rate

    from pathflip_jax.monitoring.telemetry import PEAK_BFLOAT16

    if options.device == "cuda":
        import torch

        if options.half and torch.cuda.get_device_name() in PEAK_BFLOAT16:
            return PEAK_BFLOAT16[torch.cuda.get_device_name()]
    dtype = "bfloat16" if options.half else "float32"
    return torch_product_rate(*large_product(options.device, options.small), dtype, options.device)


def table(found: dict[str, dict]) -> str:
    """Markdown table of all encoders and sides."""
    rows = ["| encoder, patches | side | patches/s | ours is faster | network alone, share of peak | cosine, least |"]
    rows.append("|---|---|---|---|---|---|")
    for name, one in found.items():
        for side, runs in one["runs"].items():
            speed = statistics.median(one["patches"] / run["seconds"] for run in runs)
            stage = one["stages"].get(side)
            alone = f"{stage['network']:.1f}, {stage['share_of_peak']:.0%}" if stage else ""
            faster = f"{one['ratios'][side]:.2f}" if side in one["ratios"] else ""
            least = f"{one['agreement'][side]['min']:.6f}" if side in one["agreement"] else ""
            rows.append(f"| {name}, {one['patches']} | {side} | {speed:.1f} | {faster} | {alone} | {least} |")
    return "\n".join(rows)


def stage_lines(stages: dict) -> str:
    """Rates of decoding and of the transforms as text."""
    decode = ", ".join(f"{name} {rate:.0f}" for name, rate in stages["decode"].items())
    transform = ", ".join(f"{side} {stages[side]['transform']:.0f}" for side in SIDES)
    return (
        f"decoding, patches per core second: {decode}; transfer and transform, patches/s: {transform} (plain: a core)"
    )


def predict_tpus(options: argparse.Namespace) -> dict[str, dict]:
    """Figures of all encoders on all topologies, printed."""
    from extract_aot import run

    found: dict[str, dict] = {}
    for topology in options.aot:
        for name in options.encoder:
            one = found.setdefault(name, {})[topology] = run(RECIPES[name], topology, options.small)
            at = one["prediction"]
            print(
                f"{name}, {topology}: {one['peak_bytes'] / 2**30:.2f} of {one['hbm_limit_bytes'] / 2**30:.2f} GiB; "
                f"a chip {at['both']:.0f} patches/s (compute {at['compute']:.0f}, memory {at['memory']:.0f}), "
                f"{at['share']:.0%} of its peak; {one['devices']} chips {at['both'] * one['devices']:.0f}",
                flush=True,
            )
    return found


def save(path: Path, kind: str, found: dict[str, dict], options: argparse.Namespace) -> None:
    """Add results to the file; those of other encoders and topologies stay in it."""
    content = json.loads(path.read_text()) if path.exists() else {}
    kept = ("count", "edge", "repeats", "device", "half", "workers", "batch", "small", "slides")
    machine = describe(*PACKAGES)
    for package in distributions(path=[str(options.packages)]) if options.packages else ():
        if package.name in PACKAGES:
            machine["versions"][package.name] = package.version
    about = {"machine": machine, "settings": {name: getattr(options, name) for name in kept}}
    if options.device == "cuda" and kind == "measured":
        import torch

        machine["accelerator"] = torch.cuda.get_device_name()
    for name, one in found.items():
        own = content.setdefault(kind, {})
        if kind == "aot":
            own.setdefault(name, {}).update({key: row | {"machine": machine} for key, row in one.items()})
        else:
            own[f"{name}{', half' * options.half}"] = one | about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def make_parser() -> argparse.ArgumentParser:
    """Command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["kaiko_vits16", "uni_v1", "hoptimus0"]
    parser.add_argument("--encoder", nargs="+", choices=choices, default=choices[:1], help="default kaiko_vits16")
    parser.add_argument("--slides", type=Path, metavar="DIR", help="folder of real slides, instead of drawn ones")
    parser.add_argument("--count", type=int, default=6, help="drawn slides (default 6)")
    parser.add_argument("--edge", type=int, default=2560, help="their mean edge in pixels (default 2560)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--half", action="store_true", help="half precision; float32 by default")
    parser.add_argument("--workers", type=int, help=f"processes that read (default: the cores, up to {MOST_WORKERS})")
    parser.add_argument("--batch", type=int, help="patches per batch (default 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--stages", action=argparse.BooleanOptionalAction, default=True, help="each stage alone too")
    parser.add_argument("--packages", type=Path, metavar="DIR", default=PACKAGES_FOLDER, help="of timm and torchvision")
    parser.add_argument("--work", type=Path, default=Path("extract"), help="folder of slides and weights (extract)")
    parser.add_argument("--aot", nargs="+", metavar="TOPOLOGY", help="predict for TPUs, e.g. v5e:2x4 v6e:2x4")
    parser.add_argument("--small", action="store_true", help="two layers, to check that everything works")
    parser.add_argument("--json", type=Path, help="file to write; it keeps the results of others")
    return parser


def main() -> int:
    """Measure or predict, print, write the JSON; the exit code is 1 if a side failed."""
    options = make_parser().parse_args()
    options.batch = options.batch or BATCHES[options.device]
    options.workers = options.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    try:
        if options.aot:
            os.environ.update(ENVIRONMENT)  # before jax is imported
            found = predict_tpus(options)
        else:
            options.work.mkdir(parents=True, exist_ok=True)
            found = {name: measure(RECIPES[name], options) for name in options.encoder}
            print(table(found))
            print(*(stage_lines(one["stages"]) for one in found.values() if one["stages"]), sep="\n")
    except (SideError, ModuleNotFoundError, ValueError) as failure:
        print(failure, file=sys.stderr)
        return 1
    if options.json:
        save(options.json, "aot" if options.aot else "measured", found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
