"""Tissue detectors by name: the built-in one, and those of other tools at their default settings, for comparison.

A detector returns the mask of a slide at a resolution of its own choice. Those of other tools are written from their
published settings, with scikit-image and SciPy; differences to the tools themselves are stated with each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage
from skimage.filters import threshold_otsu

from data_prep.detector_names import EMBEDDED
from data_prep.given_masks import read_given_mask
from data_prep.slides import Slide
from data_prep.tissue_mask import (
    HOLES_UM2,
    SMALLEST_UM2,
    Tissue,
    doubt_of,
    holes_of,
    read_level,
    read_picture,
    thumbnail,
    tissue_mask,
    without_specks,
)

EIGHT = np.ones((3, 3), bool)  # OpenCV's outlines join pixels that touch at a corner
# CLAM (create_patches_fp.py without --preset): saturation of 8 bits, and areas in patches of 512 x 512 level-0 pixels.
_CLAM_LEVEL, _CLAM_BLUR, _CLAM_SATURATION, _CLAM_CLOSE = 64.0, 7, 8, 4
_CLAM_AREA, _CLAM_PIECE, _CLAM_HOLE, _CLAM_HOLES = 512**2, 100, 16, 8
# LazySlide (find_tissues): um per pixel, edges in pixels, and areas as fractions of the picture.
_LAZY_UM, _LAZY_BLUR, _LAZY_CLOSE, _LAZY_TIMES = 4.0, 7, 7, 3
_LAZY_PIECE, _LAZY_HOLE = 1e-3, 1e-5


@dataclass(frozen=True)
class TissueSettings:
    """Settings of tissue detection: by a detector, or from a mask made elsewhere.

    `detector` is a name of `DETECTORS` (None: the built-in one). `holes_um2` is the area up to which holes are filled,
    `smallest_um2` that from which pieces are kept (None: those of the detector; a mask made elsewhere stays as it is).
    `keep_ink` lets the built-in detector keep pen as tissue. `source` is a mask file of the slide, GeoJSON or PNG,
    which replaces detection.
    """

    detector: str | None = None
    holes_um2: float | None = None
    smallest_um2: float | None = None
    keep_ink: bool = False
    source: Path | None = None


class Detector(Protocol):
    """Function from a slide to its tissue mask."""

    def __call__(self, slide: Slide, downsample: float, patch_um2: float, settings: TissueSettings) -> Tissue:
        """Find tissue at about that downsample from level 0, for patches of that area."""


def find_tissue(slide: Slide, downsample: float, patch_um2: float, settings: TissueSettings) -> Tissue:
    """Tissue of a slide at about a downsample from level 0, for patches of `patch_um2`, as the settings say."""
    if settings.source is None:
        return DETECTORS[settings.detector or EMBEDDED](slide, downsample, patch_um2, settings)
    found = read_given_mask(settings.source, slide, downsample)
    area = (found.downsample * slide.mpp) ** 2
    mask = found.mask
    if settings.smallest_um2 is not None:
        mask = without_specks(mask, settings.smallest_um2 / area)
    if settings.holes_um2 is not None:
        mask = mask | holes_of(mask, settings.holes_um2 / area)
    return found._replace(mask=mask)


def _embedded(slide: Slide, downsample: float, patch_um2: float, settings: TissueSettings) -> Tissue:
    """`tissue_mask`; by default, holes smaller than a patch and 20,000 um2 are filled."""
    holes = min(patch_um2, HOLES_UM2) if settings.holes_um2 is None else settings.holes_um2
    smallest = SMALLEST_UM2 if settings.smallest_um2 is None else settings.smallest_um2
    return tissue_mask(slide, downsample, settings.keep_ink, holes, smallest)


def _otsu(slide: Slide, downsample: float, patch_um2: float, settings: TissueSettings) -> Tissue:
    """Otsu's threshold on the saturation of HSV alone; by default, no hole is filled and no piece dropped."""
    picture, downsample = read_picture(slide, downsample)
    saturation = _saturation(picture)
    mask = saturation > threshold_otsu(saturation) if np.ptp(saturation) else np.zeros(saturation.shape, bool)
    area = (downsample * slide.mpp) ** 2
    return _found(slide, "otsu", _cleaned(mask, settings, area, 0.0, 0.0), downsample, picture)


def _clam(slide: Slide, downsample: float, patch_um2: float, settings: TissueSettings) -> Tissue:
    """CLAM's segmentation at its default settings, on the level that it chooses.

    That is the level for a downsample of 64, or the only one, which is averaged down here where it has more than 4,096
    x 4,096 pixels. Areas are of pixels, CLAM's of the polygons through their centres, which are smaller by half of the
    outline. Pieces below 26 megapixels of level 0 are dropped, as CLAM does: small biopsies vanish without another
    `smallest_um2`.
    """
    levels = slide.image.level_count
    level = slide.image.get_best_level_for_downsample(_CLAM_LEVEL) if levels > 1 else 0
    picture, downsample = read_level(slide, level)
    saturation = ndimage.median_filter(_saturation(picture), _CLAM_BLUR, mode="nearest")
    mask = _closed(saturation > _CLAM_SATURATION, _CLAM_CLOSE)
    pixel = (downsample * slide.mpp) ** 2
    unit = _CLAM_AREA / downsample**2 * pixel  # um2
    hole = _CLAM_HOLE * unit if settings.holes_um2 is None else settings.holes_um2
    smallest = _CLAM_PIECE * unit if settings.smallest_um2 is None else settings.smallest_um2
    mask = _large_pieces(mask, smallest / pixel)
    mask |= _filled(mask, hole / pixel, _CLAM_HOLES if settings.holes_um2 is None else None)
    return _found(slide, "clam", mask, downsample, picture)


