"""Tissue masks beside the records, for review: `OUT/tissue/<slide>.geojson`, which QuPath opens, and `<slide>.png`.

The GeoJSON holds the mask that tiling used, pixel by pixel: its outlines separate the centres of the mask's pixels. The
PNG is a thumbnail of the slide with these outlines.
"""

import io
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from data_prep.slides import Slide
from data_prep.tissue_mask import Tissue
from pathflip_jax.data.readers.outlines import Polygon, as_collection, trace
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, make_folder, read_bytes, remove

FOLDER = "tissue"
CLASS = "Tissue"
FACTS = "pathflip"  # member of the collection, which QuPath ignores
_LINE, _LINE_PX = (0, 160, 70), 2  # green is the colour that neither stain has


class MaskFacts(NamedTuple):
    """Facts of a mask: the slide's size and mpp, the mask's downsample, its share of the slide, and its origin."""

    width: int
    height: int
    mpp: float
    downsample: float
    share: float
    found_by: str


def mask_files(out: Place, slide_id: str) -> tuple[Place, Place]:
    """Paths of a slide's outlines and picture in a folder of records."""
    return out / FOLDER / f"{slide_id}.geojson", out / FOLDER / f"{slide_id}.png"


def write_mask(out: Place, slide_id: str, slide: Slide, tissue: Tissue) -> None:
    """Write the mask of a slide beside the records, each file atomically."""
    outlines, picture = mask_files(out, slide_id)
    make_folder(outlines.parent)
    polygons = _polygons(tissue, slide.width, slide.height)
    share = min(1.0, float(tissue.mask.sum()) * tissue.downsample**2 / (slide.width * slide.height))
    facts = MaskFacts(slide.width, slide.height, slide.mpp, float(tissue.downsample), share, tissue.found_by)
    with atomic_file(outlines) as file:
        file.write(json.dumps(as_collection({CLASS: polygons}) | {FACTS: facts._asdict()}).encode())
    data = io.BytesIO()
    _outlined(tissue.picture, polygons, slide.width, slide.height).save(data, "PNG", optimize=True)
    with atomic_file(picture) as file:
        file.write(data.getvalue())


def read_facts(out: Place, slide_id: str) -> MaskFacts | None:
    """Facts of a slide's mask in a folder of records; None without a mask, or with one made elsewhere."""
    path, _ = mask_files(out, slide_id)
    try:
        found: Any = json.loads(read_bytes(path))
        return MaskFacts(**found[FACTS])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # replaced by hand
        return None


def remove_masks(out: Place, slides: Iterable[str]) -> None:
    """Delete the masks of slides that have left the records."""
    for slide in slides:
        for path in mask_files(out, slide):
            remove(path)


def _polygons(tissue: Tissue, width: int, height: int) -> list[Polygon]:
    """Outlines of a mask in level-0 pixels, which end at the slide's border."""

    def placed(ring: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
        return np.round(np.clip(_corners(ring), 0, (width, height)), 2)

    found = trace(tissue.mask, np.zeros(2), tissue.downsample)
    return [Polygon(placed(polygon.ring), tuple(map(placed, polygon.holes))) for polygon in found]


def _corners(ring: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """Closed ring without the points on its straight parts."""
    points = ring[:-1]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    turns = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-6 * np.abs(after).max() ** 2
    kept = points[turns]
    return np.concatenate([kept, kept[:1]])


def _outlined(picture: np.ndarray, polygons: Iterable[Polygon], width: int, height: int) -> Image.Image:
    """Thumbnail with outlines."""
    image = Image.fromarray(picture)
    draw, scale = ImageDraw.Draw(image), np.array(image.size) / [width, height]
    for polygon in polygons:
        for ring in (polygon.ring, *polygon.holes):
            draw.line((ring * scale).ravel().tolist(), fill=_LINE, width=_LINE_PX, joint="curve")
    return image
