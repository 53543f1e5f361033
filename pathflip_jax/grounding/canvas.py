"""Backgrounds of heatmaps: thumbnails of slide files, or white where there is none."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from pathflip_jax.data.readers import guarded

SLIDE_PIXELS = "pathflip_jax.data.readers.slide_pixels"  # imported by the process that reads slide files


PANEL = 2.7  # inches across a heatmap of a figure
DPI = 150  # of a figure
FLATTEST, TALLEST = 0.4, 2.2  # height of a heatmap, in its widths


class Canvas(NamedTuple):
    """Background of a heatmap: an image, and the position of its pixels on the slide (level 0)."""

    picture: UInt8[np.ndarray, "h w 3"]
    origin: tuple[float, float]
    downsample: float


def read_thumbnail(path, pixels: int = 1024) -> Canvas:
    """Read a slide file as an image of at most `pixels` on its longer side, on the slide's background colour."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such slide file")
    facts, arrays = guarded.parse(f"{SLIDE_PIXELS}:thumbnail", path, pixels, memory=guarded.SLIDE_MEMORY)
    picture = arrays["picture"]
    return Canvas(picture, (0.0, 0.0), facts["width"] / picture.shape[1])


def panel_pixels(width: float, height: float) -> int:
    """Longer side, in pixels of the figure, of the heatmap of a slide of this size: the resolution that it can show."""
    return round(PANEL * DPI * max(min(height / width, TALLEST), 1))


def blank_canvas(coords: Int[np.ndarray, "N 2"], patch_size: float, width=0, height=0, pixels: int = 1024) -> Canvas:
    """White canvas for a slide without a slide file: the whole slide when its size is known, else its patches."""
    if width and height:
        low, high = np.zeros(2), np.array([width, height], float)
    else:
        low, high = coords.min(0) - float(patch_size), coords.max(0) + 2.0 * patch_size
    downsample = max((high - low).max() / pixels, 1e-6)
    columns, rows = np.maximum(np.ceil((high - low) / downsample).astype(int), 1)
    return Canvas(np.full((rows, columns, 3), 255, np.uint8), (float(low[0]), float(low[1])), float(downsample))


def canvas_of(slide, image=None) -> Canvas:
    """Thumbnail of the slide file `image`, or without one a white canvas for `slide`, features or a `Grounding`."""
    if image is None:
        return blank_canvas(slide.coords, slide.patch_size, slide.width, slide.height)
    return read_thumbnail(image)
