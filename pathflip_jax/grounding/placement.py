"""Checks that patches lie within their slide: coordinates of another level or slide are detected before drawing."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.readers import guarded


class Measures(NamedTuple):
    """Size of a slide file at level 0, its mpp (0: unknown), and the top-left corner of its non-empty bounds."""

    width: int
    height: int
    mpp: float
    bounds: tuple[int, int]


def read_measures(path) -> Measures:
    """Read the measures of a slide file. Raises OSError or ValueError, naming the file, if it is not a slide."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such slide file")
    facts, _ = guarded.parse("pathflip_jax.data.readers.slide_pixels:measures", path, memory=guarded.SLIDE_MEMORY)
    return Measures(facts["width"], facts["height"], facts["mpp"], tuple(facts["bounds"]))


def check_on_slide(slide, width: int, height: int, source: str) -> None:
    """Raise ValueError if patches of `slide` (features or grounding) lie entirely outside `width` x `height` pixels.

    A patch that is only partly outside is valid, because some tools pad the last row and column.
    """
    coords, size = np.asarray(slide.coords, np.int64), max(slide.patch_size, 1)
    beyond = ((coords >= (width, height)) | (coords + size <= 0)).any(1)
    if beyond.any():
        x, y = coords[beyond][0]
        raise ValueError(
            f"slide {slide.slide_id}: {beyond.sum()} of {len(coords)} patches lie outside the slide, for example at "
            f"({x}, {y}), while {source} is {width} x {height} pixels. Coordinates must be level-0 pixels of this "
            "slide; check whether the features come from another file or another level, and extract them again"
        )


def check_same_slide(slide, measures: Measures, path) -> None:
    """Raise ValueError if a slide file and the features' slide differ in size, or patches lie outside it."""
    differ = max(abs(slide.width - measures.width), abs(slide.height - measures.height))
    if slide.width and slide.height and differ > max(slide.patch_size, 1):
        raise ValueError(
            f"{path}: {measures.width} x {measures.height} pixels, but the features of slide {slide.slide_id} come "
            f"from a slide of {slide.width} x {slide.height} pixels, which is another slide or another export of this "
            "one; pass the slide file from which the features were extracted"
        )
    check_on_slide(slide, measures.width, measures.height, str(path))
