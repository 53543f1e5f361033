"""Free-response ROC (FROC) of lesion detection, by the rules of CAMELYON16's published evaluation.

An annotated area is dilated by half of 75 um (the width of five tumor cells) and its holes are filled; areas that then
touch, by an edge or a corner, are one lesion. A lesion with a major axis below 275 um is isolated tumor cells: it is
not counted, and hits on it are ignored. A detection is a point with a score. A lesion is found at the score of the
highest detection that hits it; further hits are ignored, and a detection that hits no lesion is a false positive. The
FROC score is the mean sensitivity at 1/4, 1/2, 1, 2, 4 and 8 false positives per slide over all slides, including those
without lesions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import label, regionprops

from pathflip_jax.data.readers.outlines import Polygon, rasterise
from pathflip_jax.scores.statistics import Statistic

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per slide
WIDENED_UM, ISOLATED_UM = 75.0, 275.0
PIXEL_UM = 8.0  # approximate: level 5 of a 40x slide with levels of half the size, on which the challenge draws masks
MOST_PIXELS = 2**26  # maximum size of a mask
MOST_DETECTIONS = 100  # maximum per slide; the score needs at most 8 false positives
RADIUS = 3.0  # patch edges within which only the highest detection is kept


class Lesion(NamedTuple):
    """A lesion: its pixels, their upper left corner on the raster, and whether it is large enough to count."""

    row: int
    column: int
    mask: Bool[np.ndarray, "h w"]
    counts: bool


class Lesions(NamedTuple):
    """The lesions of a slide, on a raster of `downsample` level-0 pixels per pixel."""

    areas: tuple[Lesion, ...]
    downsample: float


class Detections(NamedTuple):
    """Points in level-0 pixels with their scores."""

    points: Float[np.ndarray, "n 2"]
    scores: Float[np.ndarray, "n"]


class Found(NamedTuple):
    """The scores at which the lesions of a slide are found (-inf: never), and those of its false positives."""

    lesions: Float[np.ndarray, "m"]
    false_positives: Float[np.ndarray, "n"]


def read_lesions(polygons: list[Polygon], width: int, height: int, mpp: float) -> Lesions:
    """The lesions that outlines form on a slide of `width` x `height` level-0 pixels."""
    if not polygons:
        return Lesions((), 1.0)
    downsample = max(2.0 ** round(np.log2(PIXEL_UM / mpp)), (width * height / MOST_PIXELS) ** 0.5, 1.0)
    shape = (max(int(np.ceil(height / downsample)), 1), max(int(np.ceil(width / downsample)), 1))
    return lesions_of_mask(rasterise(polygons, shape, (0.0, 0.0), downsample), downsample, mpp)


def lesions_of_mask(mask: Bool[np.ndarray, "h w"], downsample: float, mpp: float) -> Lesions:
    """The lesions of a raster of annotated pixels, each of `downsample` level-0 pixels."""
    if not mask.any():
        return Lesions((), downsample)
    pixel = mpp * downsample
    wide = ndimage.binary_fill_holes(ndimage.distance_transform_edt(~mask) < WIDENED_UM / 2 / pixel)
    areas = [
        Lesion(*area.bbox[:2], area.image, area.axis_major_length >= ISOLATED_UM / pixel)
        for area in regionprops(label(wide, connectivity=2))
    ]
    return Lesions(tuple(areas), downsample)


def detect(
    scores: Float[np.ndarray, "N"], coords: Int[np.ndarray, "N 2"], patch_size: float, radius: float = RADIUS
) -> Detections:
    """The centres of patches with the highest score within `radius` patch edges, in descending order."""
    centres = np.asarray(coords, np.float64) + patch_size / 2
    tree = cKDTree(centres)
    left = np.ones(len(scores), bool)
    chosen: list[int] = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        if left[i]:
            chosen.append(int(i))
            left[tree.query_ball_point(centres[i], radius * patch_size)] = False
            if len(chosen) == MOST_DETECTIONS:
                break
    return Detections(centres[chosen], np.asarray(scores, np.float64)[chosen])


def match(lesions: Lesions, detections: Detections) -> Found:
    """The detections of a slide matched to its lesions."""
    pixels = np.floor(detections.points / lesions.downsample).astype(int)[:, ::-1]  # row, column
    false = np.ones(len(pixels), bool)
    best = []
    for area in lesions.areas:
        place = pixels - (area.row, area.column)
        near = ((place >= 0) & (place < area.mask.shape)).all(1)
        near[near] = area.mask[tuple(place[near].T)]
        false &= ~near
        if area.counts:
            best.append(detections.scores[near].max(initial=-np.inf))
    return Found(np.array(best, np.float64), detections.scores[false])


class _Sweep(NamedTuple):
    """All scores of a cohort in descending order: their slides, whether they are of lesions, and where ties end."""

    slide: Int[np.ndarray, "T"]
    is_lesion: np.ndarray
    last: Int[np.ndarray, "t"]


def _sweep(found: Sequence[Found]) -> _Sweep:
    parts = [
        (values, i, lesion) for i, one in enumerate(found) for values, lesion in zip(one, (True, False), strict=True)
    ]
    scores = np.concatenate([values for values, _, _ in parts])
    slide = np.concatenate([np.full(len(values), i) for values, i, _ in parts])
    is_lesion = np.concatenate([np.full(len(values), lesion) for values, _, lesion in parts])
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    ordered = scores[order]
    return _Sweep(
        slide[order], is_lesion[order], np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(order)])
    )


def _curve(sweep: _Sweep, lesions: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    each = weights[sweep.slide]
    false = np.cumsum(each * ~sweep.is_lesion)[sweep.last] / weights.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity = np.cumsum(each * sweep.is_lesion)[sweep.last] / (lesions @ weights)
    return np.append(0.0, false), np.append(0.0, sensitivity)


def curve(found: Sequence[Found]) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
    """False positives per slide and sensitivity at every threshold, from above the highest score down."""
    lesions = np.array([len(one.lesions) for one in found], float)
    return _curve(_sweep(found), lesions, np.ones(len(found)))


def sensitivity(found: Sequence[Found], rates: Sequence[float] = RATES) -> Statistic:
    """The mean sensitivity at some rates of false positives per slide, interpolated linearly between thresholds.

    Over all six rates it is the challenge's score. Raises ValueError for slides without a single lesion.
    """
    lesions = np.array([len(one.lesions) for one in found], float)
    if not lesions.any():
        raise ValueError("no slide has a lesion of 275 um or more, so sensitivity is undefined; check the outlines")
    sweep = _sweep(found)
    return lambda weights: np.array([np.interp(rates, *_curve(sweep, lesions, draw)).mean() for draw in weights])
