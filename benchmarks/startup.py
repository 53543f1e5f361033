"""Time until a command answers, each in a new process: `pathflip --help`, and `pathflip ground` on an encoded slide.

The slide is drawn, encoded by the run that comes with the package, and grounded once before, so that its features are
in the cache of slides and the programs in the compilation cache. A run of `ground` ends when all of its files are
written: maps, areas and the best patches of each text.

- help: seconds of `pathflip --help`
- first text: seconds of `pathflip ground` with one text
- next text: further seconds for each text of a command with several

    python benchmarks/startup.py --json benchmarks/results/startup.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from machine import describe

RUN = "colon-biopsy"
TEXTS = ("adenocarcinoma", "normal mucosa", "adenomatous polyp", "high-grade dysplasia", "serrated adenoma")
WANTED = {"help": 0.3, "first text": 3.0, "next text": 0.3}  # seconds on two cores


def run(*command: object, environment: dict[str, str] | None = None) -> float:
    """Seconds of a command of `pathflip` in a new process. Raises CalledProcessError where it fails."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pathflip_jax.cli", *map(str, command)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    return time.perf_counter() - started


def draw_slide(folder: Path, size: int) -> Path:
    """Slide of the drawn cohort, about `size` px wide."""
    command = [sys.executable, "-m", "data_prep.synthetic", "--out", folder, "--slides", "4", "--size", str(size)]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return sorted((folder / "slides").glob("*.tiff") if (folder / "slides").is_dir() else folder.glob("*.tiff"))[0]


def measure(slide: Path, folder: Path, runs: int) -> dict[str, list[float]]:
    """Seconds of each run, by what is measured."""
    environment = os.environ | {"PATHFLIP_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}

    def ground(texts: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            return run("ground", slide, *texts, "--checkpoint", RUN, "--out", out, environment=environment)

    for texts in (TEXTS[:1], TEXTS):  # encodes the slide, and compiles
        ground(texts)
    found: dict[str, list[float]] = {name: [] for name in WANTED}
    for number in range(runs):
        first, all_texts = ground(TEXTS[:1]), ground(TEXTS)
        found["help"].append(run("--help"))
        found["first text"].append(first)
        found["next text"].append((all_texts - first) / (len(TEXTS) - 1))
        print(f"run {number + 1}: " + ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in found.items()))
    return found


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="runs of each command (default 7)")
    parser.add_argument("--size", type=int, default=2048, help="width of the slide in px (default 2048)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(draw_slide(Path(folder) / "drawn", options.size), Path(folder), options.runs)
    seconds = {
        name: {"least": round(min(values), 3), "median": round(statistics.median(values), 3), "wanted": WANTED[name]}
        for name, values in found.items()
    }
    for name, values in seconds.items():
        print(f"{name:12}" + "  ".join(f"{kind} {value:.2f} s" for kind, value in values.items()))
    if options.json:
        machine = describe("jax", "flax") | {"load_before": round(before, 2)}
        options.json.write_text(json.dumps({"machine": machine, "seconds": seconds, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
