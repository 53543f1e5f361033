"""Records compared with h5py and .pt: writing, and cold reads of whole slides and random regions, on the same features.

The records are one shard, as `prepare` writes them; the other formats have one file per slide. There are three kinds of
HDF5 files: `h5py` is the fastest layout (contiguous, patches stored region by region as in our records, so that a
region is one slice); `h5py, tool order` stores the patches row by row over the slide, contiguous, so that regions are
gathered from the whole array; `h5py, CLAM` has the same order in CLAM's layout, an array that grows by batches with one
chunk per row, from which a region is read as runs of adjacent rows. Our reads check every region's CRC32C and that
every feature is finite; the others check nothing. "Cold" means that files are fsynced and dropped from the page cache
until none of their pages is left there; the host of a virtual disk may still hold the pages, so ratios within a run say
more than MB/s. Ratios compare the same slide and repeat, in an order redrawn each time; the script prints their median
and quartiles. A first round is not counted.

    python benchmarks/records.py --slides 6 --repeats 8 --json benchmarks/results/records.json
"""

import argparse
import ctypes
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import chain, islice, pairwise
from pathlib import Path

import h5py
import numpy as np
from machine import describe

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.data.records.regions import cut_regions

PATCH = 256
REFERENCE = "records"
CONTIGUOUS, TOOL_ORDER, CLAM, PT = "h5py", "h5py, tool order", "h5py, CLAM", ".pt"
SLIDES_PER_SHARD = 32
WRITES = 3  # writes per repeat: a shared disk is sometimes four times as slow
CLAM_BATCH = 256  # patches that CLAM appends at a time


def place_slide(number: int, features: np.ndarray) -> SlideFeatures:
    """A slide with these patches [N, F] as a square of tissue, row by row."""
    edge = int(np.ceil(np.sqrt(len(features))))
    coords = np.stack(np.divmod(np.arange(len(features)), edge)[::-1], -1).astype(np.int32) * PATCH
    return SlideFeatures(f"slide{number}", "", features, coords, PATCH, 0.5, encoder="benchmark")


def make_slide(number: int, patches: int, width: int) -> SlideFeatures:
    """A slide of random float16 features, which no format has to convert."""
    features = np.random.default_rng(number).standard_normal((patches, width), np.float32)
    return place_slide(number, features.astype(np.float16))


def write_records(folder: Path, slides: Iterable[SlideFeatures]) -> None:
    """Write slides as a folder of records, in shards of the size that `pathflip prepare` writes."""
    folder.mkdir()
    slides = iter(slides)
    for number, first in enumerate(slides):  # one slide at a time is in memory
        write_shard(folder / shard_name(number), chain([first], islice(slides, SLIDES_PER_SHARD - 1)))
    finish_folder(folder)


def sync(path: Path) -> None:
    """Flush a file to disk, so that timings include the whole write and the page cache can be dropped."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop(path: Path) -> None:
    """Drop a file from the page cache, including pages still being read ahead. Raises RuntimeError if pages stay."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        for _ in range(1000):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not resident(fd):
                return
            time.sleep(0.001)
    finally:
        os.close(fd)
    raise RuntimeError(f"{path}: its pages stay in the page cache; pass --folder on a local disk")


