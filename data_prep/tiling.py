"""From a slide file to patches of tissue at one physical resolution.

Everything here speaks level-0 pixels, the coordinates that QuPath and every feature file use. A slide is
read once at low resolution to find its tissue and once, block by block, to cut its patches. Nothing here grows with
the slide but the list of its patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from pathflip_jax.data import guarded

# What OpenSlide 4 opens: Aperio, DICOM, Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, plain TIFF.
SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".dcm", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi",
)  # fmt: skip
# From beyond a 100x objective to below a 1x one; a TIFF written at 72 dpi claims 352.8.
_SANE_MPP = (0.05, 10.0)
_UM_TIMES_MAGNIFICATION = 10.0
# What OpenSlide may take for opening a slide or reading one block, in a worker process: a broken slide stalls it.
_READ_SECONDS, _READ_BYTES = 300.0, 2 * 2**30
_LARGEST_ENLARGEMENT = 1.25
_NEAR = 0.02  # a level this close to the wanted resolution is taken as it is: 0.499 is 0.5
_BLOCK = 2048  # pixels of the read level on a side: 16 MB, and its tiles fit in OpenSlide's cache of 32
_MASK_PIXELS = 1 << 24  # at most: about 25 bytes each while the mask is made
_BATCH_PIXELS = 1 << 22  # in the patches of one batch: 64 of 256 px, what a network takes at once
_MASK_PER_PATCH = 16  # mask pixels along a patch's edge
# Saturation (0 to 1): glass stays below the first, stained tissue is above the second.
_GLASS, _STAINED = 0.05, 0.15
_APART, _RIM = 0.06, 0.03  # two classes of saturation differ by more; a smaller share is the blurred rim of tissue
_BLACK = 60  # a pixel darker than this in all channels is ink, a slide border or a scanner's void
_GREENER = 30  # H&E absorbs green most; green above red by this much is a felt pen
_SMALLEST_PIECE_UM2, _LARGEST_HOLE_UM2 = 300.0, 20_000.0


@dataclass(frozen=True)
class Slide:
    """An open slide: its file, its size in level-0 pixels and `mpp`, micrometres per level-0 pixel.

    A context manager; `read` turns what OpenSlide raises into errors that name the file.
    """

    path: Path
    image: openslide.OpenSlide
    width: int
    height: int
    mpp: float

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exception) -> None:
        self.image.close()

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level; x, y at level 0, width and height in the level's pixels. What is no slide is white.

        Raises OSError for damaged pixels.
        """
        try:
            with guarded.limits(_READ_SECONDS, _READ_BYTES):
                image = self.image.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            raise OSError(
                f"{self.path}: its pixels cannot be read ({error}, at {x}, {y}, level {level}); the file is damaged or "
                "was cut short: copy it again"
            ) from None
        colour, pixels = np.asarray(image.convert("RGB")), np.asarray(image)
        if pixels.view("<u4").min() < 255 << 24:  # four bytes as one number, alpha highest: ten times as fast
            clear = pixels[..., 3] != 255
            cover = pixels[clear][:, 3:] / np.float32(255)
            colour = colour.copy()
            colour[clear] = np.round(colour[clear] * cover + 255 * (1 - cover))
        return colour


