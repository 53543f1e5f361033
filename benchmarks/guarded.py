"""Overhead of parsing feature files (HDF5, .pt) in a worker process, compared with h5py and torch in this process.

Both sides read the same file completely, one after the other, in an order redrawn for each repeat. The script prints
the median and quartiles of the ratio, and the start-up time of the worker. In the table, `here` is this process,
`parse` the worker without checks, and `read` the worker with the checks of `read_features`.

    python benchmarks/guarded.py --patches 30000 --width 512 --json benchmarks/results/guarded.json
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from machine import describe

from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.features import read_features
from pathflip_jax.data.readers.formats import read_fields
from pathflip_jax.data.readers.h5_features import READER


def write_files(folder: Path, patches: int, width: int) -> dict[str, Path]:
    """Write one slide in the formats of tools: contiguous, in chunks of rows, compressed, and as a tensor."""
    features = np.random.default_rng(0).standard_normal((patches, width), np.float32)
    coords = np.stack(np.divmod(np.arange(patches), 200)[::-1], 1) * 256
    files = {}
    for name, how in (
        ("h5, one piece", {}),
        ("h5, chunks of 64 rows", {"chunks": (min(64, patches), width)}),
        ("h5, chunks, gzip", {"chunks": (min(64, patches), width), "compression": "gzip"}),
    ):
        files[name] = folder / f"{len(files)}.h5"
        with h5py.File(files[name], "w") as file:
            file.create_dataset("features", data=features, **how)
            file.create_dataset("coords", data=coords)
            file["coords"].attrs["patch_size"] = 256
    try:
        import torch
    except ImportError:
        return files
    files[".pt"] = folder / "x.pt"
    torch.save(torch.from_numpy(features), files[".pt"])
    return files


def read_directly(path: Path) -> np.ndarray:
    """The features of a file, read by this process."""
    if path.suffix == ".pt":
        import torch

        return torch.load(path, weights_only=True).numpy()
    with h5py.File(path) as file:
        return file["features"][()]


def read_checked(path: Path) -> np.ndarray:
    """The features of a file, parsed by the worker and checked, as every command reads them."""
    return read_features(path).features


def seconds_of(call: Callable, *arguments) -> tuple[float, np.ndarray]:
    """Duration and result of a call."""
    start = time.perf_counter()
    found = call(*arguments)
    return time.perf_counter() - start, found


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), options.patches, options.width)
        start, _ = seconds_of(guarded.parse, READER, files["h5, one piece"], False, "")
        asked = statistics.median(
            seconds_of(guarded.parse, READER, files["h5, one piece"], False, "")[0] for _ in range(options.repeats)
        )
        print(f"starting the worker takes {start * 1e3:.0f} ms, a request for attributes {asked * 1e3:.2f} ms")
        print(f"{'':<24}{'here':>10}{'parse':>10}{'read':>10}  parse / here (quartiles)")
        for name, path in files.items():
            sides = {"here": read_directly, "read": read_checked, "parse": _parse}
            times: dict[str, list[float]] = {side: [] for side in sides}
            expected = read_directly(path)
            for side in sides.values():  # warm up the page cache and the worker's libraries
                if not np.array_equal(side(path), expected):
                    raise RuntimeError(f"{name}: the worker returned other features than a direct read")
            for _ in range(options.repeats):
                for side in random.sample(list(sides), len(sides)):
                    times[side].append(seconds_of(sides[side], path)[0])
            ratios = [there / here for there, here in zip(times["parse"], times["here"], strict=True)]
            low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
            medians = {side: statistics.median(found) * 1e3 for side, found in times.items()}
            results[name] = {"ms": medians, "ratio": ratio, "quartiles": [low, high]}
            columns = "".join(f"{medians[side]:>7.1f} ms" for side in ("here", "parse", "read"))
            print(f"{name:<24}{columns}  {ratio:.2f}x ({low:.2f} to {high:.2f})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        content = {"machine": describe("numpy", "h5py", "torch"), "settings": settings, "start_ms": start * 1e3}
        options.json.write_text(json.dumps(content | {"ask_ms": asked * 1e3, "results": results}, indent=1) + "\n")


def _parse(path: Path) -> np.ndarray:
    """Features as the worker returns them, without the checks of `read_features`."""
    return read_fields(path, None, None)["features"]


if __name__ == "__main__":
    main()
