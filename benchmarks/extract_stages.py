"""Stages of slides to features, each alone: decoding, transfer and transform, network; `extract.py` starts it.

`--side decode` reads the patches of the largest slide in one thread, by each reader that this machine has, and prints
patches per processor second. The other sides print patches per second of a transform and of the network, on patches
that are in memory; that of `plain` is Pillow's, on one core.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy as np
import openslide
from extract_sides import Setup, Tiled, make_parser, make_setup, pillow_transform, plain_encoder, read_tile

TILES = 64  # patches transformed by Pillow
SECONDS = 2.0  # of a measurement, at least


def decode(setup: Setup) -> dict[str, float]:
    """Patches per processor second of one thread, by reader."""
    slide = max(setup.slides, key=lambda slide: len(slide.coords))
    readers = {"OpenSlide": with_openslide, "ours": with_ours, "ours, tifffile": partial(with_ours, reader="tifffile")}
    if find_spec("cucim"):
        readers["cuCIM"] = with_cucim
    found = {}
    for name, read in readers.items():
        count = sum(1 for _ in read(slide))  # untimed: imports
        start, passes = time.process_time(), 0
        while not passes or time.process_time() - start < SECONDS:
            passes += sum(1 for _ in read(slide)) // count  # the file is opened again: OpenSlide caches decoded tiles
        found[name] = passes * count / (time.process_time() - start)
    return found


def with_openslide(slide: Tiled) -> Iterator[np.ndarray]:
    """Plain loop: one `read_region` per patch."""
    with openslide.OpenSlide(slide.path) as image:
        for x, y in slide.coords.tolist():
            yield np.asarray(read_tile(image, slide, x, y))


def with_ours(slide: Tiled, reader: str = "openslide") -> Iterator[np.ndarray]:
    """Our reader, with its checks of transparent pixels and damage."""
    from data_prep.slides import open_slide
    from data_prep.tiling import Tiles, read_patches

    with open_slide(slide.path, reader=reader) as opened:
        level0 = round(slide.edge * opened.image.level_downsamples[slide.level])
        for patches in read_patches(opened, Tiles(slide.coords, level0, slide.size, slide.level)):
            yield from patches


def with_cucim(slide: Tiled) -> Iterator[np.ndarray]:
    """RAPIDS' reader on the CPU."""
    from cucim import CuImage

    image = CuImage(str(slide.path))
    for x, y in slide.coords.tolist():
        yield np.asarray(image.read_region((x, y), (slide.edge,) * 2, slide.level))


def rate(call: Callable[[], object], patches: int) -> float:
    """Patches per second of a call that waits for its result: the median, after one that warms up."""
    call()
    seconds, begin = [], time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return patches / statistics.median(seconds)


def drawn(setup: Setup) -> np.ndarray:
    """A batch of patches [B, P, P, 3] of any content."""
    size = setup.slides[0].size
    return np.random.default_rng(0).integers(0, 256, (setup.batch, size, size, 3), dtype=np.uint8)


def ours(setup: Setup) -> dict[str, float]:
    """Stages of `data_prep.vision_encoders` on all local devices."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pathflip_jax.convert.vision import load_vision
    from pathflip_jax.vision.transform import transformed

    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    whole, sharding = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    dtype, precision = (jnp.bfloat16, "default") if setup.half else (jnp.float32, "highest")
    graph, state = nnx.split(load_vision(setup.recipe, setup.weights, dtype, whole).network)
    transform = jax.jit(lambda x: transformed(x, setup.recipe.transform), out_shardings=sharding)
    patches = drawn(setup)

    @jax.jit
    def network(state, images):
        with jax.default_matmul_precision(precision):
            return nnx.merge(graph, state)(images, dtype)

    images = transform(jax.device_put(patches, sharding))
    return {
        "transform": rate(lambda: transform(jax.device_put(patches, sharding)).block_until_ready(), len(patches)),
        "network": rate(lambda: network(state, images).block_until_ready(), len(patches)),
    }


def plain(setup: Setup) -> dict[str, float]:
    """Pillow's transform on one core, and the eager network."""
    import torch
    from PIL import Image

    transform, encode = pillow_transform(setup.recipe), plain_encoder(setup)
    tiles = [Image.fromarray(patch) for patch in drawn(setup._replace(batch=TILES))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {"transform": rate(lambda: [transform(tile) for tile in tiles], TILES)}
    torch.set_num_threads(threads)
    side = setup.recipe.network.image
    images = torch.randn(setup.batch, 3, side, side, device=setup.device)
    return found | {"network": rate(lambda: encode(images).float().cpu(), setup.batch)}


def tuned(setup: Setup) -> dict[str, float]:
    """Compiled transform from pinned memory, and the compiled network."""
    import torch
    from extract_sides import Tuned

    encoder, patches = Tuned(setup), torch.from_numpy(drawn(setup))
    if setup.device == "cuda":
        patches = patches.pin_memory()

    def finish(found):
        if setup.device == "cuda":
            torch.cuda.synchronize()
        return found

    with torch.inference_mode():
        images = finish(encoder.transform(encoder.send(patches)))
        return {
            "transform": rate(lambda: finish(encoder.transform(encoder.send(patches))), setup.batch),
            "network": rate(lambda: encoder.network(images).float().cpu(), setup.batch),
        }


def main() -> int:
    """Measure the stages of a side; the last line of output is JSON."""
    options = make_parser(__doc__).parse_args()
    stages = {"decode": decode, "ours": ours, "plain": plain, "tuned": tuned}
    print(json.dumps(stages[options.side](make_setup(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
