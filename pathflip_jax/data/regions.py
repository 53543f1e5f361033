"""Cutting a slide into regions: which patches belong together (DESIGN section 5)."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from pathflip_jax.data.features import SlideFeatures

Cut = Literal["grid", "scan"]
REGION_EDGE_UM = 2048.0  # the paper's: 4,096 pixels at 20x, 16 x 16 patches of 256
REGION_EDGE_PATCHES = 16  # where the slide does not say its mpp
SCAN_PATCHES = 256


class Regions(NamedTuple):
    """A cut: patches in the order of their regions, each region's row range in it, and its place.

    Region r holds the patches `order[rows[r]:rows[r + 1]]`; `grid` is its column and row from the slide's origin, -1
    in `scan`.
    """

    order: Int[np.ndarray, "N"]
    rows: Int[np.ndarray, "R+1"]
    grid: Int[np.ndarray, "R 2"]


def cut_regions(slide: SlideFeatures, cut: Cut = "grid", edge_um: float = REGION_EDGE_UM) -> Regions:
    """Cut a slide: `grid` into squares of `edge_um` micrometres, `scan` into runs of 256 patches as stored.

    A patch belongs to the square that holds its centre; where the patch size is unknown, its corner. Squares without
    a patch are no regions; they come row by row, patches inside one likewise. Raises ValueError for a grid over
    patches without coordinates.
    """
    count = len(slide.features)
    if cut == "scan":
        rows = np.append(np.arange(0, count, SCAN_PATCHES), count)
        return Regions(np.arange(count), rows, np.full((len(rows) - 1, 2), -1, np.int32))
    if cut != "grid":
        raise ValueError(f"cut={cut!r}, expected 'grid' or 'scan'")
    if slide.coords is None:
        raise ValueError(f"slide {slide.slide_id}: patches have no coordinates, so no grid; cut it with --cut scan")
    edge = edge_pixels(slide, edge_um)
    centres = slide.coords.astype(np.int64) * 2 + slide.patch_size  # in half pixels, to stay whole
    squares = np.floor(centres / (2 * edge)).astype(np.int32)  # [N, 2] column, row
    order = np.lexsort((slide.coords[:, 0], slide.coords[:, 1], squares[:, 0], squares[:, 1]))
    squares = squares[order]
    first = np.flatnonzero(np.append(True, np.any(np.diff(squares, axis=0) != 0, axis=1)))
    return Regions(order, np.append(first, count), squares[first])


def edge_pixels(slide: SlideFeatures, edge_um: float) -> float:
    """Edge of a region in level-0 pixels; without mpp, 16 patch edges."""
    if slide.mpp:
        return edge_um / slide.mpp
    if slide.patch_size:
        return float(REGION_EDGE_PATCHES * slide.patch_size)
    raise ValueError(f"slide {slide.slide_id}: neither mpp nor patch size is known; pass --mpp or --patch-size")
