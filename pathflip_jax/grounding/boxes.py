"""Areas grounded by a text: connected components of its heatmap above a threshold, and their bounding boxes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from pathflip_jax.data.readers.outlines import Polygon, trace
from pathflip_jax.grounding.surface import Surface

MIN_PATCHES = 2.0  # smaller areas, in patches, are dropped: one patch is little evidence
EIGHT_CONNECTED = np.ones((3, 3), int)  # pixels that touch at a corner are connected


class Box(NamedTuple):
    """One area of a text on a slide, in level-0 pixels: its bounding box, and its outline with holes.

    `score` is the mean and `peak` the highest value of the (smoothed) heatmap inside, in the units of the patch scores;
    `patches` counts the patches whose centre lies inside; `area_mm2` is None where the slide's mpp is unknown.
    """

    text: str
    x: int
    y: int
    width: int
    height: int
    score: float
    peak: float
    patches: int
    area_mm2: float | None
    outline: tuple[Polygon, ...]


def split_threshold(values: Float[np.ndarray, "..."]) -> float:
    """Threshold that splits a map: midway between its median and its maximum; in a constant map nothing exceeds it.

    Every slide has areas above it, whether or not the text's subject is present; presence can be judged only by
    comparing the scores of many slides.
    """
    known = np.asarray(values)[np.isfinite(values)]
    return float((np.median(known) + known.max()) / 2)


def thresholds_of(surface: Surface, threshold: float | Sequence[float] | None) -> list[float]:
    """Threshold of each text: one given for all, one for each, or (None) the `split_threshold` of each map."""
    if threshold is None:
        return [split_threshold(values) for values in surface.values]
    wanted = np.broadcast_to(np.asarray(threshold, np.float64), len(surface.values))
    if not np.isfinite(wanted).all():
        raise ValueError(f"threshold {threshold}: expected a score, such as 0.3")
    return wanted.tolist()


def find_boxes(
    grounding,
    surface: Surface,
    threshold: float | Sequence[float] | None = None,
    *,
    min_patches: float = MIN_PATCHES,
) -> list[Box]:
    """Find the areas where each text's heatmap exceeds `threshold` (`thresholds_of`), the highest peak first.

    Pixels that share an edge or a corner belong to one area. An area smaller than `min_patches` patches is dropped.
    """
    found = []
    for number, limit in enumerate(thresholds_of(surface, threshold)):
        found.extend(_boxes(grounding, surface, number, limit, min_patches))
    return found


def _boxes(grounding, surface: Surface, number: int, limit: float, min_patches: float) -> list[Box]:
    values, scale = surface.values[number], surface.downsample
    with np.errstate(invalid="ignore"):
        labels, count = ndimage.label(values > limit, EIGHT_CONNECTED)
    if not count:
        return []
    areas = np.bincount(labels.ravel(), minlength=count + 1) * scale**2  # level-0 pixels
    inside = _patches_inside(grounding, surface, labels, count)
    boxes = []
    for label, window in enumerate(ndimage.find_objects(labels), 1):
        if areas[label] < min_patches * grounding.patch_size**2 * (1 - 1e-9):
            continue
        mask = labels[window] == label
        row, column = window[0].start, window[1].start
        corner = np.array(surface.origin) + np.array([column, row]) * scale
        x0, y0 = (round(float(v)) for v in corner)
        x1, y1 = (round(float(v)) for v in corner + np.array(mask.shape[::-1]) * scale)
        scores = values[window][mask]
        boxes.append(
            Box(
                text=grounding.texts[number],
                x=x0,
                y=y0,
                width=x1 - x0,
                height=y1 - y0,
                score=float(scores.mean(dtype=np.float64)),
                peak=float(scores.max()),
                patches=int(inside[label]),
                area_mm2=float(areas[label]) * (grounding.mpp / 1000) ** 2 if grounding.mpp > 0 else None,
                outline=trace(mask, corner, scale),
            )
        )
    return sorted(boxes, key=lambda box: -box.peak)


def _patches_inside(grounding, surface: Surface, labels: np.ndarray, count: int) -> np.ndarray:
    """Number of patches whose centre lies in each labelled area; area 0 is the background."""
    centres = np.asarray(grounding.coords, np.float64) + grounding.patch_size / 2
    column, row = ((centres - surface.origin) / surface.downsample).astype(int).T
    rows, columns = labels.shape
    return np.bincount(labels[np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)], minlength=count + 1)
