"""Records of three slides in each stored dtype, and their expected content: `python prepare.py FOLDER`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard

WIDTH = 6


def make_slides() -> list[SlideFeatures]:
    """Slides of 40, 7 and 25 patches of 64 px; the second has no width and height."""
    rng, slides = np.random.default_rng(0), []
    for number, patches in enumerate((40, 7, 25)):
        cells = np.stack(np.meshgrid(np.arange(9), np.arange(5)), -1).reshape(-1, 2)
        coords = (rng.permutation(cells)[:patches] * 64).astype(np.int32)
        features = rng.normal(size=(patches, WIDTH)).astype(np.float32)
        size = {"width": 576, "height": 320} if number != 1 else {}
        place = {"coords": coords, "patch_size": 64, "mpp": 0.5, "encoder": "enc"} | size
        slides.append(SlideFeatures(f"S{number}", f"P{number}", features, **place))
    return slides


def main() -> None:
    """Write a folder of records for each dtype, and DTYPE.npz with the content that we read from it."""
    out = Path(sys.argv[1])
    for dtype in ("float16", "bfloat16"):
        folder = out / dtype
        folder.mkdir()
        slides = make_slides()
        write_shard(folder / shard_name(0), slides[:2], edge_um=64.0, dtype=dtype)
        write_shard(folder / shard_name(1), slides[2:], edge_um=64.0, dtype=dtype)
        finish_folder(folder, edge_um=64.0)
        records, expected = Records(folder), {}
        for number, slide in enumerate(slides):
            read = records.read(number)
            expected |= {f"{slide.slide_id}/features": np.asarray(read.features, np.float32)}
            expected |= {f"{slide.slide_id}/coords": read.coords}
        np.savez(out / f"{dtype}.npz", **expected)


if __name__ == "__main__":
    main()
