"""Patches of a slide inside or outside of outlines, such as annotations drawn in QuPath."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.readers.outlines import Polygon, patches_inside, read_annotations

SUFFIX = ".geojson"


def select_patches(
    slide: SlideFeatures,
    within: Path | None = None,
    without: Path | None = None,
    bounds: tuple[int, int] = (0, 0),
) -> SlideFeatures:
    """Slide with the patches whose centres lie `within` outlines and outside of others (`without`).

    Each is a GeoJSON file, of any classes, or a folder of `<slide_id>.geojson`. `bounds` is the corner from which
    QuPath counts the pixels of the slide. A folder without a file for the slide restricts nothing with `without`.
    Raises FileNotFoundError for a missing file, ValueError for outlines of another slide or level, and where no patch
    is left.
    """
    if within is None and without is None:
        return slide
    if slide.coords is None:
        raise ValueError(f"slide {slide.slide_id}: its features have no coordinates, so outlines select no patches")
    kept = np.ones(len(slide.coords), bool)
    if within is not None:
        kept &= _inside(slide, _file_of(within, slide.slide_id), bounds)
    if without is not None and (path := _file_of(without, slide.slide_id, optional=without.is_dir())) is not None:
        kept &= ~_inside(slide, path, bounds)
    if not kept.any():
        named = " and ".join(str(path) for path in (within, without) if path is not None)
        raise ValueError(
            f"slide {slide.slide_id}: the outlines of {named} leave none of its {len(kept)} patches; outline an area "
            "that holds the centres of patches, in level-0 pixels of this slide"
        )
    return replace(slide, features=np.asarray(slide.features[np.flatnonzero(kept)]), coords=slide.coords[kept])


def _file_of(place: Path, slide_id: str, optional: bool = False) -> Path | None:
    path = place / f"{slide_id}{SUFFIX}" if place.is_dir() else place
    if path.exists():
        return path
    if optional:
        return None
    raise FileNotFoundError(f"{path}: no such file; export the outlines of slide {slide_id} from QuPath as GeoJSON")


def _inside(slide: SlideFeatures, path: Path, bounds: tuple[int, int]) -> Bool[np.ndarray, "N"]:
    """Patches inside any outline of a file. Raises ValueError for outlines that reach beyond the slide."""
    named = read_annotations(path, unclassified="outline").outlines
    polygons = [_shifted(polygon, bounds) for outlines in named.values() for polygon in outlines]
    if slide.width and slide.height and polygons:
        farthest = np.max([polygon.ring.max(0) for polygon in polygons], 0)
        if (farthest > np.array([slide.width, slide.height]) + max(slide.patch_size, 1)).any():
            x, y = farthest
            raise ValueError(
                f"{path}: its outlines reach to x, y = {x:.0f}, {y:.0f}, but slide {slide.slide_id} is {slide.width} x "
                f"{slide.height} pixels; pass outlines of this slide, in its level-0 pixels"
            )
    return patches_inside(polygons, slide.coords, slide.patch_size)


def _shifted(polygon: Polygon, bounds: tuple[int, int]) -> Polygon:
    return Polygon(polygon.ring + bounds, tuple(hole + bounds for hole in polygon.holes))
