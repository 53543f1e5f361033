"""Seconds until a command answers: `pathflip --help`, the first text of `pathflip ground`, and each next one.

Every measurement is a complete command in a new process, from its start to its end, with all files on disk; commands
take turns, so that a busy moment of the machine meets all of them. The slide is synthetic, the run `colon-biopsy`, which
comes with the package. An untimed round comes first: it encodes the slide into the cache of slides, and compiles the
programs into the compilation cache. Both caches are in a temporary folder.

- help: `pathflip --help`
- slide: a text on the slide file; map, areas, scores, pictures of the best patches
- records: a text on records of the slide, without its file: no pictures
- slide_many, records_many: the same with `--texts` texts; the seconds of each next text follow from the difference

The minimum is what the work takes; the median also shows what else the machine was doing.

    taskset -c 0,1 python benchmarks/startup.py --rounds 9 --json benchmarks/results/startup.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

from data_prep.synthetic import generate

RUN = "colon-biopsy"
# As words of one length, so that all texts have one shape: "gland aa", "gland ab", ...
TEXTS = [f"glands with {first}{second}" for first in "abcdef" for second in "abcdef"]
TARGETS = {"help": 0.3, "slide": 3.0, "records": 3.0, "slide_next": 0.3, "records_next": 0.3}  # seconds


def slide_file(folder: Path) -> Path:
    """The synthetic slide."""
    return next((folder / "cohort").glob("*.tiff"))


def commands(folder: Path, texts: int) -> dict[str, list[str]]:
    """Arguments of `pathflip` for each measurement."""
    found = {"help": ["--help"]}
    for source, place in (("slide", slide_file(folder)), ("records", folder / "records")):
        for name, count in ((source, 1), (f"{source}_many", texts)):
            out = ["--checkpoint", RUN, "--out", str(folder / f"maps_{name}")]
            found[name] = ["ground", str(place), *TEXTS[:count], *out]
    return found


def run(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds of a command in a new process. Raises RuntimeError, with what it said, if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).with_name("pathflip"), *arguments], env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"pathflip {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return seconds


def measure(folder: Path, rounds: int, texts: int, size: int) -> dict[str, list[float]]:
    """Seconds of each command in each round."""
    generate(folder / "cohort", slides=1, workers=1, progress=False, size=size)
    environment = os.environ | {
        "PATHFLIP_CACHE": str(folder / "slides"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run(["prepare", str(slide_file(folder)), "--patch-size", "112", "--out", str(folder / "records")], environment)
    lines = commands(folder, texts)
    for arguments in lines.values():
        run(arguments, environment)
    taken: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(rounds):
        for name, arguments in lines.items():
            taken[name].append(round(run(arguments, environment), 3))
        print(f"round {number}:", *(f"{name} {seconds[-1]:.2f}" for name, seconds in taken.items()), flush=True)
    return taken


def summary(taken: dict[str, list[float]], texts: int) -> dict[str, dict[str, float]]:
    """Minimum, median and target in seconds; of each next text, those of the difference between many and one."""
    found = {}
    for name in ("help", "slide", "records"):
        found[name] = {"minimum": min(taken[name]), "median": round(statistics.median(taken[name]), 3)}
    for name in ("slide", "records"):
        one, many = found[name], taken[f"{name}_many"]
        found[f"{name}_next"] = {
            "minimum": round((min(many) - one["minimum"]) / (texts - 1), 3),
            "median": round((statistics.median(many) - one["median"]) / (texts - 1), 3),
        }
    return {name: seconds | {"target": TARGETS[name]} for name, seconds in found.items()}


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=9, help=f"texts of the commands with many: 2 to {len(TEXTS)}")
    parser.add_argument("--size", type=int, default=1536, help="width of the slide in pixels (default 1536)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 1 or not 2 <= options.texts <= len(TEXTS):
        parser.error(f"expected at least one round and 2 to {len(TEXTS)} texts")
    machine = describe("jax", "jaxlib", "flax", "numpy", "matplotlib")
    with tempfile.TemporaryDirectory() as folder:
        taken = measure(Path(folder), options.rounds, options.texts, options.size)
    found = summary(taken, options.texts)
    for name, seconds in found.items():
        print(f"{name:14}" + "".join(f"{what} {value:.3f} s  " for what, value in seconds.items()))
    if options.json:
        facts = {"machine": machine, "texts": options.texts, "size": options.size, "seconds": found, "rounds": taken}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
