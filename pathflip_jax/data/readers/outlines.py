"""Tissue outlines in QuPath's GeoJSON, in level-0 pixels: files, masks and tests of patches against them."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contourpy import FillType, contour_generator
from jaxtyping import Bool, Float, Int

from pathflip_jax.data.storage.json_values import parse_json

WITHOUT_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")
SEPARATOR = ": "  # separator of QuPath's derived class names


class Polygon(NamedTuple):
    """Outline: its ring of (x, y) points in level-0 pixels, and the rings of its holes."""

    ring: Float[np.ndarray, "n 2"]
    holes: tuple[Float[np.ndarray, "m 2"], ...] = ()


class Annotations(NamedTuple):
    """Outlines of a file by class, and counts of features without an area, by geometry type."""

    outlines: dict[str, list[Polygon]]
    left_out: dict[str, list[int]]

    def note(self) -> str:
        """Sentence about skipped features; "" when there were none."""
        if not self.left_out:
            return ""
        kinds = ", ".join(f"{len(numbers)} {kind}" for kind, numbers in self.left_out.items())
        numbers = sorted({number for numbers in self.left_out.values() for number in numbers})
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        return f"{kinds} left out because they have no area (features {shown}, counted from 0)"


def read_outlines(path) -> dict[str, list[Polygon]]:
    """Read the outlines of a GeoJSON file by class name, as `read_annotations` does."""
    return read_annotations(path).outlines


def read_annotations(path, unclassified: str = "") -> Annotations:
    """Read the annotations of a GeoJSON file by class name.

    Takes a FeatureCollection, a bare list of features or one feature. Polygons are read, including those inside a
    MultiPolygon or a GeometryCollection; points, lines and features without a geometry are skipped and reported. The
    class is QuPath's `properties.classification`, by its `name` or its list of `names` (joined as QuPath shows them,
    "Tumor: Positive"), else `properties.name`, else `unclassified`. Raises ValueError, with the number of the feature,
    for invalid content, for an outline without a class, and for a file without outlines.
    """
    path = Path(path)
    features = _features(path)
    outlines: dict[str, list[Polygon]] = {}
    left_out: dict[str, list[int]] = {}
    for number, feature in enumerate(features):
        polygons = []
        try:
            if (bare := feature.get("type")) != "Feature" and "geometry" not in feature:
                raise ValueError(
                    f"found {bare!r:.80}, which has no class, expected a Feature; export objects as features"
                )
            for kind, coordinates in _simple(feature["geometry"]):
                if kind == "Polygon" and coordinates:
                    ring, *holes = map(_ring, coordinates)
                    polygons.append(Polygon(ring, tuple(holes)))
                else:
                    left_out.setdefault("empty Polygon" if kind == "Polygon" else kind, []).append(number)
            name = _class_name(feature.get("properties") or {}) or unclassified
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
            reason = error if type(error) is ValueError else f"{error!r:.200}"
            raise ValueError(f"{path}: feature {number} is not a GeoJSON annotation ({reason})") from error
        if polygons and not name:
            raise ValueError(f"{path}: feature {number} has no class; set its classification in QuPath")
        if polygons:
            outlines.setdefault(name, []).extend(polygons)
    if features and not outlines:
        raise ValueError(
            f"{path}: none of the {len(features)} annotations is a polygon; outline areas instead of marking points"
        )
    return Annotations(outlines, left_out)


def of_concept(outlines: dict[str, list[Polygon]], concept: str) -> list[Polygon]:
    """Outlines of a concept: its class and classes derived from it ("Tumor: Positive" belongs to "tumor").

    Names are compared ignoring case and white space.
    """
    wanted = _plain(concept)
    return [polygon for name, polygons in outlines.items() if wanted in _names(name) for polygon in polygons]


def unknown_classes(outlines: dict[str, list[Polygon]], concepts: Iterable[str]) -> list[str]:
    """Classes of outlines that belong to none of the concepts."""
    wanted = {_plain(concept) for concept in concepts}
    return [name for name in outlines if not wanted & _names(name)]


def _features(path: Path) -> list:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not a GeoJSON file ({error}); export annotations from QuPath as GeoJSON") from error
    features = content
    if isinstance(content, dict):
        features = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    if not isinstance(features, list):
        raise ValueError(f"{path}: found no list of features; export annotations from QuPath as GeoJSON")
    return features


def _simple(geometry) -> Iterator[tuple[str, list | None]]:
    """Simple geometries within a geometry, as (type, coordinates); collections may be nested."""
    rest = deque([geometry])
    while rest:
        part = rest.popleft()
        if part is None:
            yield "feature without a geometry", None
            continue
        kind = part["type"]
        if kind == "GeometryCollection":
            rest.extendleft(reversed(part["geometries"]))
        elif kind == "MultiPolygon":
            yield from (("Polygon", coordinates) for coordinates in part["coordinates"])
        elif kind in ("Polygon", *WITHOUT_AREA):
            yield kind, part["coordinates"]
        else:
            raise ValueError(
                f"found a geometry of type {kind!r:.80}, expected Polygon, MultiPolygon or GeometryCollection"
            )


def _class_name(properties: dict) -> str:
    """Class of a feature: one name, or QuPath's list of names joined as QuPath shows them."""
    found = properties.get("classification") or {}
    if isinstance(found, str):  # written so by other tools
        return found.strip()
    names = found.get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"found class names {names!r:.80}, expected a list of texts")
    return str(SEPARATOR.join(names) or found.get("name") or properties.get("name") or "").strip()


