"""Plausibility checks of patch coordinates and sizes, with messages that suggest the likely cause.

Coordinates are x, y of a patch's top-left corner in pixels at level 0. Files of other tools may hold them as y, x, at
another level, in units of patches, or twice in a file that was appended to; none of this shows in a loss curve.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SMALLEST_PATCH, LARGEST_PATCH = 16, 2**16  # pixels at level 0
SMALLEST_UM, LARGEST_UM = 4.0, 10_000.0  # edge of a patch
# Level sizes times a downsample of up to 64 differ from the slide's size by up to as many pixels.
EDGE_SLACK = 64
FEWEST_GAPS = 4  # as in a square of four patches
ROUNDING = 0.05  # pixels: the resolution of float32 beyond 100,000 px
CLOSEST = 0.75  # fraction of the expected step: levels differ by a factor of two, nominal and measured mpp by a tenth
DENSEST = 32  # the step of overlapping patches is at least 1/32 of their edge
EXTRACT = "extract the slide's features again"


class Gap(NamedTuple):
    """Most frequent gap between neighbours of a row or column, in pixels, and its number of occurrences."""

    size: int
    support: int


def integer_coords(coords: np.ndarray, patches: int, where: str) -> Int[np.ndarray, "N 2"]:
    """Coordinates as integers; ValueError for another shape, NaN, fractions and numbers beyond 2^31."""
    coords = np.asarray(coords)
    if coords.shape != (patches, 2):
        found = f"{patches} features and coords of shape {coords.shape}"
        if coords.ndim == 2 and len(coords) == patches:
            raise ValueError(f"{where}: {found}, expected two numbers, x and y, of each patch; keep only those two")
        raise ValueError(f"{where}: {found}, expected one x, y per feature; one was cut short, extract the slide again")
    if coords.dtype == np.int32 and coords.min(initial=0) > -(2**31):
        return np.ascontiguousarray(coords)
    if not np.isfinite(coords).all() or np.abs(coords.astype(np.float64)).max() >= 2**31:
        raise ValueError(f"{where}: coords hold NaN or numbers beyond 2^31, expected level-0 pixels; extract it again")
    if coords.dtype == np.float16 and (np.abs(coords) > 2048).any():
        raise ValueError(f"{where}: coords are float16, which is exact up to 2048 only; write them as whole numbers")
    whole = np.round(coords)
    if coords.dtype.kind == "f" and (off := np.flatnonzero((np.abs(coords - whole) > ROUNDING).any(axis=1))).size:
        x, y = coords[off[0]].tolist()
        raise ValueError(
            f"{where}: coords of {len(off)} of {patches} patches are fractions, such as {x:g}, {y:g}; expected whole "
            "pixels at level 0: are they micrometres, or fractions of the slide's size? Write them in pixels"
        )
    return np.ascontiguousarray(whole, np.int32)


def most_frequent_gap(coords: Int[np.ndarray, "N 2"]) -> Gap:
    """Most frequent gap between neighbours, the edge of non-overlapping patches; (0, 0) if there is none.

    The most frequent, not the smallest: the rows of two tissue pieces are rarely aligned.
    """
    gaps = []
    for axis in (0, 1):
        order = np.lexsort((coords[:, axis], coords[:, 1 - axis]))
        steps = np.diff(coords[order].astype(np.int64), axis=0)
        gaps.append(steps[steps[:, 1 - axis] == 0, axis])
    sizes, counts = np.unique(np.concatenate(gaps), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    return Gap(int(sizes[np.argmax(counts)]), int(counts.max())) if len(sizes) else Gap(0, 0)


def smallest_step(coords: np.ndarray) -> float:
    """Smallest nonzero difference between two x or two y; 0 if all coordinates are equal."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    steps = np.concatenate(steps)
    return float(steps.min()) if len(steps) else 0.0


def patch_size_fault(patch_size: int, mpp: float, width: int, height: int) -> str:
    """Objection to a patch's edge at level 0, else ""; 0 means unknown for every argument."""
    expected = f"expected {SMALLEST_PATCH} to {LARGEST_PATCH} px at level 0"
    if patch_size and not SMALLEST_PATCH <= patch_size <= LARGEST_PATCH:
        return f"an impossible patch size of {patch_size} px; {expected}; pass the patch size if it is known"
    if patch_size and mpp and not SMALLEST_UM <= patch_size * mpp <= LARGEST_UM:
        edge = f"{patch_size} px at {mpp:g} um per pixel, {patch_size * mpp:g} um"
        limits = f"{SMALLEST_UM:g} to {LARGEST_UM:g} um"
        return f"an impossible patch size of {edge}; expected {limits}: check mpp and patch size"
    if width and height and patch_size > 2 * max(width, height):
        return f"an impossible patch size of {patch_size} px on a slide of {width} x {height}; {expected}"
    return ""


