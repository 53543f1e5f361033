"""Tissue detection at low resolution: stained areas without pen ink and specks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from data_prep.ink import PIXEL_UM, find_ink
from data_prep.slides import Slide, averaged

_MASK_PIXELS = 1 << 24  # most pixels of the mask: about 25 bytes each during computation
# Saturation (0 to 1): glass is below the first, stained tissue above the second.
_GLASS, _STAINED = 0.05, 0.15
_APART, _RIM = 0.06, 0.03  # two classes of saturation differ by more; a smaller fraction is the blurred rim of tissue
_BLACK = 60  # a pixel darker than this in all channels is ink, a slide border or a scanner's void
_BRIGHT, _GREY = 150, 3  # glass is brighter in all channels; a grey picture's channels differ by less
_GREENER = 30  # H&E absorbs green most; green above red by this much is a felt pen
_LOOK_UM, _LOOK_WIDE_UM = 1.5, 24.0  # the finest detail considered, and the radius around a point
_SMALLEST_PIECE_UM2, _LARGEST_HOLE_UM2 = 300.0, 20_000.0


class Tissue(NamedTuple):
    """Tissue mask, its downsample from level 0, and the fraction of the stained area that was pen.

    `doubt` is the evidence against a colour brightfield slide: a dark background, or no colour.
    """

    mask: Bool[np.ndarray, "rows columns"]
    downsample: float
    pen: float
    doubt: str


def tissue_mask(
    slide: Slide, downsample: float = 32.0, keep_ink: bool = False, largest_hole: float = _LARGEST_HOLE_UM2
) -> Tissue:
    """Mask of stained tissue.

    Otsu's threshold on saturation, bounded by the values of glass and of pale tissue, so that a slide without glass or
    without tissue is not split in two; pen and black borders are excluded, specks dropped and holes of less than
    `largest_hole` um2 filled (lumina, fat cells), 20,000 at most: pass the area of a patch, so that no patch of glass
    counts as tissue. With `keep_ink` only green and black pen is excluded, for stains that resemble pen. The
    best-fitting level is read and averaged down, block by block, where it is still too fine. The mask of a huge slide
    is coarser than requested: it has at most 4,096 x 4,096 pixels.
    """
    downsample = max(downsample, np.sqrt(slide.width * slide.height / _MASK_PIXELS))
    level = slide.image.get_best_level_for_downsample(downsample * 1.001)
    width, height = slide.image.level_dimensions[level]
    step = max(1, int(downsample / slide.image.level_downsamples[level] + 1e-3))
    while -(-width // step) * -(-height // step) > _MASK_PIXELS:
        step += 1
    downsample = slide.image.level_downsamples[level] * step
    picture = np.empty((-(-height // step), -(-width // step), 3), np.uint8)
    for rows, columns, pixels in averaged(slide, level, step, (0, 0), (width, height)):
        picture[rows, columns] = pixels
    ink = np.zeros(picture.shape[:2], bool) if keep_ink else _ink(slide, picture, downsample)
    saturation = np.empty(picture.shape[:2], np.float32)
    for top in range(0, len(picture), 1024):
        saturation[top : top + 1024] = _saturation(picture[top : top + 1024])
    stained = saturation > _STAINED
    pen = float((stained & ink).sum() / max(1, stained.sum()))
    saturation[ink] = 0
    saturation = ndimage.gaussian_filter(saturation, 1.0, output=saturation)
    apart = ~ndimage.binary_dilation(ink, iterations=4) if ink.any() else ~ink  # strokes have pale rims
    mask = (saturation > _stain_threshold(saturation[apart])) & ~ink
    area = (downsample * slide.mpp) ** 2
    mask, _ = _split_by_size(mask, _SMALLEST_PIECE_UM2 / area)
    _, small = _split_by_size(
        ~(mask | ink), min(largest_hole, _LARGEST_HOLE_UM2) / area
    )  # a stroke over fat must not open fat cells
    return Tissue(mask | (_enclosed(small) & ~ink), downsample, pen, _doubt(picture))


def _doubt(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    sample = picture[:: max(1, len(picture) // 512), :: max(1, picture.shape[1] // 512)]
    largest, smallest = sample.max(-1), sample.min(-1)
    if (largest < _BLACK).mean() > 0.5 and (smallest > _BRIGHT).mean() < 0.001:
        return "a dark background and no bright glass, as in fluorescence"
    return "no colour, as in a mask or one channel of fluorescence" if np.ptp(sample, axis=-1).max() < _GREY else ""


def _ink(slide: Slide, picture: UInt8[np.ndarray, "h w 3"], downsample: float) -> Bool[np.ndarray, "h w"]:
    """Pen mask on an image of a slide, with a closer look where colour is inconclusive."""
    step = max(1, int(PIXEL_UM / (downsample * slide.mpp) + 0.5))
    small = np.asarray(Image.fromarray(picture).reduce(step))
    wide = step * downsample
    ink = find_ink(small, lambda row, column: _structure(slide, (row + 0.5) * wide, (column + 0.5) * wide))
    if step == 1:
        return ink
    return ink.repeat(step, 0)[: len(picture)].repeat(step, 1)[:, : picture.shape[1]]


def _structure(slide: Slide, row: float, column: float) -> float:
    """Amount of cell-sized structure around a level-0 point, in grey levels."""
    level = slide.image.get_best_level_for_downsample(max(1.0, 1.001 * _LOOK_UM / slide.mpp))
    scale = slide.image.level_downsamples[level]
    um = slide.mpp * scale
    edge = max(8, round(_LOOK_WIDE_UM / um))
    corner = round(column - edge * scale / 2), round(row - edge * scale / 2)
    grey = slide.read(*corner, level, edge, edge).mean(-1, dtype=np.float32)
    fine, wide = (ndimage.gaussian_filter(grey, sigma / um) for sigma in (_LOOK_UM, 4 * _LOOK_UM))
    return float((fine - wide).std())


def _saturation(pixels: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """Saturation from 0 to 1; none where a pixel is too dark or too green for stained tissue."""
    colour = pixels.astype(np.float32)
    largest, smallest = colour.max(-1), colour.min(-1)
    saturation = (largest - smallest) / np.maximum(largest, 1)
    saturation[(largest < _BLACK) | (colour[..., 1] > colour[..., 0] + _GREENER)] = 0
    return saturation


def _stain_threshold(saturation: np.ndarray) -> float:
    """Otsu's threshold between glass and stain.

    On a slide with dark and pale tissue the first threshold separates these two, so the part below it is split again,
    as long as there are two classes: `_APART` from each other, and the upper more than the rim of the lower.
    """
    threshold, values = _STAINED, saturation
    while values.size and np.ptp(values) > 0:
        middle = threshold_otsu(values)
        upper = values > middle
        if upper.mean() < _RIM or values[upper].mean() - values[~upper].mean() < _APART:
            break
        threshold, values = middle, values[~upper]
    return float(np.clip(threshold, _GLASS, _STAINED))


def _split_by_size(mask: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Components of a mask with at least `size` pixels, and those with fewer."""
    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= size
    large[0] = False
    large = large[pieces]
    return large, mask & ~large


def _enclosed(mask: np.ndarray) -> np.ndarray:
    """Components of a mask that do not touch its border."""
    pieces, number = ndimage.label(mask)
    inside = np.arange(number + 1) > 0
    for rim in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        inside[rim] = False
    return inside[pieces]
