"""Layout of a synthetic slide: its tissue, and the concept that fills each part of it.

Planning is separate from drawing: it takes milliseconds on a grid of 8 px, so a report can be written, and a second run
can know a slide's content, without rendering a pixel. The same smooth fields give the outline on disk and the edge that
is drawn, so the outlines are exact by construction.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours, points_in_poly

STEP = 8  # level-0 px of one cell of the planning grid

TUMORS = {
    "glands": "adenocarcinoma",
    "keratin pearls": "squamous cell carcinoma",
    "papillary fronds": "papillary carcinoma",
    "mucin pools": "mucinous carcinoma",
    "solid sheets": "undifferentiated carcinoma",
}
OTHERS = ("necrosis", "lymphoid aggregates", "fat", "fibrous stroma", "ulcer")
CONCEPTS = (*TUMORS, *OTHERS)


@dataclass(frozen=True)
class Area:
    """One contiguous area of a concept: smooth field [rows, cols] of the planning grid, inside where >= 0.5."""

    concept: str
    field: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Plan of one slide: size in level-0 px, the tissue's field, its areas, and the facts a report may state.

    `extent` is each concept's share of the tissue, `place` the words that describe its location.
    """

    width: int
    height: int
    tissue: np.ndarray
    areas: tuple[Area, ...]
    extent: dict[str, float]
    place: dict[str, str]
    pieces: int


