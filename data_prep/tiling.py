"""Tiling of an open slide into tissue patches at one physical resolution.

All coordinates are level-0 pixels, as in QuPath and every feature file. A slide is read once at low resolution to find
its tissue and once, block by block, to cut its patches. Only the list of patches grows with the slide.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from data_prep import slides
from data_prep.detectors import TissueSettings, find_tissue
from data_prep.slides import Slide, averaged
from data_prep.tissue_mask import Tissue

_LARGEST_ENLARGEMENT = 1.25
_NEAR = 0.02  # a level this close to the target resolution is used without resampling: 0.499 counts as 0.5
BATCH_PIXELS = 1 << 22  # pixels per batch: 64 patches of 256 px, a network's batch
_NOTED_PEN = 0.1  # a larger pen fraction of the stained area is noted: it may be a blue tissue stain
_MASK_PER_PATCH = 16  # mask pixels along a patch's edge
_TISSUE = TissueSettings()


class Tiles(NamedTuple):
    """Patch locations of a slide, and the level they are read from.

    `coords` [N, 2] are x, y of the top-left corners at level 0, in the order in which `read_patches` yields them:
    blocks of about 2,048 px of the read level, row by row inside. `patch_size_level0` is a patch's edge there,
    `patch_size` the edge in pixels after resampling from `level`. `notes` are for the user.
    """

    coords: Int[np.ndarray, "N 2"]
    patch_size_level0: int
    patch_size: int
    level: int
    notes: tuple[str, ...] = ()


def tile_slide(
    slide: Slide,
    patch_size: int = 256,
    mpp: float = 0.5,
    min_tissue: float = 0.25,
    tissue: TissueSettings = _TISSUE,
    review: Callable[[Tissue], None] | None = None,
) -> Tiles:
    """Tile the tissue of a slide: a grid of patches of `patch_size` pixels at `mpp`, from the level-0 origin.

    A level within 2 % of `mpp` is not resampled: scanners' 0.499 and 0.502 give patches of 256 px, not 257 and 255.
    A patch counts when at least `min_tissue` of its area is tissue; one that reaches over the slide's edge counts its
    outside as glass and is read as white there. `tissue` says how tissue is found: by default, holes smaller than a
    patch count as tissue, and pen does not. `review` is called with the mask before it is judged. Raises ValueError for
    a slide without tissue, and for one scanned so coarsely that patches would only be enlarged.
    """
    if slide.mpp > _LARGEST_ENLARGEMENT * mpp:
        raise ValueError(
            f"{slide.path}: scanned at {slide.mpp:g} um per pixel ({slide.source}), but patches were requested at "
            f"{mpp:g}; enlarging adds no detail: leave the slide out, or prepare the cohort at `--mpp {slide.mpp:g}`"
        )
    fits = [i for i, scale in enumerate(slide.image.level_downsamples) if slide.mpp * scale <= mpp * (1 + _NEAR)]
    level = max(fits, default=0, key=lambda i: slide.image.level_downsamples[i])
    scale = mpp / slide.mpp
    if abs(slide.image.level_downsamples[level] / scale - 1) <= _NEAR:
        scale = slide.image.level_downsamples[level]
    edge = max(1, round(patch_size * scale))
    area = (edge * slide.mpp) ** 2
    found = find_tissue(slide, max(1.0, edge / _MASK_PER_PATCH), area, tissue)
    if review is not None:
        review(found)
    pen, doubt = found.pen, found.doubt
    share = _shares(found, -(-slide.height // edge), -(-slide.width // edge), edge)
    row, column = np.nonzero((share >= min_tissue) & (share > 0))
    if not len(row):
        raise ValueError(
            f"{slide.path}: no tissue: none of {share.size} patches of {edge} px (level 0) has "
            f"{min_tissue:.0%} tissue or more, the highest share is {share.max():.0%}; leave the slide out, or lower "
            "`--min-tissue` or `--patch-size`"
            + (f"; its image has {doubt}: is it the H&E slide?" if doubt else "")
            + (f"; {pen:.0%} of the stained area is taken for pen ink; pass --keep-ink to keep it" if pen else "")
        )
    if doubt:
        raise ValueError(f"{slide.path}: its image has {doubt}; pass the brightfield slide, or leave this one out")
    block = _block(edge / slide.image.level_downsamples[level])
    order = np.lexsort((column, row, column // block, row // block))
    coords = np.stack([column[order], row[order]], 1).astype(np.int32) * np.int32(edge)
    note = f"{pen:.0%} of the stained area is taken for pen ink and left out; pass --keep-ink to keep it"
    return Tiles(coords, edge, patch_size, level, (*found.notes, *([note] if pen > _NOTED_PEN else [])))


def _shares(tissue: Tissue, rows: int, columns: int, edge: int) -> Float[np.ndarray, "rows columns"]:
    """Tissue fraction of each patch of a grid, whose edge is in level-0 pixels."""
    sums = np.pad(tissue.mask, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64)
    sums.cumsum(1, out=sums)
    sums = _between(sums, np.arange(rows + 1) * edge / tissue.downsample)
    sums = _between(sums.T, np.arange(columns + 1) * edge / tissue.downsample).T
    return np.diff(np.diff(sums, axis=0), axis=1) * (tissue.downsample / edge) ** 2


def _between(sums: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of a table of running sums at fractional positions, the last one beyond its end."""
    at = np.clip(at, 0, len(sums) - 1)
    low = np.minimum(at.astype(int), len(sums) - 2)
    part = (at - low)[:, None]
    return sums[low] * (1 - part) + sums[low + 1] * part