def _names(name: str) -> set[str]:
    """All names of a class: its full name, and each part of a derived QuPath name."""
    return {_plain(part) for part in (name, *name.split(":"))} - {""}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _ring(points) -> Float[np.ndarray, "n 2"]:
    ring = np.asarray(points, np.float64)[:, :2]
    if ring.ndim != 2 or ring.shape[1] != 2 or not (np.abs(ring) < 2**31).all():
        raise ValueError("found a ring whose points are not pairs of level-0 coordinates")
    if len(ring) < 3:
        raise ValueError(f"found a ring of {len(ring)} points, which encloses no area")
    return ring


def write_outlines(path, outlines: dict[str, list[Polygon]]) -> None:
    """Write outlines as a FeatureCollection of annotations that QuPath opens."""
    Path(path).write_text(json.dumps(as_collection(outlines)), encoding="utf-8")


def as_collection(outlines: dict[str, list[Polygon]]) -> dict[str, Any]:
    """Outlines by class as a FeatureCollection of QuPath's annotations."""
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [np.asarray(ring).tolist() for ring in (polygon.ring, *polygon.holes)],
            },
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, polygons in outlines.items()
        for polygon in polygons
    ]
    return {"type": "FeatureCollection", "features": features}


def contains(polygons: list[Polygon], points: Float[np.ndarray, "N 2"]) -> Bool[np.ndarray, "N"]:
    """Whether each point lies in any polygon and in none of that polygon's holes."""
    from matplotlib.path import Path as Curve  # takes 0.2 s, spent only where there are outlines

    inside = np.zeros(len(points), bool)
    for polygon in polygons:
        found = Curve(polygon.ring).contains_points(points)
        for hole in polygon.holes:
            found &= ~Curve(hole).contains_points(points)
        inside |= found
    return inside


def patches_inside(polygons: list[Polygon], coords: Int[np.ndarray, "N 2"], patch_size: float) -> Bool[np.ndarray, "N"]:
    """Whether the centre of each patch lies in the outlines; `coords` are top-left corners at level 0."""
    return contains(polygons, np.asarray(coords, np.float64) + patch_size / 2)


def area_fraction(
    polygons: list[Polygon], coords: Int[np.ndarray, "N 2"], patch_size: float, samples: int = 16
) -> Float[np.ndarray, "N"]:
    """Fraction of each patch's area inside the outlines, estimated from `samples` x `samples` points per patch.

    Strictly between 0 and 1 only for patches that an outline cuts.
    """
    if len(coords) == 0:
        return np.zeros(0)
    coords = np.asarray(coords, np.float64)
    scale = samples / patch_size
    origin = coords.min(0)
    corner = np.round((coords - origin) * scale).astype(int)  # [N, 2] x, y on the raster
    shape = tuple(corner.max(0)[::-1] + samples)
    mask = rasterise(polygons, shape, origin, 1 / scale)
    total = np.pad(np.cumsum(np.cumsum(mask, 0, dtype=np.int64), 1), ((1, 0), (1, 0)))
    x, y = corner.T
    inside = total[y + samples, x + samples] - total[y, x + samples] - total[y + samples, x] + total[y, x]
    return inside / samples**2


def rasterise(polygons: list[Polygon], shape: tuple[int, int], origin, downsample: float) -> Bool[np.ndarray, "h w"]:
    """Rasterise the outlines to rows and columns; a pixel is inside if its centre is.

    `origin` is the level-0 (x, y) of the raster's corner, `downsample` the level-0 pixels of one of its pixels.
    """
    from skimage.draw import polygon as pixels_of  # late, as the import of matplotlib in `contains`

    mask = np.zeros(shape, bool)
    for polygon in polygons:
        corners = [((np.asarray(ring) - origin) / downsample - 0.5)[:, ::-1] for ring in (polygon.ring, *polygon.holes)]
        # A window of the raster: slides have thousands of small outlines.
        first = np.clip(np.floor(corners[0].min(0)).astype(int), 0, shape)
        last = np.clip(np.ceil(corners[0].max(0)).astype(int) + 1, first, shape)
        inside = np.zeros(last - first, bool)
        inside[pixels_of(*(corners[0] - first).T, inside.shape)] = True
        for hole in corners[1:]:
            inside[pixels_of(*(hole - first).T, inside.shape)] = False
        mask[first[0] : last[0], first[1] : last[1]] |= inside
    return mask


def trace(mask: Bool[np.ndarray, "h w"], corner: np.ndarray, scale: float) -> tuple[Polygon, ...]:
    """Outline rings of the set pixels of a mask whose top-left corner lies at `corner`, in level-0 pixels.

    They run midway between the centres of pixels inside and outside, that is along pixel edges with cut corners. Parts
    that touch only at a corner may be returned as two polygons.
    """
    padded = np.pad(mask.astype(np.float64), 1)
    points, offsets = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    polygons = []
    for ring_points, ends in zip(points, offsets, strict=True):
        placed = corner + (ring_points - 0.5) * scale  # in the padded mask the centre of pixel j is at j + 1
        rings = [placed[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        polygons.append(Polygon(rings[0], tuple(rings[1:])))
    return tuple(polygons)