def coordinate_fault(coords: Int[np.ndarray, "N 2"], patch_size: int, width: int, height: int) -> str:
    """Objection to the coordinates of patches, else ""; `patch_size`, `width` and `height` are 0 if unknown."""
    coords = coords.astype(np.int64)
    low, high = (np.array([end(axis) for axis in coords.T]) for end in (np.min, np.max))  # faster than along axis 0
    size = np.array([width, height])
    if (low + patch_size < 0).any() or (not patch_size and (low < 0).any()):
        return (
            f"coordinates from {_pair(low)}: patches left of or above the slide; expected pixels from its top-left "
            f"corner, not negative; {EXTRACT}"
        )
    if patch_size and len(coords) > 1 and _is_crowded(len(coords), high - low, patch_size):
        return _crowded(coords, patch_size)
    if size.all() and (high >= size + EDGE_SLACK).any():
        outside = int((coords >= size + EDGE_SLACK).any(axis=1).sum())
        return (
            f"{outside} of {len(coords)} patches lie beyond the slide, which is {width} x {height}: coordinates reach "
            f"{_pair(high)}; {_what_fits(high, size)}"
        )
    return ""


def _is_crowded(patches: int, span: np.ndarray, patch_size: int) -> bool:
    """Whether a span holds more patches than the densest overlap allows, or many within half a patch."""
    return patches > np.prod(DENSEST * span // patch_size + 1) or (
        patches >= FEWEST_GAPS and span.max() * 2 < patch_size
    )


def _crowded(coords: np.ndarray, patch_size: int) -> str:
    step = most_frequent_gap(coords).size
    kind = "they are counted in patches, not pixels" if step == 1 else "they are not in pixels at level 0"
    return (
        f"coordinates in steps of {step} between patches of {patch_size} px: {kind}; expected the corners of the "
        f"patches in pixels at level 0; {EXTRACT}"
    )


def _what_fits(high: np.ndarray, size: np.ndarray) -> str:
    if (high[::-1] < size + EDGE_SLACK).all():
        return "with x and y exchanged they would fit; write them as x, y"
    for factor in (2, 4, 8, 16, 32, 64):
        if (high / factor < size + EDGE_SLACK).all():
            return f"divided by {factor} they would fit, so they belong to another level or another slide; {EXTRACT}"
    return f"they belong to another slide, or are in another unit; {EXTRACT}"


def step_fault(coords: Int[np.ndarray, "N 2"], patch_size: int, step: float, width: int, height: int) -> str:
    """Objection to patches closer than their size and overlap allow, as with another level's coordinates; else "".

    `step` is the patch distance stated by the file, 0 if the file does not state the overlap: then only coordinates
    that cover no more than the level's fraction of the slide are refused.
    """
    gap = most_frequent_gap(coords)
    expected = step or float(patch_size)
    if gap.support < FEWEST_GAPS or expected <= 0 or gap.size > CLOSEST * expected:
        return ""
    if gap.size * DENSEST < patch_size:
        return _crowded(coords, patch_size)
    factor = expected / gap.size
    if not step:
        level = round(factor)
        high = coords.max(axis=0).astype(np.int64) + gap.size
        if abs(factor - level) > 0.01 * level or not (width and height) or (high * level > (width, height)).any():
            return ""
    cure = "" if step else f"; if they do overlap, pass patch_size={patch_size} (--patch-size) to confirm it"
    return (
        f"patches of {patch_size} px at level 0 are {gap.size} px apart, expected {expected:g}: multiplied by "
        f"{factor:.4g} the coordinates would fit, so they belong to another level; {EXTRACT}{cure}"
    )


def duplicate_coordinates_fault(
    coords: Int[np.ndarray, "N 2"], features: Float[np.ndarray, "N F"] | None = None
) -> str:
    """Objection to several patches at the same coordinates, else ""; the features identify the cause."""
    keys = (coords[:, 0].astype(np.int64) << 32) | (coords[:, 1].astype(np.int64) & 0xFFFFFFFF)
    ordered = np.sort(keys)
    if (ordered[1:] != ordered[:-1]).all():
        return ""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    first, second = order[same], order[same + 1]
    places = len(np.unique(keys[first]))
    found = f"{places} of {len(coords) - len(same)} coordinates occur more than once, such as {_pair(coords[first[0]])}"
    if features is None:
        return f"{found}; {EXTRACT}"
    blocks = [slice(start, start + 1024) for start in range(0, len(first), 1024)]
    if all(np.array_equal(features[first[rows]], features[second[rows]]) for rows in blocks):
        return f"{found}, with equal features: the file was appended to instead of overwritten; delete it and {EXTRACT}"
    return f"{found}, with different features: two extractions in one file; delete it and {EXTRACT}"


def repetition_fault(features: Float[np.ndarray, "N F"]) -> str:
    """Objection to features without coordinates that repeat themselves in two halves; else ""."""
    half, odd = divmod(len(features), 2)
    if odd or half < FEWEST_GAPS or not np.array_equal(features[0], features[half]):
        return ""
    parts = [slice(start, min(start + 1024, half)) for start in range(0, half, 1024)]
    if all((features[rows] == features[0]).all() for rows in parts):
        return ""
    if not all(np.array_equal(features[rows], features[half + rows.start : half + rows.stop]) for rows in parts):
        return ""
    return f"its {half} patches occur twice, one set after the other: the file was appended to; {EXTRACT}"


def _pair(place: np.ndarray) -> str:
    return f"({int(place[0])}, {int(place[1])})"
