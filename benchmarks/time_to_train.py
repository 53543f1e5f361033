"""Duration of an epoch over a cohort of the paper's size on this machine, predicted from a part or measured.

Makes a cohort of realistic sizes (random features, 10,000 patches per slide on average, reports as long as real
captions) and trains on it with `pathflip train`, including input pipeline, logging and checkpoints. With fewer
`--slides` than `--epoch-slides`, the epoch is predicted from the time of starting and compiling and the speed of the
last steps. Useful FLOPs are those that the run counts for its own batches (`pathflip_jax/model/flops.py`).

    python benchmarks/time_to_train.py --slides 12 --batch 2 --steps 6            # predicted, on a laptop
    python benchmarks/time_to_train.py --slides 4181 --batch 64 --dtype bfloat16  # a measured epoch: 43 GB of records
    python benchmarks/time_to_train.py --slides 4181 --batch 64 --dtype bfloat16 --device h200 --profile

With `--profile`, a step of this size is profiled afterwards: its peak memory, its parts compared with their lower
bounds, and its longest operations (`roofline.py --measure`).

Arguments after `--` are passed to `pathflip train`: `-- --config.model.remat=True`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import describe
from made_captions import make_captions
from records import place_slide, write_records
from roofline import DEVICES

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.monitoring.metrics import METRICS, read_metrics
from pathflip_jax.monitoring.telemetry import USEFUL

EPOCH_SLIDES = 4181  # the training split of SlideChat's TCGA pairs, as in the paper
PATCHES = (10_000, 0.7)  # mean, and standard deviation of the logarithm: from biopsies to whole resections
POOL = 65_536


def make_slides(count: int, width: int, rng: np.random.Generator) -> Iterator[SlideFeatures]:
    """Square slides of log-normal sizes; their features are slices of one pool of random numbers."""
    pool = rng.standard_normal((2 * POOL, width), np.float32).astype(np.float16)
    mean, deviation = PATCHES
    for number in range(count):
        patches = int(np.clip(rng.lognormal(np.log(mean) - deviation**2 / 2, deviation), 300, POOL))
        first = int(rng.integers(POOL))
        yield place_slide(number, pool[first : first + patches])


def write_cohort(folder: Path, count: int, width: int) -> None:
    """Write records, reports and a vocabulary. Raises OSError if the disk does not have enough space."""
    needed, free = 2.1 * width * PATCHES[0] * count, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {count} slides take about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; pass --folder "
            "on a larger disk, or fewer --slides for a prediction"
        )
    rng = np.random.default_rng(0)
    write_records(folder / "records", make_slides(count, width, rng))
    captions = make_captions(count, folder / "vocabulary", rng)
    with open(folder / "reports.jsonl", "w") as file:
        for number, caption in enumerate(captions):
            file.write(json.dumps({"slide_id": f"slide{number}", "caption": caption}) + "\n")


def train(folder: Path, options: argparse.Namespace, steps: int, more: list[str]) -> tuple[float, list[float]]:
    """Train for `steps`; returns the seconds of the whole command and those between the steps that it logged."""
    command = [sys.executable, "-m", "pathflip_jax.cli", "train", "--config", options.config]
    command += [f"--config.data.records={folder / 'records'}", f"--config.data.texts={folder / 'reports.jsonl'}"]
    command += [f"--config.data.tokenizer={folder / 'vocabulary'}", f"--config.train.batch_size={options.batch}"]
    command += [f"--config.train.steps={steps}", f"--config.model.compute_dtype={options.dtype}"]
    command += ["--config.model.remat=False", f"--config.data.resident={options.resident}"]
    command += ["--workdir", str(folder / "run"), *more]
    metrics, times, seen = folder / "run" / "metrics.jsonl", [], 0
    start = time.perf_counter()
    with open(folder / "train.log", "w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log)
        while running.poll() is None:
            time.sleep(0.005)
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            times += [time.perf_counter()] * (lines - seen)
            seen = lines
    seconds = time.perf_counter() - start
    if running.returncode:
        raise RuntimeError(f"training failed:\n{(folder / 'train.log').read_text()[-2000:]}")
    return seconds, np.diff(times).tolist()


def main() -> int:
    """Make the cohort, train, print the duration of the epoch and the utilisation, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slides",
        type=int,
        default=12,
        help="slides of the cohort (12); with fewer than --epoch-slides, the epoch is predicted",
    )
    parser.add_argument("--epoch-slides", type=int, default=EPOCH_SLIDES, help=f"slides of an epoch ({EPOCH_SLIDES})")
    parser.add_argument("--batch", type=int, default=2, help="slides per step (2)")
    parser.add_argument("--steps", type=int, help="steps to train; default: an epoch over --slides, at least 5")
    parser.add_argument("--config", default="align_large", help="config to train (default align_large)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--width", type=int, default=512, help="width of the features")
    parser.add_argument(
        "--resident",
        choices=["", "host", "device"],
        default="",
        help="memory to keep all features in; '' reads them from disk",
    )
    parser.add_argument(
        "--device", choices=list(DEVICES), default="cpu", help="device whose peak rate utilisation refers to"
    )
    parser.add_argument("--profile", action="store_true", help="profile a step afterwards")
    parser.add_argument("--folder", type=Path, help="folder to write the cohort to (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("more", nargs="*", metavar="-- SETTING", help="settings for pathflip train")
    options = parser.parse_args()
    steps = options.steps or max(5, options.slides // options.batch)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        try:
            write_cohort(folder, options.slides, options.width)
        except OSError as error:
            parser.error(str(error))
        wrote = time.perf_counter() - start
        seconds, between = train(folder, options, steps, options.more)
        operations = statistics.fmean(row[USEFUL] for row in read_metrics(folder / "run" / METRICS))
        described = describe("jax", "numpy", "google-crc32c", folder=folder)
    step = statistics.median(between[len(between) // 2 :])
    startup = seconds - step * steps
    whole = -(-options.epoch_slides // options.batch)
    real = options.slides >= options.epoch_slides and steps >= whole
    epoch = seconds if real else startup + step * whole
    rate = DEVICES[options.device][0][options.dtype]
    found = {
        "epoch_seconds": epoch, "run_for_real": real, "startup_seconds": startup, "step_milliseconds": 1e3 * step,
        "slides_per_second": options.batch / step, "useful_gflop_per_slide": operations / options.batch / 1e9,
        "utilisation": operations / step / rate, "cohort_seconds": wrote,
    }  # fmt: skip
    how = "measured" if real else f"predicted from {steps} steps"
    print(f"an epoch over {options.epoch_slides} slides: {epoch:.0f} s ({how})")
    print(f"  starting and compiling {startup:.0f} s, a step of {options.batch} slides {1e3 * step:.0f} ms")
    print(f"  {options.batch / step:.2f} slides/s, {found['useful_gflop_per_slide']:.0f} useful GFLOP per slide,")
    print(f"  {found['utilisation']:.0%} of the {rate / 1e12:g} TFLOP/s of {options.device} in {options.dtype}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "folder")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        outcome = {"machine": described, "settings": settings, "result": found}
        options.json.write_text(json.dumps(outcome, indent=1) + "\n")
    if options.profile:
        command = [
            sys.executable,
            str(Path(__file__).with_name("roofline.py")),
            "--measure",
            f"--batch={options.batch}",
        ]
        command += [f"--dtype={options.dtype}", f"--device={options.device}"]
        return subprocess.run(command).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