def plan(rng: np.random.Generator, tumor: str, size: int) -> Layout:
    """Lay out one slide about `size` px wide: pieces of tissue, the tumour's areas and 2 to 4 further concepts."""
    cols, rows = (int(size * rng.uniform(0.94, 1.06)) // 64 * 64 // STEP for _ in range(2))
    mask, pieces = _tissue(rng, rows, cols)
    label, middles = _parcels(rng, mask, size / STEP / 4)
    owner = _assign(rng, middles, tumor)
    tissue = ndimage.gaussian_filter(mask.astype(np.float32), 1.0)
    areas, extent, place = [], {}, {}
    total = float((tissue >= 0.5).sum())
    smallest = 0.3 * (size / STEP / 4) ** 2
    for concept in CONCEPTS:
        mine = np.isin(label, [i + 1 for i, name in enumerate(owner) if name == concept])
        if not mine.any():
            continue
        soft = np.minimum(ndimage.gaussian_filter(mine.astype(np.float32), 1.6), tissue)
        parts, count = ndimage.label(soft >= 0.5)
        sizes = ndimage.sum_labels(np.ones_like(parts), parts, np.arange(1, count + 1))
        kept = [i + 1 for i in range(count) if sizes[i] >= min(smallest, max(sizes))]
        near = ndimage.grey_dilation(parts, 5)  # the field's slope outside the outline belongs to the part too
        for part in kept:
            own = np.where(parts > 0, parts == part, near == part)
            areas.append(Area(concept, np.where(own, soft, 0).astype(np.float32)))
        inside = np.isin(parts, kept)
        extent[concept] = float(inside.sum()) / total
        place[concept] = place_word(inside)
    return Layout(cols * STEP, rows * STEP, tissue, tuple(areas), extent, place, pieces)


def _smooth(rng: np.random.Generator, rows: int, cols: int, sigma: float) -> np.ndarray:
    field = ndimage.gaussian_filter(rng.standard_normal((rows, cols)), sigma, mode="reflect")
    return field / field.std()


def _tissue(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, int]:
    """One to three irregular pieces that touch no border and fill between 45 % and 75 % of the slide."""
    y, x = np.mgrid[0:rows, 0:cols].astype(float)
    x, y = (x + 0.5) / cols * 2 - 1, (y + 0.5) / rows * 2 - 1
    if rng.random() < 0.5:
        x, y = y, x
    pieces = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    shift = rng.uniform(-0.12, 0.12)
    boxes = {
        1: [(0, 0, 0.88, 0.88)],
        2: [(-0.48 + shift, 0, 0.42 + shift, 0.88), (0.48 + shift, 0, 0.42 - shift, 0.86)],
        3: [(-0.48, -0.02, 0.42, 0.88), (0.47, -0.47, 0.42, 0.42), (0.47, 0.47, 0.42, 0.42)],
    }[pieces]
    form = np.full((rows, cols), -9.0)
    for cx, cy, rx, ry in boxes:
        form = np.maximum(form, 1 - (np.abs((x - cx) / rx) ** 2.6 + np.abs((y - cy) / ry) ** 2.6) ** (1 / 2.6))
    form = form + 0.10 * _smooth(rng, rows, cols, rows / 12) + 0.025 * _smooth(rng, rows, cols, rows / 50)
    edge = np.minimum(1 - np.abs(x), 1 - np.abs(y)) + 0.05 * _smooth(rng, rows, cols, rows / 15)
    form = form - 6 * np.clip(0.10 - edge, 0, None)
    form = np.where(np.minimum(1 - np.abs(x), 1 - np.abs(y)) < 0.03, -9, form)
    level = 0.0
    if (form > 0).mean() < 0.45:
        level = float(np.quantile(form, 0.55))
    parts, count = ndimage.label(ndimage.binary_fill_holes(form > level))
    sizes = ndimage.sum_labels(np.ones_like(parts), parts, np.arange(1, count + 1))
    kept = [i + 1 for i in range(count) if sizes[i] > 0.08 * parts.size]
    return np.isin(parts, kept), len(kept)


def _parcels(rng: np.random.Generator, mask: np.ndarray, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """Divide the tissue into irregular parcels about `edge` cells wide: label 1, 2, ... per cell, and their middles."""
    rows, cols = mask.shape
    warp = [
        _smooth(rng, rows, cols, edge / 5) * edge / 11 + _smooth(rng, rows, cols, edge / 22) * edge / 40
        for _ in range(2)
    ]
    label, middles = np.zeros(mask.shape, np.int32), []
    parts, count = ndimage.label(mask)
    for part in range(1, count + 1):
        y, x = np.nonzero(parts == part)
        here = np.stack([y + warp[0][y, x], x + warp[1][y, x]], 1)
        number = max(1, round(len(y) / edge**2))
        centre = here[rng.choice(len(here), number, replace=False)]
        sample = here[:: max(1, len(here) // 1500)]
        for _ in range(12):
            nearest = ((sample[:, None] - centre) ** 2).sum(-1).argmin(1)
            means = [sample[nearest == i].mean(0) if (nearest == i).any() else centre[i] for i in range(number)]
            centre = np.array(means)
        nearest = ((here[:, None] - centre) ** 2).sum(-1).argmin(1)
        label[y, x] = nearest + 1 + len(middles)
        middles.extend(centre)
    return label, np.array(middles)


def _assign(rng: np.random.Generator, middles: np.ndarray, tumor: str) -> list[str | None]:
    """Assign each parcel a concept or None (background): the tumour's are adjacent, the rest are 2 to 4 others."""
    number = len(middles)
    owner: list[str | None] = [None] * number
    first = int(rng.integers(number))
    order = np.argsort(((middles - middles[first]) ** 2).sum(1))
    share = max(1, min(number - 2, int(rng.integers(2, 5)), round(number * 0.45)))
    for parcel in order[:share]:
        owner[parcel] = tumor
    rest = [int(p) for p in rng.permutation(order[share:])]
    names = [str(name) for name in rng.permutation(OTHERS)][: int(rng.integers(2, 5))][: max(1, len(rest))]
    for name in names:
        if rest:
            owner[rest.pop()] = name
    for name in (*names, tumor):
        if len(rest) > 1 and rng.random() < 0.55:  # the last parcel stays background
            owner[rest.pop()] = name
    return owner


def place_word(inside: np.ndarray) -> str:
    """The half of the slide that holds nearly all of the area: "left", "right", "upper", "lower", or ""."""
    rows, cols = inside.shape
    y, x = np.nonzero(inside)
    shares = {
        "left": (x < cols / 2).mean(),
        "right": (x >= cols / 2).mean(),
        "upper": (y < rows / 2).mean(),
        "lower": (y >= rows / 2).mean(),
    }
    side = max(shares, key=lambda name: shares[name])
    return side if shares[side] > 0.92 else ""


def rings(field: np.ndarray) -> list[list[np.ndarray]]:
    """Outlines of `field` >= 0.5 as polygons in level-0 px: each [outer ring, hole, ...], rings closed, (x, y)."""
    contours = find_contours(np.pad(field, 1), 0.5)
    outers, holes = [], []
    for contour in contours:
        ring = approximate_polygon(contour, 0.15)
        if len(ring) < 4:
            continue
        ring = np.round((ring[:, ::-1] - 0.5) * STEP, 1)
        ring[-1] = ring[0]
        x, y = ring.T
        area = 0.5 * float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
        (outers if area * _TURN > 0 else holes).append(ring)
    polygons = [[ring] for ring in outers]
    for hole in holes:
        for polygon in polygons:
            if points_in_poly(hole[:1], polygon[0])[0]:
                polygon.append(hole)
                break
    return polygons


# find_contours keeps the higher values on one side; the sign of an outer ring's area, x right and y down.
_TURN = (
    1.0
    if (lambda c: np.sum(c[:-1, 1] * c[1:, 0] - c[1:, 1] * c[:-1, 0]))(
        find_contours(np.pad(np.ones((2, 2)), 1), 0.5)[0]
    )
    > 0
    else -1.0
)
