"""Open slide as a source of pixels: the part of OpenSlide's interface that all readers share, and its two forms.

Levels, coordinates and property names are OpenSlide's. `OpenSlideSource` is a slide that OpenSlide opens, whose pixels
another decoder may read; `LevelSource` is one that OpenSlide does not open, or whose colours it does not read.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import Image

WHITE = 255
_OFF_PIXEL = 1e-3  # pixels of a level


class DamagedPixels(Exception):
    """Tile, strip or frame that cannot be read or decoded."""


class Unreadable(ValueError):
    """Reason, with the cure, that a file cannot be read as a slide; without the file's name."""


class Decoder(Protocol):
    """Decoder of the levels of one file."""

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level; x, y, width and height in its pixels. Areas outside, and empty tiles, are white.

        Raises DamagedPixels.
        """

    def close(self) -> None:
        """Close the file."""


class PixelSource(Protocol):
    """Open slide. `reader` is the name of what decodes its pixels, `notes` are for the user.

    `fault` is the pixel format of a file that is not 8-bit RGB brightfield, of which the pixels are not those of H&E;
    "" for a slide.
    """

    reader: str
    notes: tuple[str, ...]
    fault: str

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0."""

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level, from the largest."""

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 pixels for each pixel of a level, along a side."""

    @property
    def properties(self) -> Mapping[str, str]:
        """Metadata by OpenSlide's names."""

    @property
    def profile(self) -> bytes | None:
        """ICC profile of the slide's colours, None for a slide without one."""

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """Lowest-resolution level that has at least the resolution of a downsample."""

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level; x, y at level 0, width and height in its pixels. Areas outside the slide are white.

        Raises DamagedPixels or openslide.OpenSlideError.
        """

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """The same as RGBA, of which areas outside the slide may be transparent."""

    def get_thumbnail(self, size: tuple[int, int]) -> Image.Image:
        """The whole slide, reduced to fit into a size."""

    def close(self) -> None:
        """Close the file."""


class OpenSlideSource(openslide.OpenSlide):
    """Slide that OpenSlide opens; `read` uses `decoder` where one is set, with the same pixels."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.reader, self.notes, self.fault = "openslide", (), ""
        self.decoder: Decoder | None = None

    @property
    def profile(self) -> bytes | None:
        """ICC profile of the slide's colours, which OpenSlide gives with pixels. Raises openslide.OpenSlideError."""
        return self.read_region((0, 0), self.level_count - 1, (1, 1)).info.get("icc_profile")

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level on white, as `PixelSource.read`."""
        if self.decoder is not None:
            scale = self.level_downsamples[level]
            column, row = round(x / scale), round(y / scale)
            if max(abs(column - x / scale), abs(row - y / scale)) < _OFF_PIXEL:  # between pixels OpenSlide interpolates
                return self.decoder.read(column, row, level, width, height)
        image = self.read_region((x, y), level, (width, height))
        colour, pixels = np.asarray(image.convert("RGB")), np.asarray(image)
        if pixels.view("<u4").min() < 255 << 24:  # four bytes as one number, alpha highest: ten times as fast
            clear = pixels[..., 3] != 255
            cover = pixels[clear][:, 3:] / np.float32(255)
            colour = colour.copy()
            colour[clear] = np.round(colour[clear] * cover + 255 * (1 - cover))
        return colour

    def close(self) -> None:
        """Close the file."""
        if self.decoder is not None:
            self.decoder.close()
        super().close()


class LevelSource(openslide.AbstractSlide):
    """Slide of a decoder's levels, whose sizes (width, height) are `sizes`, from the largest.

    Reads between two pixels of a level take the nearest ones.
    """

    def __init__(
        self,
        reader: str,
        decoder: Decoder,
        sizes: Sequence[tuple[int, int]],
        properties: Mapping[str, str],
        profile: bytes | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.reader, self.notes, self.fault = reader, notes, ""
        self._decoder, self._sizes, self._properties, self._profile = decoder, tuple(sizes), properties, profile

    @classmethod
    def detect_format(cls, filename) -> str | None:
        """None: formats are told apart by `open_source`."""
        return None

    @property
    def profile(self) -> bytes | None:
        """ICC profile of the slide's colours."""
        return self._profile

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return len(self._sizes)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level."""
        return self._sizes

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 pixels for each pixel of a level: the mean of both sides, as OpenSlide takes it."""
        width, height = self._sizes[0]
        return tuple((width / across + height / down) / 2 for across, down in self._sizes)

    @property
    def properties(self) -> Mapping[str, str]:
        """Metadata by OpenSlide's names."""
        return self._properties

    @property
    def associated_images(self) -> Mapping[str, Image.Image]:
        """None: labels and macro images are never read."""
        return {}

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """Lowest-resolution level that has at least the resolution of a downsample."""
        return max((level for level, own in enumerate(self.level_downsamples) if own <= downsample), default=0)

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level on white, as `PixelSource.read`."""
        scale = self.level_downsamples[level]
        return self._decoder.read(round(x / scale), round(y / scale), level, width, height)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """The same as opaque RGBA."""
        return Image.fromarray(self.read(*location, level, *size)).convert("RGBA")

    def close(self) -> None:
        """Close the file."""
        self._decoder.close()