def read_patches(slide: Slide, tiles: Tiles) -> Iterator[UInt8[np.ndarray, "n P P 3"]]:
    """Read the pixels of the patches in the order of `tiles.coords`, in batches of at most 13 MB.

    Each patch is read individually: the cost is in decoding the file's tiles, and OpenSlide caches those of a block.
    Raises OSError for damaged pixels.
    """
    size = tiles.patch_size
    most = int(np.clip(BATCH_PIXELS // size**2, 1, 1024))
    for start in range(0, len(tiles.coords), most):
        corners = tiles.coords[start : start + most]
        batch = np.empty((len(corners), size, size, 3), np.uint8)
        for patch, corner in zip(batch, corners.tolist(), strict=True):
            read_patch(slide, tiles, corner, patch)
        yield batch


def read_patch(slide: Slide, tiles: Tiles, corner: Sequence[int], out: UInt8[np.ndarray, "P P 3"]) -> None:
    """Read the pixels of the patch whose top-left corner is x, y at level 0.

    Patches are resampled only when the level is not already at the target resolution, each from its own pixels, and
    averaged down while they are read where one is larger than a block. Their colours are converted last, with
    `slide.to_srgb`. Raises OSError for damaged pixels.
    """
    _read_stored(slide, tiles, corner, out)
    if slide.to_srgb is not None:
        out[:] = slide.to_srgb(out)


def _read_stored(slide: Slide, tiles: Tiles, corner: Sequence[int], out: UInt8[np.ndarray, "P P 3"]) -> None:
    """Read the pixels of a patch in the colours of the file."""
    size, scale = tiles.patch_size, slide.image.level_downsamples[tiles.level]
    edge = tiles.patch_size_level0 / scale  # in pixels of the level
    if abs(edge - size) < 0.5:
        out[:] = slide.read(*corner, tiles.level, size, size)
        return
    step = max(1, int(edge // slides.BLOCK))
    begin = np.array(corner) / scale
    first, last = np.floor(begin).astype(int), np.ceil(begin + edge).astype(int)
    region = Image.fromarray(_region(slide, tiles.level, step, tuple(first), tuple(last)))
    box = (*(begin - first) / step, *(begin - first + edge) / step)
    out[:] = region.resize((size, size), Image.Resampling.BILINEAR, box)


def _region(
    slide: Slide, level: int, step: int, start: tuple[int, int], end: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Rectangle of a level from `start` to `end`, x, y in its pixels, averaged over squares of `step` pixels."""
    (left, top), (right, bottom) = start, end
    scale = slide.image.level_downsamples[level]
    if step == 1:
        return slide.read(round(left * scale), round(top * scale), level, right - left, bottom - top)
    region = np.empty((-(-(bottom - top) // step), -(-(right - left) // step), 3), np.uint8)
    for rows, columns, pixels in averaged(slide, level, step, start, end):
        region[rows, columns] = pixels
    return region


def _block(edge: float) -> int:
    """Number of patches of `edge` pixels along the side of a block; blocks are read one after the other."""
    return max(1, int(slides.BLOCK / edge))
