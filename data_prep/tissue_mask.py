"""Tissue detection at low resolution: stained areas without pen ink and specks."""

from contextlib import closing, suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from data_prep.ink import PIXEL_UM, find_ink
from data_prep.slides import Slide, averaged
from pathflip_jax.data.pixels.source import Unreadable
from pathflip_jax.data.pixels.sources import open_source

_MASK_PIXELS = 1 << 24  # most pixels of the mask: about 25 bytes each during computation
# Saturation (0 to 1): glass is below the first, stained tissue above the second.
_GLASS, _STAINED = 0.05, 0.15
_APART, _RIM = 0.06, 0.03  # two classes of saturation differ by more; a smaller fraction is the blurred rim of tissue
_BLACK = 60  # a pixel darker than this in all channels is ink, a slide border or a scanner's void
_BRIGHT, _GREY = 150, 3  # glass is brighter in all channels; a grey picture's channels differ by less
_GREENER = 30  # H&E absorbs green most; green above red by this much is a felt pen
_LOOK_UM, _LOOK_WIDE_UM = 1.5, 24.0  # the finest detail considered, and the radius around a point
_RIM_PX, _RIM_SHARE = 2, 0.25  # width of the blurred rim of tissue, and share of the tissue's saturation at its end
_THUMBNAIL = 1024  # most pixels of a thumbnail along its longer edge
_CHEAP = 1 << 26  # pixels of a level that may be read for a thumbnail alone
SMALLEST_UM2, HOLES_UM2 = 300.0, 20_000.0  # the smallest piece kept, and the largest hole filled


class Tissue(NamedTuple):
    """Tissue mask, its downsample from level 0, and the fraction of the stained area that was pen.

    `doubt` is the evidence against a colour brightfield slide: a dark background, or no colour. `picture` is a
    thumbnail of the slide, `found_by` the origin of the mask, `notes` are for the user.
    """

    mask: Bool[np.ndarray, "rows columns"]
    downsample: float
    pen: float
    doubt: str
    picture: UInt8[np.ndarray, "h w 3"]
    found_by: str = ""
    notes: tuple[str, ...] = ()


def tissue_mask(
    slide: Slide,
    downsample: float = 32.0,
    keep_ink: bool = False,
    largest_hole: float = HOLES_UM2,
    smallest_piece: float = SMALLEST_UM2,
) -> Tissue:
    """Mask of stained tissue.

    Otsu's threshold on saturation, bounded by the values of glass and of pale tissue, so that a slide without glass or
    without tissue is not split in two; pen and black borders are excluded, pieces of less than `smallest_piece` um2
    dropped (specks) and holes of less than `largest_hole` um2 filled (lumina, fat cells): pass no more than the area of
    a patch, so that no patch of glass counts as tissue. With `keep_ink` only green and black pen is excluded, for
    stains that resemble pen. The mask of a huge slide is coarser than requested (`read_picture`).
    """
    picture, downsample = read_picture(slide, downsample)
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
    mask = _without_faint_rim(mask, saturation)
    area = (downsample * slide.mpp) ** 2
    mask = without_specks(mask, smallest_piece / area)
    # A stroke over fat must not open fat cells.
    mask |= holes_of(mask | ink, largest_hole / area) & ~ink
    return Tissue(mask, downsample, pen, doubt_of(picture), thumbnail(slide, picture), "embedded")


def read_picture(slide: Slide, downsample: float) -> tuple[UInt8[np.ndarray, "h w 3"], float]:
    """Picture of a whole slide at a downsample from level 0, and the downsample that it has.

    The best-fitting level is read and averaged down, block by block, where it is still too fine. That of a huge slide
    is coarser than requested: it has at most 4,096 x 4,096 pixels.
    """
    downsample = affordable(slide, downsample)
    return read_level(slide, slide.image.get_best_level_for_downsample(downsample * 1.001), downsample)


def affordable(slide: Slide, downsample: float) -> float:
    """Downsample from level 0 of at least that, at which a slide has at most 4,096 x 4,096 pixels."""
    return max(downsample, np.sqrt(slide.width * slide.height / _MASK_PIXELS))


def read_level(slide: Slide, level: int, downsample: float = 1.0) -> tuple[UInt8[np.ndarray, "h w 3"], float]:
    """Picture of a whole level, averaged down to a downsample from level 0 as `read_picture` does."""
    width, height = slide.image.level_dimensions[level]
    step = max(1, int(downsample / slide.image.level_downsamples[level] + 1e-3))
    while -(-width // step) * -(-height // step) > _MASK_PIXELS:
        step += 1
    picture = np.empty((-(-height // step), -(-width // step), 3), np.uint8)
    for rows, columns, pixels in averaged(slide, level, step, (0, 0), (width, height)):
        picture[rows, columns] = pixels
    return picture, slide.image.level_downsamples[level] * step


def thumbnail(slide: Slide, picture: UInt8[np.ndarray, "h w 3"] | None = None) -> UInt8[np.ndarray, "rows columns 3"]:
    """Picture of a slide of at most 1,024 pixels along its longer edge, from another one where that is large enough.

    A slide that has few pixels at a fitting level is read for it.
    """
    if picture is None or max(picture.shape) < _THUMBNAIL // 2:
        downsample = max(1.0, max(slide.width, slide.height) / _THUMBNAIL)
        level = slide.image.get_best_level_for_downsample(downsample * 1.001)
        if picture is None:
            picture, _ = read_picture(slide, downsample)
        elif np.prod(slide.image.level_dimensions[level], dtype=float) <= _CHEAP:
            # A file may be damaged where there is no patch, and OpenSlide reads nothing more after an error.
            with suppress(OSError, Unreadable), closing(open_source(slide.path)) as image:
                picture, _ = read_picture(replace(slide, image=image), downsample)
    return np.asarray(Image.fromarray(picture).reduce(-(-max(picture.shape) // _THUMBNAIL)))


def doubt_of(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """Evidence in its picture that a slide is no colour brightfield slide; "" without any."""
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


def _without_faint_rim(mask: Bool[np.ndarray, "h w"], saturation: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Mask that ends where saturation has fallen to a quarter of that of the tissue beside it, measured from glass.

    The threshold is that of pale tissue, which the blurred rim of strongly stained tissue exceeds on glass.
    """
    if mask.all() or not mask.any():
        return mask
    glass = float(np.median(saturation[~mask]))
    faint = ndimage.maximum_filter(saturation, 2 * _RIM_PX + 1)
    faint -= glass
    faint *= _RIM_SHARE
    faint += glass
    rim = mask & ~ndimage.binary_erosion(mask, iterations=_RIM_PX, border_value=1)
    return mask & ~(rim & (saturation < faint))


def without_specks(mask: Bool[np.ndarray, "h w"], pixels: float) -> Bool[np.ndarray, "h w"]:
    """Mask without its components of fewer than that many pixels."""
    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= pixels
    large[0] = False
    return large[pieces]


def holes_of(mask: Bool[np.ndarray, "h w"], pixels: float) -> Bool[np.ndarray, "h w"]:
    """Holes of a mask of fewer than that many pixels, without those at its border."""
    return _enclosed(~mask & ~without_specks(~mask, pixels))


def _enclosed(mask: np.ndarray) -> np.ndarray:
    """Components of a mask that do not touch its border."""
    pieces, number = ndimage.label(mask)
    inside = np.arange(number + 1) > 0
    for rim in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        inside[rim] = False
    return inside[pieces]