def resident(fd: int) -> int:
    """Number of pages of a file in the page cache."""
    size = os.fstat(fd).st_size
    if not size:
        return 0
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        addresses = (ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
        failed = libc.mincore(*addresses)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int((pages & 1).sum())


def write_h5(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    """An HDF5 file, contiguous."""
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords
    sync(path)


def write_clam(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    """An HDF5 file as CLAM writes it: arrays that grow by a batch, in chunks of a row."""
    with h5py.File(path, "w") as file:
        for name, array in (("features", features), ("coords", coords)):
            width = array.shape[1:]
            stored = file.create_dataset(name, (0, *width), array.dtype, maxshape=(None, *width), chunks=(1, *width))
            for start in range(0, len(array), CLAM_BATCH):
                batch = array[start : start + CLAM_BATCH]
                stored.resize(start + len(batch), axis=0)
                stored[start:] = batch
    sync(path)


def runs_of(order: np.ndarray) -> list[tuple[int, int]]:
    """Runs of adjacent rows, each as its first row and the row after its last."""
    cuts = [0, *(np.flatnonzero(np.diff(order) != 1) + 1).tolist(), len(order)]
    return [(int(order[a]), int(order[b - 1]) + 1) for a, b in pairwise(cuts)]


class Formats:
    """The same slides in every format: writes all slides, reads a slide, and reads regions of a slide."""

    def __init__(self, folder: Path, slides: list[SlideFeatures], torch) -> None:
        self.folder, self.slides, self.torch = folder, slides, torch
        self.cuts = [cut_regions(slide) for slide in slides]
        # Features in the order of regions, sorted here so that no format's writing time includes the sorting.
        self.sorted = [slide.features[cut.order] for slide, cut in zip(slides, self.cuts, strict=True)]
        # The rows of each region in a tool's file, as runs; computing this index is not timed either.
        self.runs = [[runs_of(cut.order[a:b]) for a, b in pairwise(cut.rows)] for cut in self.cuts]
        self.names = [REFERENCE, CONTIGUOUS, TOOL_ORDER, CLAM] + ([PT] if torch else [])
        self.records: Records | None = None

    def path(self, name: str, i: int) -> Path:
        """Path of slide i in a format."""
        files = {CONTIGUOUS: f"{i}_sorted.h5", TOOL_ORDER: f"{i}.h5", CLAM: f"{i}_clam.h5", PT: f"{i}.pt"}
        return self.folder / files.get(name, shard_name(0))

    def write(self, name: str) -> None:
        """Write every slide and flush it to disk."""
        if name == REFERENCE:
            write_shard(self.path(name, 0), self.slides)
            return
        for i, slide in enumerate(self.slides):
            path = self.path(name, i)
            if name == PT:
                self.torch.save(self.torch.from_numpy(slide.features), path)
                sync(path)
            elif name == CLAM:
                write_clam(path, slide.features, slide.coords)
            else:
                write_h5(path, self.sorted[i] if name == CONTIGUOUS else slide.features, slide.coords)

    def open(self) -> None:
        """Open the records as training does: once, before the first step."""
        finish_folder(self.folder)
        self.records = Records(self.folder)

    def read_slide(self, name: str, i: int) -> np.ndarray:
        """All features of slide i."""
        path = self.path(name, i)
        if name == REFERENCE:
            return self.records.read(i).features
        if name == PT:
            return self.torch.load(path, weights_only=True).numpy()
        with h5py.File(path, "r") as file:
            return file["features"][()]

    def read_regions(self, name: str, i: int, regions: np.ndarray) -> list[np.ndarray]:
        """The features of some regions of slide i, one array each."""
        if name == REFERENCE:
            return self.records.read_regions(i, regions)
        rows, order = self.cuts[i].rows, self.cuts[i].order
        if name == CONTIGUOUS:
            with h5py.File(self.path(name, i), "r") as file:
                features = file["features"]
                return [features[rows[r] : rows[r + 1]] for r in regions]
        if name == CLAM:  # twice as fast as reading all chunks
            with h5py.File(self.path(name, i), "r") as file:
                features = file["features"]
                return [np.concatenate([features[a:b] for a, b in self.runs[i][r]]) for r in regions]
        features = self.read_slide(name, i)  # faster than selecting scattered rows with h5py
        return [features[order[rows[r] : rows[r + 1]]] for r in regions]


def measure(formats: Formats, repeats: int, regions: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every operation, format, repeat and slide; the order of the formats is redrawn for every slide."""
    rng = np.random.default_rng(seed)
    seconds = {task: {name: [] for name in formats.names} for task in ("write", "cohort", "slide", "regions")}

    def timed(task: str, name: str, call: Callable) -> object:
        start = time.perf_counter()
        result = call()
        seconds[task][name].append(time.perf_counter() - start)
        return result

    count = len(formats.slides)
    for number in range(1 + repeats):
        if number == 1:  # the first round maps memory and disk blocks, which is slow on a virtual machine
            for found in (found for by_format in seconds.values() for found in by_format.values()):
                found.clear()
        for name in chain(*(rng.permutation(formats.names) for _ in range(WRITES))):
            for i in range(count):
                formats.path(name, i).unlink(missing_ok=True)
            sync(formats.folder)  # so that no format's time includes the deletion
            timed("write", name, lambda name=name: formats.write(name))
        formats.open()
        for name in rng.permutation(formats.names):
            for i in range(count):
                drop(formats.path(name, i))
            timed("cohort", name, lambda name=name: [formats.read_slide(name, i).shape for i in range(count)])
        for i in range(count):
            chosen = rng.choice(len(formats.cuts[i].grid), min(regions, len(formats.cuts[i].grid)), replace=False)
            for name in rng.permutation(formats.names):
                drop(formats.path(name, i))
                timed("slide", name, lambda name=name, i=i: formats.read_slide(name, i))
                drop(formats.path(name, i))
                found = timed("regions", name, lambda name=name, i=i, c=chosen: formats.read_regions(name, i, c))
                rows = formats.cuts[i].rows
                for part, r in zip(found, chosen, strict=True):
                    if not np.array_equal(part, formats.sorted[i][rows[r] : rows[r + 1]]):
                        raise RuntimeError(f"{name} returned wrong features for region {r} of slide {i}")
    return seconds


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=6)
    parser.add_argument("--patches", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--regions", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder to write to; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        torch = None
        print("torch is not installed: .pt is left out")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        described = describe("numpy", "h5py", "torch", "google-crc32c", folder=Path(folder))
        slides = [make_slide(i, options.patches, options.width) for i in range(options.slides)]
        formats = Formats(Path(folder), slides, torch)
        seconds = measure(formats, options.repeats, options.regions, options.seed)
    slide_mb = options.patches * options.width * 2 / 1e6
    patches = statistics.mean(float(np.mean(np.diff(cut.rows))) for cut in formats.cuts)
    sizes = {"write": slide_mb * options.slides, "cohort": slide_mb * options.slides, "slide": slide_mb}
    sizes["regions"] = patches * options.regions * options.width * 2 / 1e6
    titles = {"write": f"write {options.slides} slides", "slide": "whole slide, cold"}
    titles["cohort"] = f"{options.slides} slides in order, cold"
    titles["regions"] = f"{options.regions} random regions, cold"
    results = {}
    print(f"{options.slides} slides of {options.patches} patches x {options.width} float16, {options.repeats} repeats")
    print(f"{'':<26}{'format':<20}{'ms':>8}{'MB/s':>8}  speed-up of records (quartiles)")
    for task, by_format in seconds.items():
        results[task] = {}
        for name in formats.names:
            median = statistics.median(by_format[name])
            pairs = zip(by_format[name], by_format[REFERENCE], strict=True)
            low, ratio, high = np.quantile([theirs / ours for theirs, ours in pairs], [0.25, 0.5, 0.75]).tolist()
            figures = {"ms": median * 1e3, "mb_per_s": sizes[task] / median, "ratio": ratio, "quartiles": [low, high]}
            results[task][name] = figures
            faster = "" if name == REFERENCE else f"  {ratio:.2f}x as fast ({low:.2f} to {high:.2f})"
            print(f"{titles[task]:<26}{name:<20}{median * 1e3:>8.1f}{sizes[task] / median:>8.0f}{faster}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "folder")}
        content = {"machine": described, "settings": settings, "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
