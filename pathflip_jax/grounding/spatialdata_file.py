"""Groundings as SpatialData, for napari-spatialdata, squidpy and LazySlide.

`<slide>.zarr` holds the shapes `patches` (squares with a column of scores per text) and `areas` (outlines above the
threshold), and the points `best_patches`. Coordinates are pixels at level 0, which the coordinate system "global"
keeps; "micrometres" scales them by the slide's mpp where it is known.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.grounding.boxes import MIN_PATCHES, Box
from pathflip_jax.grounding.maps import SMOOTH, Grounding
from pathflip_jax.grounding.placement import Measures
from pathflip_jax.grounding.top_patches import TOP, top_patches
from pathflip_jax.grounding.write import find_areas

KEY = "pathflip"  # of the facts in `attrs`
_MARKS = ("zarr.json", ".zgroup")  # of a Zarr group, in versions 3 and 2


def require_spatialdata() -> None:
    """Raise ImportError, naming the extra, if spatialdata is not installed."""
    try:
        import spatialdata  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--spatialdata needs spatialdata: pip install 'pathflip-jax[spatialdata]' ({error})"
        ) from None


def write_spatialdata(
    out: Path,
    grounding: Grounding,
    *,
    measures: Measures | None = None,
    threshold: float | None = None,
    smooth: float = SMOOTH,
    min_patches: float = MIN_PATCHES,
    top: int = TOP,
) -> str:
    """Write a grounding as `<slide>.zarr` in `out`, with the areas and best patches of `write_grounding`; its path.

    A file of an earlier run is replaced once the new one is complete. `areas` is absent if no text has one. Raises
    ImportError without spatialdata, and FileExistsError for a folder of that name that is no Zarr group.
    """
    require_spatialdata()
    import spatialdata
    from spatialdata.transformations import Identity, Scale

    place = out / f"{grounding.slide_id}.zarr"
    if place.exists() and not any((place / mark).is_file() for mark in _MARKS):
        raise FileExistsError(f"{place}: exists and is no Zarr group; move it, or write to another folder")
    areas = find_areas(grounding, measures, threshold, smooth, min_patches)
    grounding, systems = areas.grounding, {"global": Identity()}
    if grounding.mpp:
        systems["micrometres"] = Scale([grounding.mpp, grounding.mpp], axes=("x", "y"))
    shapes = {"patches": _patches(grounding, systems)}
    if areas.boxes:
        shapes["areas"] = _areas(areas.boxes, systems)
    facts = {
        "slide_id": grounding.slide_id, "texts": list(grounding.texts), "negative": list(grounding.negative),
        "method": grounding.method, "smooth": smooth, "thresholds": list(areas.limits),
        "patch_size": grounding.patch_size, "mpp": grounding.mpp or None,
    }  # fmt: skip
    points = {"best_patches": _best_patches(grounding, top, systems)}
    _write_whole(spatialdata.SpatialData(shapes=shapes, points=points, attrs={KEY: facts}), place)
    return str(place)


def _patches(grounding: Grounding, systems: dict[str, Any]):
    """Squares of the patches, with the scores of each text in a column of its name."""
    import geopandas
    import shapely
    from spatialdata.models import ShapesModel

    low, high = grounding.coords, grounding.coords + grounding.patch_size
    squares = shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1])
    scores = {
        text if text != "geometry" else "geometry (text)": np.asarray(values, np.float64)
        for text, values in zip(grounding.texts, grounding.patch_scores, strict=True)
    }
    return ShapesModel.parse(geopandas.GeoDataFrame(scores, geometry=squares), transformations=systems)


def _areas(boxes: list[Box], systems: dict[str, Any]):
    """Outlines of the areas with their text, scores, number of patches and size."""
    import geopandas
    import pandas
    import shapely
    from spatialdata.models import ShapesModel

    outlines = [
        shapely.MultiPolygon([shapely.Polygon(part.ring, part.holes) for part in box.outline])
        if len(box.outline) > 1
        else shapely.Polygon(box.outline[0].ring, box.outline[0].holes)
        for box in boxes
    ]
    columns = {
        "text": pandas.Categorical([box.text for box in boxes]),
        "score": [box.score for box in boxes],
        "peak": [box.peak for box in boxes],
        "patches": [box.patches for box in boxes],
        "area_mm2": [np.nan if box.area_mm2 is None else box.area_mm2 for box in boxes],
    }
    return ShapesModel.parse(geopandas.GeoDataFrame(columns, geometry=outlines), transformations=systems)


def _best_patches(grounding: Grounding, top: int, systems: dict[str, Any]):
    """Centres of the best patches of each text, best first (`rank` 1)."""
    import pandas
    from spatialdata.models import PointsModel

    tables = []
    for text, scores in zip(grounding.texts, grounding.patch_scores, strict=True):
        chosen = top_patches(scores, grounding.coords, grounding.patch_size, top)
        x, y = (grounding.coords[chosen] + grounding.patch_size / 2).T
        ranks = np.arange(1, len(chosen) + 1)
        tables.append(pandas.DataFrame({"x": x, "y": y, "text": text, "score": scores[chosen], "rank": ranks}))
    table = pandas.concat(tables, ignore_index=True).astype({"text": "category"})
    return PointsModel.parse(table, coordinates={"x": "x", "y": "y"}, transformations=systems)


def _write_whole(data, place: Path) -> None:
    """Write a Zarr folder under its final name only once it is complete, in place of an earlier one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part, old = (place.with_name(f"{place.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        data.write(part)
        if place.exists():
            place.replace(old)
        try:
            part.replace(place)
        except OSError:
            if old.exists():
                old.replace(place)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
