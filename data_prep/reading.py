"""Reading of slides ahead of the encoder, in processes of their own: tissue, patches and pixels, never features.

A reader fills the slots of its ring, a shared memory segment, with the pixels of patches and returns which patches they
are. Its memory is the ring, an open slide and its list of patches, whatever the slide's size; a reader that dies takes
only its ring with it. Nothing here imports JAX: the devices belong to the process that encodes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.shared_memory import SharedMemory
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data_prep import slides
from data_prep.jobs import Job, Outcome, failed, peak_bytes, tile_for
from data_prep.slides import Slide, open_slide
from data_prep.tiling import BATCH_PIXELS, Tiles, read_patch

_GRID = ("patch_size", "mpp", "min_tissue", "keep_ink", "tissue", "holes_um2", "smallest_um2")


class Slot(NamedTuple):
    """Place for pixels: `index` in the ring of this `name`, whose slots have `size` bytes."""

    name: str
    index: int
    size: int


class Run(NamedTuple):
    """Patches that follow each other in a slot: rows of the slide's list of patches, of one grid."""

    grid: int
    rows: Int[np.ndarray, "n"]


class Opened(NamedTuple):
    """Open slide: its resolution, size and notes, and the patches of each grid, or why it has none."""

    mpp: float
    width: int
    height: int
    notes: tuple[str, ...]
    grids: list[Tiles | Outcome]


@dataclass(frozen=True)
class Chunk:
    """Content of a slot: `runs` of patches in the order of their pixels.

    `start` counts the slide's patches of all grids before it; `last` is its last chunk. The first one brings `opened`.
    `seconds` are those of its stages, `peak_bytes` the reader's largest size.
    """

    start: int
    runs: list[Run]
    last: bool
    opened: Opened | None
    seconds: dict[str, float]
    peak_bytes: int


def grids_of(jobs: Sequence[Job]) -> list[Job]:
    """One job for each different grid of patches among jobs of one slide."""
    found = {grid_of(job): job for job in reversed(jobs)}
    return [found[key] for key in dict.fromkeys(map(grid_of, jobs))]


def grid_of(job: Job) -> tuple:
    """Settings that determine the patches of a slide."""
    return tuple(job.settings.get(name) for name in _GRID)


def slot_bytes(jobs: Sequence[Job]) -> int:
    """Size of a slot: the pixels of a network's batch, and of a patch of any job."""
    return 3 * max(BATCH_PIXELS, *(job.settings["patch_size"] ** 2 for job in jobs))


class _Reading:
    """Slide being read, with the order of its patches.

    The patches of one grid are read in their own order. Those of several are read together, block by block, since
    OpenSlide's cache holds the decoded tiles of a block.
    """

    def __init__(self, slide: Slide, jobs: Sequence[Job]) -> None:
        start = time.perf_counter()
        self.slide, self.position = slide, 0
        keys = [grid_of(job) for job in grids_of(jobs)]
        found = [_tiles(slide, [job for job in jobs if grid_of(job) == key]) for key in keys]
        self.tiles = {i: tiles for i, tiles in enumerate(found) if isinstance(tiles, Tiles)}
        self.opened = Opened(slide.mpp, slide.width, slide.height, slide.notes, found)
        grid = np.repeat(list(self.tiles), [len(tiles.coords) for tiles in self.tiles.values()])
        row = np.concatenate([np.arange(len(tiles.coords)) for tiles in self.tiles.values()] or [np.empty(0, int)])
        if len(self.tiles) > 1:
            levels = [slide.image.level_downsamples[tiles.level] for tiles in self.tiles.values()]
            corners = np.concatenate([tiles.coords for tiles in self.tiles.values()])
            x, y = (corners // (slides.BLOCK * min(levels))).T
            order = np.lexsort((row, grid, x, y))
            grid, row = grid[order], row[order]
        self.grid, self.row = grid.astype(int), row
        self.tissue_seconds = time.perf_counter() - start

    def fill(self, pixels: np.ndarray) -> Chunk:
        """Read as many patches as the slot holds."""
        begin, first, used, runs = time.perf_counter(), self.position, 0, []
        while self.position < len(self.row):
            grid, row = self.grid[self.position], self.row[self.position]
            tiles = self.tiles[grid]
            shape = (tiles.patch_size, tiles.patch_size, 3)
            end = used + int(np.prod(shape))
            if end > len(pixels):
                break
            read_patch(self.slide, tiles, tiles.coords[row].tolist(), pixels[used:end].reshape(shape))
            if not runs or runs[-1][0] != grid:
                runs.append((grid, []))
            runs[-1][1].append(row)
            self.position, used = self.position + 1, end
        seconds = {"read": time.perf_counter() - begin, "tissue": 0.0 if first else self.tissue_seconds}
        return Chunk(
            first,
            [Run(int(grid), np.array(rows)) for grid, rows in runs],
            self.position == len(self.row),
            None if first else self.opened,
            seconds,
            peak_bytes(),
        )


_reading: _Reading | None = None  # of this process
_ended = -1  # number of the slide that this process has read to its end


def fill(slot: Slot, number: int, jobs: Sequence[Job]) -> Chunk | Outcome | None:
    """Fill a slot with the next patches of slide `number` of a run, which the first call for it opens.

    `jobs` are those of this slide, which open it alike. Returns None once the slide is read, and the error of a slide
    that cannot be read: a reader raises for nothing that a file contains.
    """
    global _reading
    if number == _ended:
        return None
    try:
        if _reading is None:
            job = jobs[0]
            icc = bool(job.settings.get("icc"))
            _reading = _Reading(open_slide(job.file, job.settings["assume_mpp"], job.mpp, job.reader, icc), jobs)
        chunk = _reading.fill(_slot(slot))
    except Exception as error:
        _close(number)
        return failed(jobs[0], error)
    if chunk.last:
        _close(number)
    return chunk


def _close(number: int) -> None:
    global _reading, _ended
    if _reading is not None:
        _reading.slide.close()
    _reading, _ended = None, number


def _tiles(slide: Slide, jobs: Sequence[Job]) -> Tiles | Outcome:
    try:
        return tile_for(jobs, slide)
    except Exception as error:
        return failed(jobs[0], error)


def _slot(slot: Slot) -> np.ndarray:
    start = slot.index * slot.size
    return np.frombuffer(_attached(slot.name).buf, np.uint8)[start : start + slot.size]


@lru_cache(maxsize=1)
def _attached(name: str) -> SharedMemory:
    return SharedMemory(name)
