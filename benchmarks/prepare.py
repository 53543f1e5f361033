"""Preparation benchmark: patches per second by stage, the pipeline on one and two cores, and memory on a huge slide.

The slides are drawn (pyramids of 256 px JPEG tiles, as scanners write them). Each stage alone is timed in processor
seconds of one core, which other programs on the machine disturb little; `OpenSlide loop` is the plain approach, one
`read_region` per patch. Then `pathflip prepare` runs on the same slides with different numbers of cores and workers,
measured in wall time, with each stage's share of the workers' time; `wait` is the time for which the encoder waits for
pixels. There are two encoders: `stain_texture`, and a Hugging Face ViT with newly generated random weights. `at 40x`
requests half the resolution of level 0, so that four times as many pixels are read and resampled.

Predictions before the first run: reading in blocks is 1.3 times as fast as the plain loop if patches are not resampled,
because tiles are decoded once either way and there are fewer calls. `stain_texture` costs five times as much as reading
and a ViT twenty times as much, so that the encoder is the bottleneck of both when reading stays a batch ahead; `wait`
is below 3% with a core to spare, and two workers on two cores are 1.9 times as fast as one worker on one core. At 40x,
reading costs half as much as `stain_texture`. A slide of 100,000 x 100,000 pixels takes over 1.5 GB, nearly all of it
for the tissue mask.

Results, in processor time because the two cores were busy: blocks of 2,048 px took twice the time of the plain loop
(337 against 647 patches/s), because OpenSlide's cache avoids repeated decoding either way and large images do not fit
in the processor's cache. Patches are therefore now read one by one, in the order of blocks, and converted by Pillow:
491 against 531 patches/s. `stain_texture` (68) costs seven times as much as that and a ViT of six layers (53) nine
times; both take 85 to 91% of the workers' time, `wait` 2 to 6%. At 40x, reading (82) costs as much as `stain_texture`,
three fifths of it for decoding four tiles per patch, and that encoder is the bottleneck only with a core to spare for
reading. The huge slide took 1.52 GB before its mask was made block by block with at most 2**24 pixels, and was killed
for lack of memory with patches of 64 px; now it takes 0.36 GB.

    python benchmarks/prepare.py --json benchmarks/results/prepare.json
    python benchmarks/prepare.py --huge 100000 --slides 0     # only the memory of the huge slide
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tifffile
from machine import describe
from PIL import Image

from data_prep.build import prepare
from data_prep.device_pipeline import DevicePipeline
from data_prep.encoders import load_encoder
from data_prep.jobs import Job
from data_prep.layout import plan
from data_prep.settings import PrepareSettings
from data_prep.slide_image import render, write_slide
from data_prep.slides import Slide, open_slide
from data_prep.tiling import Tiles, read_patches, tile_slide
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import write_shard

PATCH = 256
ENCODED = 128  # patches on which an encoder alone is timed
VIT = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 224, "patch_size": 16}
CASES = {"at 20x": 0.5, "at 40x": 1.0}  # requested micrometres per pixel; the slides have 0.5


def make_slides(folder: Path, count: int, edge: int) -> None:
    """Write slides of tissue and glass: one drawn slide, tiled to `edge` pixels, under several names."""
    rng = np.random.default_rng(0)
    picture = render(plan(rng, "glands", 2048), rng)
    times = [-(-edge // size) for size in picture.shape[:2]]
    write_slide(folder / "S0.tiff", np.tile(picture, (*times, 1))[:edge, :edge])
    for number in range(1, count):
        os.link(folder / "S0.tiff", folder / f"S{number}.tiff")


def make_vit(folder: Path, layers: int) -> str:
    """A ViT with random weights as Hugging Face saves it; returns the encoder's name."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=layers, **VIT)
    transformers.utils.logging.disable_progress_bar()
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    size = {"height": VIT["image_size"], "width": VIT["image_size"]}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(processor | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return f"hf:{folder}"


def write_huge_slide(path: Path, edge: int, tissue: int) -> None:
    """Write a square slide of `edge` pixels, glass except for a square of tissue, as a BigTIFF pyramid; takes a second.

    Two tiles are compressed once and written repeatedly. `tissue` is a multiple of 8,192 pixels, the area that a tile
    covers on the level from which the tissue mask is made.
    """
    size, mpp = 512, 0.5
    grain = np.random.default_rng(0).integers([150, 70, 130], [210, 130, 190], (16, 16, 3))
    pink = np.tile(grain, (size // 16, size // 16, 1)).astype(np.uint8)
    tiles = [zlib.compress(picture) for picture in (np.full_like(pink, 242), pink)]
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for downsample in (1, 4, 16, 64):
            across = -(-edge // downsample)
            inside = np.arange(-(-across // size)) * size * downsample < tissue
            out.write(
                (tiles[int(row and column)] for row in inside for column in inside),
                shape=(across, across, 3),
                dtype=np.uint8,
                photometric="rgb",
                tile=(size, size),
                compression="deflate",
                subfiletype=0 if downsample == 1 else 1,
                metadata=None,
                resolution=(1e4 / (mpp * downsample),) * 2,
                resolutionunit="CENTIMETER",
            )


def plain_loop(slide: Slide, tiles: Tiles) -> Iterator[np.ndarray]:
    """Patches read by one `read_region` each and resampled where needed, as in plain scripts."""
    edge = round(tiles.patch_size_level0 / slide.image.level_downsamples[tiles.level])
    for x, y in tiles.coords.tolist():
        patch = slide.image.read_region((x, y), tiles.level, (edge, edge)).convert("RGB")
        if edge != tiles.patch_size:
            patch = patch.resize((tiles.patch_size, tiles.patch_size), Image.Resampling.BILINEAR)
        yield np.asarray(patch)


def time_stages(path: Path, encoders: list[str], mpp: float) -> dict[str, float]:
    """Patches per processor second of every stage alone."""
    seconds, counts = {}, {}

    def timed(stage: str, count: int, work: Callable[[], object]) -> None:
        start = time.process_time()
        work()
        seconds[stage], counts[stage] = time.process_time() - start, count

    with open_slide(path) as slide:
        tiles = tile_slide(slide, PATCH, mpp)
        count = len(tiles.coords)
        timed("tissue", count, lambda: tile_slide(slide, PATCH, mpp))
    for stage, read in (("OpenSlide loop", plain_loop), ("read", read_patches)):
        with open_slide(path) as slide:  # reopened: OpenSlide caches decoded tiles
            pixels = read(slide, tiles)
            timed(stage, count, lambda pixels=pixels: sum(map(len, pixels)))
    with open_slide(path) as slide:
        patches = next(read_patches(slide, tiles))[:ENCODED]
    width = 0
    for name in encoders:
        encode = _one_thread(name)
        encode(patches[:8])
        timed(f"encode: {name.partition(':')[0]}", len(patches), lambda encode=encode: encode(patches))
        width = encode.dim
    features = np.zeros((count, width), np.float16)
    place = (tiles.coords, tiles.patch_size_level0, slide.mpp, slide.width, slide.height, "benchmark")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        shard = Path(folder) / "s.tfrecord"
        record = SlideFeatures("S0", "", features, *place)
        write_shard(shard, [record])  # untimed: the first record imports the protobuf classes
        timed("write", count, lambda: write_shard(shard, [record]))
    return {stage: counts[stage] / max(seconds[stage], 1e-6) for stage in seconds}


def _one_thread(name: str):
    encode = load_encoder(name)
    if name != "stain_texture":
        import torch

        torch.set_num_threads(1)
    return encode


def time_pipeline(slides: Path, out: Path, encoder: str, mpp: float, workers: int) -> dict:
    """Wall-clock measurement of `prepare`: patches/s, shares of the stages, and the peak of the largest worker."""
    start = time.perf_counter()
    report = prepare(slides, out, PrepareSettings(encoder=encoder, mpp=mpp, patch_size=PATCH, workers=workers))
    seconds = time.perf_counter() - start
    if report.failed:
        raise RuntimeError(report.summary())
    stages = ("tissue", "wait", "encode", "write")
    whole = sum(report.timings.seconds[stage] for stage in stages)
    return {
        "patches": report.timings.patches,
        "patches_per_s": report.timings.patches / seconds,
        "shares": {stage: report.timings.seconds[stage] / whole for stage in stages},
        "reading_ahead": report.timings.seconds["read"] / whole,
        "peak_gb": report.timings.peak_bytes / 1e9,
    }


def on_cores(count: int, work: Callable, *arguments):
    """Run a function in a separate process, with its child processes, on the first `count` cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_pin, initargs=(count,)) as pool:
        return pool.submit(work, *arguments).result()


def _pin(count: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def measure_speed(folder: Path, slides: int, edge: int, layers: int) -> dict:
    """Speeds of single stages and of whole pipelines, printed as they are measured."""
    source = folder / "slides"
    source.mkdir()
    make_slides(source, slides, edge)
    encoders = ["stain_texture"] + ([make_vit(folder / "vit", layers)] if layers else [])
    results: dict[str, dict] = {}
    for case, mpp in CASES.items():
        alone = on_cores(1, time_stages, source / "S0.tiff", encoders, mpp)
        results[case] = {"alone": alone, "pipeline": {}}
        print(f"\n{case}: each stage alone, patches per processor second")
        print("".join(f"  {stage} {rate:.0f}" for stage, rate in alone.items()))
        most = len(os.sched_getaffinity(0))
        for encoder in encoders:
            kind = encoder.partition(":")[0]
            for cores, workers in ((1, 1), (2, 1), (2, 2)):
                if cores > most:
                    print(f"  {cores} cores: skipped, this process has {most}")
                    continue
                out = folder / f"{case}-{kind}-{cores}-{workers}"
                found = on_cores(cores, time_pipeline, source, out, encoder, mpp, workers)
                results[case]["pipeline"][f"{kind}, {cores} cores, {workers} workers"] = found
                shares = ", ".join(f"{stage} {share:.0%}" for stage, share in found["shares"].items())
                print(f"  {kind}, {cores} cores, {workers} workers: {found['patches_per_s']:.0f} patches/s; {shares}")
    return results


def measure_memory(folder: Path, edge: int, tissue: int) -> dict:
    """Memory of `prepare` on one huge slide."""
    source = folder / "huge"
    source.mkdir()
    write_huge_slide(source / "huge.tiff", edge, tissue)
    found = on_cores(1, time_pipeline, source, folder / "huge-records", "stain_texture", 0.5, 1)
    found["reader_peak_gb"] = on_cores(1, reader_peak, source / "huge.tiff", folder) / 1e9
    print(
        f"\n{edge} x {edge} pixels, {found['patches']} patches: peak memory of a worker {found['peak_gb']:.2f} GB, of "
        f"a reader for encoders that own the devices {found['reader_peak_gb']:.2f} GB"
    )
    return found


class Zeros:
    """Encoder on devices that takes no time."""

    name, dim, batch_size = "zeros", 8, 64

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Features of no meaning."""
        return np.zeros((len(patches), self.dim), np.float32)

    dispatch = __call__


def reader_peak(slide: Path, folder: Path) -> int:
    """Largest size, in bytes, of a process that reads a slide ahead for an encoder on devices."""
    settings = PrepareSettings(encoder=Zeros.name, mpp=0.5, patch_size=PATCH).of_records()
    job = Job(slide.stem, "", slide, folder / "reader.tfrecord", folder / "part.tfrecord", settings)
    ((_, outcome),) = DevicePipeline({Zeros.name: Zeros()}, 1).run([job])
    return outcome.timings.peak_bytes


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slides", type=int, default=4, help="slides per pipeline; 0 skips the speed measurements (default 4)"
    )
    parser.add_argument("--edge", type=int, default=6144, help="their edge in pixels (default 6144)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the ViT; 0 leaves it out (default 6)")
    parser.add_argument("--huge", type=int, default=100_000, help="edge of the huge slide; 0 for none (default 100000)")
    parser.add_argument("--tissue", type=int, default=8192, help="edge of its square of tissue (default 8192)")
    parser.add_argument("--folder", type=Path, help="folder to write to; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        results = {"machine": describe("numpy", "openslide-python", "torch", "transformers", folder=folder)}
        results["settings"] = {k: v for k, v in vars(options).items() if k not in ("json", "folder")}
        if options.slides:
            results["speed"] = measure_speed(folder, options.slides, options.edge, options.layers)
        if options.huge:
            results["memory"] = measure_memory(folder, options.huge, options.tissue)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