def open_slide(path: Path | str, assume_mpp: float | None = None) -> Slide:
    """Open a slide that OpenSlide reads; `assume_mpp` is the level-0 resolution where the file does not tell it.

    Without either, the nominal resolution of the objective power (20x is 0.5) is taken. Raises
    FileNotFoundError; OSError for a file that does not open; ValueError where the resolution is missing or
    absurd and none is assumed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such slide")
    try:
        with guarded.limits(_READ_SECONDS, _READ_BYTES):
            image = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise OSError(
            f"{path}: OpenSlide cannot open it ({error}); expected a whole slide image that is not cut short. Convert "
            "other formats to a tiled TIFF, for example `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`"
        ) from None
    try:
        return Slide(path, image, *image.dimensions, _level0_mpp(path, image.properties, assume_mpp))
    except ValueError:
        image.close()
        raise


def _level0_mpp(path: Path, properties, assume_mpp: float | None) -> float:
    def number(name: str) -> float:
        try:
            value = float(properties.get(name, 0))
        except ValueError:
            return 0.0
        return value if np.isfinite(value) else 0.0

    if assume_mpp is not None and not _SANE_MPP[0] <= assume_mpp <= _SANE_MPP[1]:
        raise ValueError(f"--assume-mpp {assume_mpp:g}: expected {_SANE_MPP[0]} to {_SANE_MPP[1]:g} um per pixel")
    across, down = number(openslide.PROPERTY_NAME_MPP_X), number(openslide.PROPERTY_NAME_MPP_Y)
    stated = (across + down) / 2 if across > 0 and down > 0 else max(across, down)
    if stated and _SANE_MPP[0] <= stated <= _SANE_MPP[1]:
        if min(across, down) > 0 and max(across, down) > 1.1 * min(across, down):
            raise ValueError(f"{path}: pixels of {across:g} x {down:g} um, expected squares; scan or convert it anew")
        return stated
    if assume_mpp is not None:
        return assume_mpp
    power = number(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    if power > 0 and not stated:
        return _UM_TIMES_MAGNIFICATION / power
    found = f"claims {stated:.4g} um per pixel" if stated else "says neither um per pixel nor objective power"
    raise ValueError(
        f"{path}: {found}, expected {_SANE_MPP[0]} to {_SANE_MPP[1]:g}; give its resolution, for example "
        "`--assume-mpp 0.25` for a 40x scan"
    )


def one_per_series(paths: list[Path]) -> list[Path]:
    """The paths without the further files of a DICOM slide: OpenSlide opens all of a series by any one of them.

    Archives keep a series of several .dcm in a folder; the first file stands for it. A file that does not open stays,
    for its own error.
    """
    seen, kept = set(), []
    for path in paths:
        if path.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(path) as image:
                    series = (path.parent, image.properties.get("dicom.SeriesInstanceUID", path.name))
            except openslide.OpenSlideError:
                series = (path.parent, path.name)
            if series in seen:
                continue
            seen.add(series)
        kept.append(path)
    return kept


class Tiles(NamedTuple):
    """Where the patches of a slide lie and how they are read.

    `coords` [N, 2] are x, y of the top-left corners at level 0, in the order in which `read_patches` gives
    them: blocks of about 2,048 px of the read level, row by row inside. `patch_size_level0` is a patch's edge
    there, `patch_size` the edge in pixels after resampling from `level`.
    """

    coords: Int[np.ndarray, "N 2"]
    patch_size_level0: int
    patch_size: int
    level: int


def tissue_mask(slide: Slide, downsample: float = 32.0) -> tuple[Bool[np.ndarray, "rows columns"], float]:
    """Where there is stained tissue, and how many level-0 pixels a pixel of the mask is wide.

    Otsu's threshold on saturation, kept between what glass and what pale tissue have, so that a slide
    without glass or without tissue is not split in two; ink, pen and black borders left out; specks dropped
    and small holes filled (lumina, fat cells). Works from the best level there is and averages down, block by
    block, where that is still too fine. The mask of a huge slide is coarser than asked: it has 4,096 x 4,096 pixels at
    most.
    """
    downsample = max(downsample, np.sqrt(slide.width * slide.height / _MASK_PIXELS))
    level = slide.image.get_best_level_for_downsample(downsample * 1.001)
    width, height = slide.image.level_dimensions[level]
    step = max(1, int(downsample / slide.image.level_downsamples[level] + 1e-3))
    while -(-width // step) * -(-height // step) > _MASK_PIXELS:
        step += 1
    downsample = slide.image.level_downsamples[level] * step
    saturation = np.empty((-(-height // step), -(-width // step)), np.float32)
    for rows, columns, pixels in _averaged(slide, level, step, (0, 0), (width, height)):
        saturation[rows, columns] = _saturation(pixels)
    saturation = ndimage.gaussian_filter(saturation, 1.0, output=saturation)
    mask = saturation > _stain_threshold(saturation.ravel())
    area = (downsample * slide.mpp) ** 2
    mask, _ = _parted(mask, _SMALLEST_PIECE_UM2 / area)
    _, small = _parted(~mask, _LARGEST_HOLE_UM2 / area)
    return mask | _enclosed(small), downsample


def _saturation(pixels: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """Saturation from 0 to 1; none where a pixel is too dark or too green for stained tissue."""
    colour = pixels.astype(np.float32)
    largest, smallest = colour.max(-1), colour.min(-1)
    saturation = (largest - smallest) / np.maximum(largest, 1)
    saturation[(largest < _BLACK) | (colour[..., 1] > colour[..., 0] + _GREENER)] = 0
    return saturation


def _stain_threshold(saturation: np.ndarray) -> float:
    """Otsu's threshold between glass and stain.

    On a slide with dark and pale tissue the first threshold parts these two, so what is below it is parted again,
    as long as there are two classes: `_APART` from each other, and the upper more than the rim of the lower.
    """
    threshold, values = _STAINED, saturation
    while np.ptp(values) > 0:
        middle = threshold_otsu(values)
        upper = values > middle
        if upper.mean() < _RIM or values[upper].mean() - values[~upper].mean() < _APART:
            break
        threshold, values = middle, values[~upper]
    return float(np.clip(threshold, _GLASS, _STAINED))


def _averaged(
    slide: Slide, level: int, step: int, start: tuple[int, int], end: tuple[int, int]
) -> Iterator[tuple[slice, slice, UInt8[np.ndarray, "h w 3"]]]:
    """A rectangle of a level, averaged over squares of `step` pixels, in blocks of bounded size.

    `start` and `end` are x, y in the level's pixels. Yields the rows and columns of the averaged rectangle, and what is
    there.
    """
    scale, block = slide.image.level_downsamples[level], max(step, _BLOCK // step * step)
    for top in range(start[1], end[1], block):
        for left in range(start[0], end[0], block):
            width, height = min(block, end[0] - left), min(block, end[1] - top)
            pixels = slide.read(round(left * scale), round(top * scale), level, width, height)
            pixels = np.asarray(Image.fromarray(pixels).reduce(step))
            row, column = (top - start[1]) // step, (left - start[0]) // step
            yield slice(row, row + len(pixels)), slice(column, column + pixels.shape[1]), pixels


def _parted(mask: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of a mask that have at least `size` pixels, and those that have fewer."""
    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= size
    large[0] = False
    large = large[pieces]
    return large, mask & ~large


