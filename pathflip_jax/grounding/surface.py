"""Rasterised heatmaps of patch scores in level-0 pixels, the basis of figures, boxes and the viewer.

A patch covers [x, x + patch_size) at level 0 whatever the level it was read at; overlapping patches are averaged, and
pixels without a patch have no score (NaN). Smoothing is weighted by coverage, so that scores at the tissue's edge do
not fade into background.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from pathflip_jax.grounding.maps import SMOOTH

PIXELS_PER_PATCH = 4  # pixels per patch edge: boxes and contours are accurate to a quarter of a patch
LONGEST = 2048  # pixels of a surface's longer side; larger slides get fewer pixels per patch
TRUNCATE = 3.0  # standard deviations at which the Gaussian is truncated


class Surface(NamedTuple):
    """Scores of every text over one slide; NaN where there is no patch.

    Pixel (row, column) covers `downsample` level-0 pixels from `origin` (x, y) + (column, row) * downsample.
    """

    values: Float[np.ndarray, "C h w"]
    origin: tuple[float, float]
    downsample: float


def make_surface(
    grounding, smooth: float = SMOOTH, *, pixels_per_patch: int = PIXELS_PER_PATCH, longest: int = LONGEST
) -> Surface:
    """Rasterise the patch scores of a `Grounding` over its slide, smoothed by a Gaussian of `smooth` patch edges.

    Raises ValueError for a slide whose patch size is unknown, and for a negative `smooth`.
    """
    size = float(grounding.patch_size)
    if size <= 0:
        raise ValueError(
            f"slide {grounding.slide_id}: the size of its patches is unknown, so no heatmap can be drawn; import its "
            "features with their patch_size (`pathflip import --patch-size`)"
        )
    if not 0 <= smooth < np.inf:
        raise ValueError(f"smooth {smooth}: expected a number of patch edges, or 0 for no smoothing")
    coords = np.asarray(grounding.coords, np.float64)
    low, high = coords.min(0), coords.max(0) + size
    extent = high - low
    fitting = int(longest * size / extent.max())
    downsample = max(size / np.clip(fitting, 1, pixels_per_patch), extent.max() / (longest - 1))
    columns, rows = np.ceil(extent / downsample - 1e-9).astype(int) + int(downsample > size)  # the last may round up
    origin = (float(low[0]), float(low[1]))
    values = np.stack(
        [
            average_patches(scores, coords, size, (rows, columns), origin, downsample)
            for scores in np.atleast_2d(grounding.patch_scores)
        ]
    )
    return Surface(smooth_covered(values, smooth * size / downsample).astype(np.float32), origin, float(downsample))


def average_patches(
    scores: Float[np.ndarray, "N"],
    coords: Int[np.ndarray, "N 2"],
    patch_size: float,
    shape: tuple[int, int],
    origin: tuple[float, float],
    downsample: float,
) -> Float[np.ndarray, "h w"]:
    """Rasterise patch scores to rows and columns: the mean where patches overlap, NaN in pixels without a patch.

    `origin` is the level-0 (x, y) of the raster's corner, `downsample` the level-0 pixels of one of its pixels. Patches
    are clipped to the raster.
    """
    rows, columns = shape
    low = (np.asarray(coords, np.float64) - origin) / downsample
    high = np.round(low + patch_size / downsample).astype(int)
    low = np.round(low).astype(int)
    high = np.maximum(high, low + 1)  # a patch smaller than a pixel still shows
    x0, x1 = (np.clip(side[:, 0], 0, columns) for side in (low, high))
    y0, y1 = (np.clip(side[:, 1], 0, rows) for side in (low, high))

    def cover(values):  # sum over the patches that cover a pixel, by cumulative sums of differences at their corners
        corners = np.zeros((rows + 1, columns + 1))
        for y, x, sign in ((y0, x0, 1), (y1, x1, 1), (y0, x1, -1), (y1, x0, -1)):
            np.add.at(corners, (y, x), sign * values)
        return corners.cumsum(0).cumsum(1)[:rows, :columns]

    count = np.round(cover(np.ones(len(coords))))
    shift = float(np.mean(scores)) if len(scores) else 0.0  # keeps the cumulative sums small
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, cover(np.asarray(scores, np.float64) - shift) / np.maximum(count, 1) + shift, np.nan)


def smooth_covered(values: Float[np.ndarray, "*C h w"], sigma: float) -> Float[np.ndarray, "*C h w"]:
    """Smooth rasters by a Gaussian of `sigma` pixels, weighting only pixels with a score; NaN stays NaN."""
    if sigma <= 0:
        return values
    known = np.isfinite(values)
    if values.ndim > 2 and (known == known[0]).all():  # texts on one slide: the weights are those of its patches
        known = known[0]

    def spread(raster):
        return gaussian_filter(raster, sigma, mode="constant", truncate=TRUNCATE, axes=(-2, -1))

    weight = np.maximum(spread(known.astype(np.float64)), 1e-12)
    return np.where(known, spread(np.where(known, values, 0.0)) / weight, np.nan)


def smooth_patches(
    scores: Float[np.ndarray, "C N"], coords: Int[np.ndarray, "N 2"], patch_size: float, smooth: float
) -> Float[np.ndarray, "C N"]:
    """Smooth patch scores by a Gaussian of `smooth` patch edges: the smoothed map sampled at its patches."""
    if smooth <= 0:
        return scores
    tree = cKDTree(np.asarray(coords, np.float64))
    near = tree.sparse_distance_matrix(tree, TRUNCATE * smooth * patch_size, output_type="coo_matrix")
    weights = csr_array((np.exp(-0.5 * (near.data / (smooth * patch_size)) ** 2), (near.row, near.col)), near.shape)
    return ((weights @ scores.T) / weights.sum(1)[:, None]).T
