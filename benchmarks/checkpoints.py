"""Cost of a checkpoint: time that a save blocks the training loop, and time until it is complete on disk.

Random parameters and AdamW moments of models of base size are saved with the same class as in training. The loop
continues as soon as the arrays are copied (`held`); the rest is written in the background, and `on disk` is the time
from the same start until the checkpoint is complete, its files flushed and its folder renamed. `read` is the time that
a restart takes to read and check every value, from the page cache. `plain write` is a lower bound: one file of as many
random bytes, written and flushed. The table gives medians and quartiles over `--repeats`.

    python benchmarks/checkpoints.py --json benchmarks/results/checkpoints.json
    python benchmarks/checkpoints.py --family pathflip2 --folder /mnt/disk --repeats 9

On a CPU, the background write shares the cores with the steps; on an accelerator, `held` includes the copy from the
device.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import describe

from pathflip_jax.model.config import CONFIGS
from pathflip_jax.model.parameters import abstract_params
from pathflip_jax.runs.checkpoints import Checkpoints
from pathflip_jax.training.optim import OptimConfig, make_optimizer

MEASURED = ("held", "on disk", "read", "plain write")
SMALL = {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "vocab_size": 64, "max_positions": 16}
KEPT, ROOM = 2, 1.1  # checkpoints on disk at a time: those kept and the one being written


def make_state(family: str, small: bool) -> tuple[dict, object]:
    """Parameters and optimizer state of a family at base size: random, hence incompressible."""
    shapes = abstract_params(CONFIGS[family](**SMALL if small else {}))
    opt_shapes = jax.eval_shape(make_optimizer(OptimConfig(), optax.constant_schedule(1e-4)).init, shapes)
    rng = np.random.default_rng(0)

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)
        return jnp.ones(leaf.shape, leaf.dtype)  # counts of steps

    return jax.tree.map(one, (shapes, opt_shapes))


def size_of(state: object) -> int:
    """Total bytes of all arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def plain_write(path: Path, count: int) -> float:
    """Seconds to write and flush a file of that many random bytes."""
    block = np.random.default_rng(0).bytes(min(count, 2**26))
    start = time.perf_counter()
    with open(path, "wb") as file:
        for first in range(0, count, len(block)):
            file.write(block[: count - first])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def measure(folder: Path, state: tuple[dict, object], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of MEASURED in every repeat. Raises RuntimeError if the values read differ from those saved."""
    params, opt_state = state
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    seconds: dict[str, list[float]] = {name: [] for name in MEASURED}
    with Checkpoints(folder / "run", KEPT, {}) as checkpoints:
        checkpoints.compile(params, opt_state)  # as the loop does
        for step in range(repeats + 1):
            start = time.perf_counter()
            checkpoints.save(step, params, opt_state, {"best": None})
            held = time.perf_counter()
            checkpoints.wait()
            saved = time.perf_counter()
            found_step, *found, _ = checkpoints.restore(*shapes)
            read = time.perf_counter()
            same = jax.tree.map(np.array_equal, tuple(found), state)
            if found_step != step or not all(jax.tree.leaves(same)):
                raise RuntimeError(f"saved step {step}, but read step {found_step} or other numbers")
            if step:  # the first save also starts threads and creates folders
                row = (held - start, saved - start, read - saved, plain_write(folder / "plain", size_of(state)))
                for name, value in zip(MEASURED, row, strict=True):
                    seconds[name].append(value)
    return seconds


def summarise(seconds: dict[str, list[float]], size: int) -> dict:
    """Medians and quartiles in seconds, the rate of each, and the fraction of a save that blocks the loop."""
    found = {}
    for name, values in seconds.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        found[name] = {"seconds": median, "quartiles": [low, high], "mb_per_s": size / median / 1e6}
    pairs = zip(seconds["held"], seconds["on disk"], strict=True)
    return {"bytes": size, "measured": found, "held_share": statistics.median(h / d for h, d in pairs)}


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(CONFIGS), help="model family; both by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="tiny models, to check that it works; their speed means nothing"
    )
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: expected 1 or more")
    results = {}
    print(f"{options.repeats} repeats on {jax.devices()[0].device_kind}")
    print(f"{'family':<12}{'':<14}{'seconds':>9}{'MB/s':>8}  quartiles")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        described = describe("jax", "orbax-checkpoint", "tensorstore", folder=Path(folder))
        for family in [options.family] if options.family else sorted(CONFIGS):
            state = make_state(family, options.small)
            needed, free = (KEPT + 2) * ROOM * size_of(state), shutil.disk_usage(folder).free
            if needed > free:
                print(
                    f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; pass --folder on a "
                    "larger disk",
                    file=sys.stderr,
                )
                return 2
            seconds = measure(Path(folder) / family, state, options.repeats)
            results[family] = found = summarise(seconds, size_of(state))
            shutil.rmtree(Path(folder) / family)
            for name, row in found["measured"].items():
                low, high = row["quartiles"]
                print(
                    f"{family:<12}{name:<14}{row['seconds']:>9.3f}{row['mb_per_s']:>8.0f}  {low:.3f} to {high:.3f}",
                    flush=True,
                )
            print(
                f"{family}: {found['bytes'] / 1e9:.2f} GB; a save blocks the loop for {found['held_share']:.0%} of it"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "folder")}
        content = {"machine": described, "device": jax.devices()[0].device_kind}
        content |= {"settings": settings, "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