def _enclosed(mask: np.ndarray) -> np.ndarray:
    """The pieces of a mask that do not touch its border."""
    pieces, number = ndimage.label(mask)
    inside = np.arange(number + 1) > 0
    for rim in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        inside[rim] = False
    return inside[pieces]


def tile_slide(slide: Slide, patch_size: int = 256, mpp: float = 0.5, min_tissue: float = 0.25) -> Tiles:
    """The patches of a slide with tissue: a grid of `patch_size` pixels at `mpp`, from the level-0 origin.

    A level within 2 % of `mpp` is not resampled: scanners' 0.499 and 0.502 give patches of 256 px, not 257 and 255.
    A patch counts when at least `min_tissue` of its area is tissue; one that reaches over the slide's edge counts its
    outside as glass and is read as white there. Raises ValueError for a slide without tissue, and for one
    scanned so coarsely that patches would only be enlarged.
    """
    if slide.mpp > _LARGEST_ENLARGEMENT * mpp:
        raise ValueError(
            f"{slide.path}: scanned at {slide.mpp:g} um per pixel, patches were asked for at {mpp:g}; enlarging adds "
            f"nothing: leave the slide out, or prepare the cohort at `--mpp {slide.mpp:g}`"
        )
    fits = [i for i, scale in enumerate(slide.image.level_downsamples) if slide.mpp * scale <= mpp * (1 + _NEAR)]
    level = max(fits, default=0, key=lambda i: slide.image.level_downsamples[i])
    scale = mpp / slide.mpp
    if abs(slide.image.level_downsamples[level] / scale - 1) <= _NEAR:
        scale = slide.image.level_downsamples[level]
    edge = max(1, round(patch_size * scale))
    mask, downsample = tissue_mask(slide, max(1.0, edge / _MASK_PER_PATCH))
    columns, rows = -(-slide.width // edge), -(-slide.height // edge)
    sums = np.pad(mask, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64)
    sums.cumsum(1, out=sums)
    sums = _between(sums, np.arange(rows + 1) * edge / downsample)
    sums = _between(sums.T, np.arange(columns + 1) * edge / downsample).T
    tissue = np.diff(np.diff(sums, axis=0), axis=1) * (downsample / edge) ** 2  # [rows, columns], share of the patch
    row, column = np.nonzero((tissue >= min_tissue) & (tissue > 0))
    if not len(row):
        raise ValueError(
            f"{slide.path}: no tissue: none of {rows * columns} patches of {edge} px (level 0) is tissue by "
            f"{min_tissue:.0%} or more, the fullest by {tissue.max():.0%}; leave the slide out, or lower "
            "`--min-tissue` or `--patch-size`"
        )
    block = _block(edge / slide.image.level_downsamples[level])
    order = np.lexsort((column, row, column // block, row // block))
    coords = np.stack([column[order], row[order]], 1).astype(np.int32) * np.int32(edge)
    return Tiles(coords, edge, patch_size, level)


def _between(sums: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of a table of running sums at fractional positions, the last one beyond its end."""
    at = np.clip(at, 0, len(sums) - 1)
    low = np.minimum(at.astype(int), len(sums) - 2)
    part = (at - low)[:, None]
    return sums[low] * (1 - part) + sums[low + 1] * part


def read_patches(slide: Slide, tiles: Tiles) -> Iterator[UInt8[np.ndarray, "n P P 3"]]:
    """The pixels of the patches in the order of `tiles.coords`, in batches of 13 MB at most.

    A patch is read alone: what takes long is decoding the file's tiles, and OpenSlide keeps those of a block. Patches
    are resampled only when the level is not at the wanted resolution already, each from its own pixels, and averaged
    down while they are read where one is larger than a block. Raises OSError for damaged pixels.
    """
    size, scale = tiles.patch_size, slide.image.level_downsamples[tiles.level]
    edge = tiles.patch_size_level0 / scale  # in pixels of the level
    exact = abs(edge - size) < 0.5
    step = max(1, int(edge // _BLOCK))
    most = int(np.clip(_BATCH_PIXELS // size**2, 1, 1024))
    for start in range(0, len(tiles.coords), most):
        corners = tiles.coords[start : start + most]
        batch = np.empty((len(corners), size, size, 3), np.uint8)
        for patch, corner in zip(batch, corners.tolist(), strict=True):
            if exact:
                patch[:] = slide.read(*corner, tiles.level, size, size)
            else:
                begin = np.array(corner) / scale
                first, last = np.floor(begin).astype(int), np.ceil(begin + edge).astype(int)
                region = Image.fromarray(_region(slide, tiles.level, step, tuple(first), tuple(last)))
                box = (*(begin - first) / step, *(begin - first + edge) / step)
                patch[:] = region.resize((size, size), Image.Resampling.BILINEAR, box)
        yield batch


def _region(
    slide: Slide, level: int, step: int, start: tuple[int, int], end: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """A rectangle of a level from `start` to `end`, x, y in its pixels, averaged over squares of `step` of them."""
    (left, top), (right, bottom) = start, end
    scale = slide.image.level_downsamples[level]
    if step == 1:
        return slide.read(round(left * scale), round(top * scale), level, right - left, bottom - top)
    region = np.empty((-(-(bottom - top) // step), -(-(right - left) // step), 3), np.uint8)
    for rows, columns, pixels in _averaged(slide, level, step, start, end):
        region[rows, columns] = pixels
    return region


def _block(edge: float) -> int:
    """How many patches of `edge` pixels make the side of a block, which is read to its end before the next."""
    return max(1, int(_BLOCK / edge))