def _lazyslide(slide: Slide, downsample: float, patch_um2: float, settings: TissueSettings) -> Tissue:
    """LazySlide's `find_tissues` at its default settings, on the level nearest to 4 um per pixel.

    That is a threshold on (red - green) x (blue - green), 0 where negative. LazySlide keeps the lowest 8 bits of the
    product, and so does this; where memory is short, it chooses a coarser level.
    """
    level = int(np.argmin(np.abs(np.array(slide.image.level_downsamples) * slide.mpp - _LAZY_UM)))
    picture, downsample = read_level(slide, level)
    blurred = np.stack([ndimage.median_filter(picture[..., i], _LAZY_BLUR, mode="nearest") for i in range(3)], -1)
    red, green, blue = np.moveaxis(blurred.astype(np.int32), -1, 0)
    heat = (np.maximum(red - green, 0) * np.maximum(blue - green, 0)).astype(np.uint8)  # modulo 256
    mask = heat > threshold_otsu(heat) if np.ptp(heat) else np.zeros(heat.shape, bool)
    mask = _closed(mask, _LAZY_TIMES * (_LAZY_CLOSE - 1) + 1)
    pixel = (downsample * slide.mpp) ** 2
    hole = int(_LAZY_HOLE * mask.size) if settings.holes_um2 is None else settings.holes_um2 / pixel
    smallest = int(_LAZY_PIECE * mask.size) if settings.smallest_um2 is None else settings.smallest_um2 / pixel
    solid = mask | _filled(mask, np.inf)  # a piece is measured with its holes
    mask &= _large_pieces(solid, smallest)
    return _found(slide, "lazyslide", mask | _filled(mask, hole), downsample, picture)


DETECTORS: Mapping[str, Detector] = {EMBEDDED: _embedded, "otsu": _otsu, "clam": _clam, "lazyslide": _lazyslide}


def _found(slide: Slide, name: str, mask: np.ndarray, downsample: float, picture: np.ndarray) -> Tissue:
    return Tissue(mask, downsample, 0.0, doubt_of(picture), thumbnail(slide, picture), name)


def _cleaned(mask: np.ndarray, settings: TissueSettings, area: float, holes: float, smallest: float) -> np.ndarray:
    """Mask with holes filled and small pieces dropped, by the settings or else these defaults in um2."""
    holes = holes if settings.holes_um2 is None else settings.holes_um2
    smallest = smallest if settings.smallest_um2 is None else settings.smallest_um2
    mask = without_specks(mask, smallest / area)
    return mask | holes_of(mask, holes / area)


def _saturation(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """Saturation of HSV in 8 bits."""
    largest, smallest = picture.max(-1), picture.min(-1)
    return np.round(255.0 * (largest - smallest) / np.maximum(largest, 1)).astype(np.uint8)


def _closed(mask: Bool[np.ndarray, "h w"], edge: int) -> Bool[np.ndarray, "h w"]:
    """Morphological closing by a square, for which there is nothing beyond the border.

    As in OpenCV, an even square has its centre at the same pixel both times, so that the result moves by a pixel.
    """
    grown = ndimage.maximum_filter(mask, (edge, edge), mode="constant", cval=False)
    return ndimage.minimum_filter(grown, (edge, edge), mode="constant", cval=True)


def _large_pieces(mask: Bool[np.ndarray, "h w"], pixels: float) -> Bool[np.ndarray, "h w"]:
    """Pieces of more than that many pixels, without their holes; they are joined at corners."""
    pieces, _ = ndimage.label(mask, EIGHT)
    large = np.bincount(pieces.ravel()) > pixels
    large[0] = False
    return large[pieces]


def _filled(mask: Bool[np.ndarray, "h w"], pixels: float, most: int | None = None) -> Bool[np.ndarray, "h w"]:
    """Holes of at most that many pixels, and those beyond the `most` largest of a piece."""
    pieces, _ = ndimage.label(mask, EIGHT)
    holes, number = ndimage.label(ndimage.binary_fill_holes(mask, EIGHT) & ~mask)
    sizes = np.bincount(holes.ravel(), minlength=number + 1)
    filled = sizes <= pixels
    if most is not None and number:
        piece = ndimage.maximum(ndimage.grey_dilation(pieces, (3, 3)), holes, np.arange(number + 1))
        for own in np.unique(piece[1:]):
            members = np.flatnonzero(piece == own)
            members = members[members > 0]
            filled[members[np.argsort(-sizes[members], kind="stable")[most:]]] = True
    filled[0] = False
    return filled[holes]
