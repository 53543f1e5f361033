"""Outlines of tissue in QuPath's GeoJSON, in level-0 pixels, and which patches lie in them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.path import Path as Curve
from skimage.draw import polygon2mask

from pathflip_jax.data.tables import parse_json


class Polygon(NamedTuple):
    """An outline: its ring of (x, y) points in level-0 pixels, and the rings of its holes."""

    ring: Float[np.ndarray, "n 2"]
    holes: tuple[Float[np.ndarray, "m 2"], ...] = ()


def read_outlines(path) -> dict[str, list[Polygon]]:
    """Read the annotations of a GeoJSON file by the name of their class.

    Takes a FeatureCollection, a bare list of features or one feature, with Polygon or MultiPolygon geometries; the
    name is QuPath's `properties.classification.name`, else `properties.name`. Points and lines are no outlines: a
    file that has only those, or an annotation with no name, is a ValueError.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not a GeoJSON file ({error}); export annotations from QuPath as GeoJSON") from error
    features = content
    if isinstance(content, dict):
        features = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    if not isinstance(features, list):
        raise ValueError(f"{path}: no list of features in it; export annotations from QuPath as GeoJSON")
    outlines: dict[str, list[Polygon]] = {}
    for number, feature in enumerate(features):
        try:
            geometry, properties = feature["geometry"], feature.get("properties") or {}
            kind = geometry["type"]
            if kind not in ("Polygon", "MultiPolygon"):
                continue
            parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
            rings = [[_ring(points) for points in part] for part in parts]
            name = (properties.get("classification") or {}).get("name") or properties.get("name")
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: feature {number} is not a GeoJSON annotation ({error!r:.200})") from error
        if not name:
            raise ValueError(f"{path}: feature {number} has no class; set its classification in QuPath")
        outlines.setdefault(str(name), []).extend(Polygon(part[0], tuple(part[1:])) for part in rings if part)
    if features and not outlines:
        raise ValueError(f"{path}: {len(features)} annotations, none of them a polygon; outline areas, not points")
    return outlines


def _ring(points) -> Float[np.ndarray, "n 2"]:
    ring = np.asarray(points, np.float64)[:, :2]
    if ring.ndim != 2 or ring.shape[1] != 2 or not (np.abs(ring) < 2**31).all():
        raise ValueError("a ring whose points are not two level-0 pixels each")
    return ring


def write_outlines(path, outlines: dict[str, list[Polygon]]) -> None:
    """Write outlines as a FeatureCollection of annotations that QuPath opens."""
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
    Path(path).write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def contains(polygons: list[Polygon], points: Float[np.ndarray, "N 2"]) -> Bool[np.ndarray, "N"]:
    """Whether each point lies in any of the polygons and in none of that polygon's holes."""
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
    """The share of each patch's area inside the outlines, from `samples` x `samples` points of a patch.

    Between 0 and 1 only on the border, so that patches cut by an outline can be told from those clear of it.
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
    """Paint the outlines on a raster of rows and columns; a pixel is in when its centre is.

    `origin` is the level-0 (x, y) of the raster's corner, `downsample` the level-0 pixels of one of its pixels.
    """
    mask = np.zeros(shape, bool)

    def paint(ring):
        return polygon2mask(shape, ((np.asarray(ring) - origin) / downsample - 0.5)[:, ::-1])

    for polygon in polygons:
        inside = paint(polygon.ring)
        for hole in polygon.holes:
            inside &= ~paint(hole)
        mask |= inside
    return mask
