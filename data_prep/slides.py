"""Open slides: pixels, size and resolution, with warnings about files that are not H&E slides."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import Image

from data_prep.brightfield import check_brightfield
from data_prep.colour_profile import ToSrgb
from data_prep.resolution import find_resolution
from pathflip_jax.data.pixels.reader_names import READERS
from pathflip_jax.data.pixels.source import DamagedPixels, PixelSource, Unreadable
from pathflip_jax.data.pixels.sources import open_source
from pathflip_jax.runtime import workers

# Time limit for opening a slide or reading one block, in a worker process: OpenSlide may hang on a broken slide.
_READ_SECONDS, _READ_BYTES = 300.0, 2 * 2**30
BLOCK = 2048  # pixels of the read level on a side: 16 MB, and its tiles fit in OpenSlide's cache of 32


@dataclass(frozen=True)
class Slide:
    """Open slide: its file, its size in level-0 pixels and `mpp`, micrometres per level-0 pixel.

    `source` is the origin of `mpp`, `notes` are for the user; `to_srgb` converts the pixels of patches where it is
    given. A context manager; `read` turns exceptions of the readers into errors that name the file.
    """

    path: Path
    image: PixelSource
    width: int
    height: int
    mpp: float
    source: str = ""
    notes: tuple[str, ...] = ()
    to_srgb: ToSrgb | None = None

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.image.close()

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Read pixels of a level; x, y at level 0, width and height in its pixels. Areas outside the slide are white.

        Raises OSError for damaged pixels.
        """
        try:
            with workers.limits(_READ_SECONDS, _READ_BYTES):
                return self.image.read(x, y, level, width, height)
        except (openslide.OpenSlideError, DamagedPixels) as error:
            raise OSError(
                f"{self.path}: its pixels cannot be read ({error}, at {x}, {y}, level {level}); the file is damaged or "
                "truncated: copy it again"
            ) from None


def open_slide(
    path: Path | str,
    assume_mpp: float | None = None,
    override_mpp: float | None = None,
    reader: str = READERS[0],
    icc: bool = False,
) -> Slide:
    """Open a brightfield slide, or the folder of a DICOM series, with pixels decoded by one of `READERS`.

    What OpenSlide does not read is decoded by the reader for its content, and what the reader does not decode by
    OpenSlide, as a note says (`open_source`).

    `assume_mpp` is the level-0 resolution where the file does not state it, `override_mpp` overrides the file. Without
    either, the nominal resolution of the objective power (20x is 0.5) is taken. With `icc` the slide's colour profile
    is applied to the pixels of patches. Raises FileNotFoundError; OSError for a file that does not open; ValueError for
    fluorescence and the like, and where the resolution is missing, absurd or in doubt (`find_resolution`) or the colour
    profile is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such slide")
    try:
        with workers.limits(_READ_SECONDS, _READ_BYTES):
            image = open_source(path, reader)
    except Unreadable as error:
        raise OSError(f"{path}: {error}") from None
    try:
        with workers.limits(_READ_SECONDS, _READ_BYTES):
            check_brightfield(path, image.properties, image.fault)
        found = find_resolution(path, image.properties, image.dimensions, assume_mpp, override_mpp)
        profile = image.profile if icc else None
        to_srgb = ToSrgb(path, profile) if profile else None
    except (ValueError, openslide.OpenSlideError):
        image.close()
        raise
    notes = found.notes + image.notes
    if icc and to_srgb is None:
        notes += ("no colour profile: its colours are taken for sRGB",)
    return Slide(path, image, *image.dimensions, found.mpp, found.source, notes, to_srgb)


def averaged(
    slide: Slide, level: int, step: int, start: tuple[int, int], end: tuple[int, int]
) -> Iterator[tuple[slice, slice, UInt8[np.ndarray, "h w 3"]]]:
    """Rectangle of a level, averaged over squares of `step` pixels, in blocks of bounded size.

    `start` and `end` are x, y in the level's pixels. Yields rows, columns and content of each block of the averaged
    rectangle.
    """
    scale, block = slide.image.level_downsamples[level], max(step, BLOCK // step * step)
    for top in range(start[1], end[1], block):
        for left in range(start[0], end[0], block):
            width, height = min(block, end[0] - left), min(block, end[1] - top)
            pixels = slide.read(round(left * scale), round(top * scale), level, width, height)
            pixels = np.asarray(Image.fromarray(pixels).reduce(step))
            row, column = (top - start[1]) // step, (left - start[0]) // step
            yield slice(row, row + len(pixels)), slice(column, column + pixels.shape[1]), pixels
