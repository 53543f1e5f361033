"""Tissue on a slide: stained, no ink, no speck, found on a picture of low resolution."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from skimage.filters import threshold_otsu

from data_prep.slides import Slide, averaged

_MASK_PIXELS = 1 << 24  # at most: about 25 bytes each while the mask is made
# Saturation (0 to 1): glass stays below the first, stained tissue is above the second.
_GLASS, _STAINED = 0.05, 0.15
_APART, _RIM = 0.06, 0.03  # two classes of saturation differ by more; a smaller share is the blurred rim of tissue
_BLACK = 60  # a pixel darker than this in all channels is ink, a slide border or a scanner's void
_GREENER = 30  # H&E absorbs green most; green above red by this much is a felt pen
_SMALLEST_PIECE_UM2, _LARGEST_HOLE_UM2 = 300.0, 20_000.0


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
    for rows, columns, pixels in averaged(slide, level, step, (0, 0), (width, height)):
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
