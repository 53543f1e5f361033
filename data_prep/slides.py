"""Open slides: pixels, size and resolution, with warnings about files that are not H&E slides."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import Image

from data_prep.brightfield import check_brightfield
from data_prep.resolution import find_resolution
from data_prep.tiff_tiles import DamagedTile, TiffTiles
from pathflip_jax.runtime import workers

# Time limit for opening a slide or reading one block, in a worker process: OpenSlide may hang on a broken slide.
_READ_SECONDS, _READ_BYTES = 300.0, 2 * 2**30
READERS = ("openslide", "tifffile")
_OFF_PIXEL = 1e-3  # pixels of a level
BLOCK = 2048  # pixels of the read level on a side: 16 MB, and its tiles fit in OpenSlide's cache of 32


@dataclass(frozen=True)
class Slide:
    """Open slide: its file, its size in level-0 pixels and `mpp`, micrometres per level-0 pixel.

    `source` is the origin of `mpp`, `notes` are for the user; `tiles` decodes the pixels where it is given, else
    OpenSlide does. A context manager; `read` turns exceptions of the readers into errors that name the file.
    """

    path: Path
    image: openslide.OpenSlide
    width: int
    height: int
    mpp: float
    source: str = ""
    notes: tuple[str, ...] = ()
    tiles: TiffTiles | None = None

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.image.close()
        if self.tiles is not None:
            self.tiles.close()

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Read pixels of a level; x, y at level 0, width and height in its pixels. Areas outside the slide are white.

        Raises OSError for damaged pixels.
        """
        scale = self.image.level_downsamples[level]
        column, row = round(x / scale), round(y / scale)
        on_pixel = max(abs(column - x / scale), abs(row - y / scale)) < _OFF_PIXEL
        try:
            with workers.limits(_READ_SECONDS, _READ_BYTES):
                if self.tiles is not None and on_pixel:  # between two pixels OpenSlide interpolates
                    return self.tiles.read(column, row, level, width, height)
                image = self.image.read_region((x, y), level, (width, height))
        except (openslide.OpenSlideError, DamagedTile) as error:
            raise OSError(
                f"{self.path}: its pixels cannot be read ({error}, at {x}, {y}, level {level}); the file is damaged or "
                "truncated: copy it again"
            ) from None
        colour, pixels = np.asarray(image.convert("RGB")), np.asarray(image)
        if pixels.view("<u4").min() < 255 << 24:  # four bytes as one number, alpha highest: ten times as fast
            clear = pixels[..., 3] != 255
            cover = pixels[clear][:, 3:] / np.float32(255)
            colour = colour.copy()
            colour[clear] = np.round(colour[clear] * cover + 255 * (1 - cover))
        return colour


def open_slide(
    path: Path | str, assume_mpp: float | None = None, override_mpp: float | None = None, reader: str = READERS[0]
) -> Slide:
    """Open a brightfield slide that OpenSlide reads, with pixels decoded by one of `READERS`.

    The reader tifffile is for tiled TIFF (`TiffTiles`); of other files OpenSlide decodes the pixels, as a note says.

    `assume_mpp` is the level-0 resolution where the file does not state it, `override_mpp` overrides the file. Without
    either, the nominal resolution of the objective power (20x is 0.5) is taken. Raises FileNotFoundError; OSError for a
    file that does not open; ValueError for fluorescence and the like, and where the resolution is missing, absurd or in
    doubt (`find_resolution`).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such slide")
    try:
        with workers.limits(_READ_SECONDS, _READ_BYTES):
            image = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise OSError(
            f"{path}: OpenSlide cannot open it ({error}); expected a complete whole slide image. Convert "
            "other formats to a tiled TIFF, for example `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`"
        ) from None
    try:
        with workers.limits(_READ_SECONDS, _READ_BYTES):
            check_brightfield(path, image.properties, image.dimensions)
        found = find_resolution(path, image.properties, image.dimensions, assume_mpp, override_mpp)
    except ValueError:
        image.close()
        raise
    tiles, notes = None, found.notes
    if reader == "tifffile":
        try:
            tiles = TiffTiles(path, image.level_dimensions)
        except ValueError as error:
            notes += (f"decoded by OpenSlide instead of tifffile: {error}",)
    return Slide(path, image, *image.dimensions, found.mpp, found.source, notes, tiles)


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
