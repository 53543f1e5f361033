"""A slide of millions of patches: time and memory to write, open, sample and embed it, stage by stage.

A stage's peak is the highest resident size of the process during that stage (VmHWM, reset before each stage if the
kernel allows it); `started` is the memory of Python, JAX and the model before the slide is made. The slide is a square
of tissue with random features.

    python benchmarks/giant_slide.py --patches 2000000 --width 384 --json benchmarks/results/giant_slide.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx
from machine import describe, reset_peak, resident_peak
from records import PATCH

from pathflip_jax.data.batches.bags import regions_of
from pathflip_jax.data.batches.patches import PatchSampler
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.data.storage import blocks
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP

BATCHES, REGIONS = 20, 24


def make_slide(patches: int, width: int) -> SlideFeatures:
    """A square of patches, row by row as tools write them, with random float16 features in a memory-mapped file."""
    rng, features = np.random.default_rng(0), blocks.scratch((patches, width), np.float16)
    for rows, block in blocks.row_blocks(features):
        features[rows] = rng.standard_normal(block.shape, np.float32)
    edge = int(np.ceil(np.sqrt(patches)))
    coords = np.stack([np.arange(patches) % edge, np.arange(patches) // edge], -1).astype(np.int32) * PATCH
    return SlideFeatures("giant", "", features, coords, PATCH, 0.5, encoder="random")


def measure(folder: Path, patches: int, width: int, model: PathFLIP) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each stage, by name."""
    found: dict[str, dict[str, float]] = {"started": {"seconds": 0.0, "peak_gb": resident_peak() / 1e9}}
    print(f"{'started':<28}{'':>9}   {found['started']['peak_gb']:>7.2f} GB")

    def timed(stage: str, call: Callable) -> object:
        reset_peak()
        start = time.perf_counter()
        result = call()
        found[stage] = {"seconds": time.perf_counter() - start, "peak_gb": resident_peak() / 1e9}
        print(f"{stage:<28}{found[stage]['seconds']:>9.1f} s {found[stage]['peak_gb']:>7.2f} GB", flush=True)
        return result

    timed("write", lambda: write_shard(folder / shard_name(0), [make_slide(patches, width)]))
    timed("finish", lambda: finish_folder(folder))
    records = timed("open", lambda: Records(folder))
    sampler = PatchSampler(records, REGIONS, records.patch_slots, 2)
    bag = regions_of(records, [0])

    def train() -> None:
        for step in range(BATCHES):
            sampler.draw([bag], [np.random.default_rng(step)])

    timed(f"sample {BATCHES} x {REGIONS} regions", train)
    stored = timed("check", lambda: open_slide(records, 0))
    predictor = Predictor(model, {"data": {"cut": "grid"}}, None)
    embedding = timed("embed", lambda: predictor.encode_slide(stored))
    if not np.isfinite(embedding.slide).all() or len(embedding.regions) != records.slides[0].num_regions:
        raise RuntimeError("the embedding is not finite, or lacks regions")
    return found


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument(
        "--layers", type=int, default=12, help="layers of the Q-Former (12); half of them attend to patches"
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--folder", type=Path, help="folder to write to; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    config = PathFLIPConfig(
        feature_dim=options.width, layers=options.layers, hidden=options.hidden, intermediate=4 * options.hidden
    )
    model = PathFLIP(config, nnx.Rngs(0))
    print(f"{options.patches} patches x {options.width} float16, {options.patches * options.width * 2 / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        described = describe("jax", "numpy", folder=Path(folder))
        stages = measure(Path(folder), options.patches, options.width, model)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "folder")}
        content = {"machine": described, "settings": settings, "stages": stages}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
