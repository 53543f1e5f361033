"""Regions of a slide: assignment of patches to regions, and their stored order (DESIGN section 5)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pathflip_jax.data.readers.features import SlideFeatures

EDGE_UM = 2048.0
PATCHES_PER_EDGE = 16
PATCHES_PER_SCAN = 256
CUTS = ("grid", "scan", "patch")


class Regions(NamedTuple):
    """Regions of a slide: region r holds the patches `order[rows[r]:rows[r + 1]]`, at cell `grid[r]`.

    `grid` is (column, row) from the level-0 origin, and (-1, -1) for every region in `scan` and `patch`.
    """

    order: Int[np.ndarray, "N"]
    rows: Int[np.ndarray, "R+1"]
    grid: Int[np.ndarray, "R 2"]


def region_edge(patch_size: int, mpp: float, edge_um: float = EDGE_UM, edge_px: int | None = None) -> int:
    """Edge of a region in pixels at level 0: the whole number of patches nearest to `edge_um`.

    Whole patches, so that every full region has the same number of them regardless of small differences in mpp: 2,048
    um is 16 patches of 256 at 0.5 um and at 0.499. Without mpp (0) it is 16 patches; `edge_px` is used unchanged.
    """
    if edge_px is not None:
        if edge_px < 1:
            raise ValueError(f"edge_px is {edge_px}, expected at least one pixel at level 0")
        return int(edge_px)
    if patch_size < 1:
        raise ValueError(f"patch size is {patch_size}, expected pixels at level 0; pass patch_size or edge_px")
    if edge_um <= 0:
        raise ValueError(f"edge_um is {edge_um}, expected a length in micrometres above 0")
    mpp = float(np.float32(mpp))  # the precision of records, so that a slide is cut identically before and after
    patches = round(edge_um / (mpp * patch_size)) if mpp > 0 else PATCHES_PER_EDGE
    return patch_size * max(patches, 1)


def patch_slots(
    patch_size: int,
    mpp: float,
    cut: str = "grid",
    edge_um: float = EDGE_UM,
    edge_px: int | None = None,
    patches_per_region: int = PATCHES_PER_SCAN,
) -> int:
    """Number S of non-overlapping patches in a full region; with overlap, measure the regions instead."""
    if cut == "scan":
        return patches_per_region
    along = -(-region_edge(patch_size, mpp, edge_um, edge_px) // patch_size)
    return along**2


def cut_regions(
    slide: SlideFeatures,
    cut: str = "grid",
    edge_um: float = EDGE_UM,
    edge_px: int | None = None,
    patches_per_region: int = PATCHES_PER_SCAN,
) -> Regions:
    """Cut a slide into regions.

    `grid`: squares of `region_edge` pixels from the level-0 origin; a patch belongs to the square that contains its
    top-left corner (the nearest one for a corner outside the slide), so `coords // edge` is the cell. Regions, and the
    patches within them, are in row-major order, whatever the order in the file. `scan` (the released code): consecutive
    patches in file order; the last region may be short. `patch` (PathFLIP2): every patch is a region. Raises ValueError
    for a grid without coordinates or edge.
    """
    if cut not in CUTS:
        raise ValueError(f"region cut {cut!r}: expected one of {', '.join(CUTS)}")
    if cut == "patch":
        each = np.arange(len(slide.features))
        return Regions(each, np.arange(len(each) + 1), np.full((len(each), 2), -1, np.int32))
    if cut == "scan":
        if patches_per_region < 1:
            raise ValueError(f"patches_per_region is {patches_per_region}, expected at least 1")
        rows = np.append(np.arange(0, len(slide.features), patches_per_region), len(slide.features))
        return Regions(np.arange(len(slide.features)), rows, np.full((len(rows) - 1, 2), -1, np.int32))
    if slide.coords is None:
        raise ValueError(
            f"slide {slide.slide_id}: its features have no coordinates, which cut 'grid' needs; "
            "use cut 'scan', or a feature file with coordinates"
        )
    try:
        edge = region_edge(slide.patch_size, slide.mpp, edge_um, edge_px)
    except ValueError as error:
        raise ValueError(f"slide {slide.slide_id}: {error}") from None
    cells = np.maximum(slide.coords, 0) // edge
    order = np.lexsort((_row_by_row(slide.coords), _row_by_row(cells)))
    cells = cells[order]
    starts = np.flatnonzero(np.r_[True, (cells[1:] != cells[:-1]).any(1)])
    return Regions(order, np.append(starts, len(order)), cells[starts].astype(np.int32))


def _row_by_row(places: Int[np.ndarray, "N 2"]) -> Int[np.ndarray, "N"]:
    """Sort keys for row-major order, by y then x: a single key sorts in half the time of two."""
    return (places[:, 1].astype(np.int64) << 32) + places[:, 0]
