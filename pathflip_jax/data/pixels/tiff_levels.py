"""Tiles and strips of a TIFF decoded by tifffile and imagecodecs, as 8-bit RGB.

Of files that OpenSlide opens, they have the pixels of OpenSlide, several times as fast: it composes each region through
cairo in 32 bits per pixel, while here the tiles under a region are decoded directly and the last ones kept. Of files
that it does not open or reads wrongly, they are the only pixels: planes of one colour each, more than 8 bits, strips.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import UInt8

from pathflip_jax.data.pixels.source import WHITE, DamagedPixels

_KEPT_BYTES = 32 << 20  # of decoded tiles, as in OpenSlide's cache
_BLOCK = 2048  # rows that one pass over a slide reads at a time; an untiled level keeps as many
_ROWS = 256  # of an uncompressed strip, read at a time
_JPEG, _UNCOMPRESSED = 7, 1
_CODECS = (_UNCOMPRESSED, 5, 8, 32946)  # uncompressed, LZW, deflate and its old number
_RGB, _YCBCR = 2, 6
_ASSOCIATED, _UNASSOCIATED = 1, 2  # kinds of alpha


class Level:
    """Level of a TIFF: one page, or one page for each of red, green and blue; `white` is the value of white.

    Its tiles are `across` x `down` pixels. A strip is a tile as wide as the level; of an uncompressed strip that is the
    whole level, `row_bytes` (else 0) are those of a row, and a tile is a few rows.
    """

    def __init__(self, pages: Sequence[tifffile.TiffPage | tifffile.TiffFrame], white: int = WHITE) -> None:
        self.pages, self.white, self.page = tuple(pages), white, pages[0].keyframe
        page = self.page
        self.size = page.imagewidth, page.imagelength
        self.across, self.down, self.row_bytes = page.tilewidth, page.tilelength, 0
        if not page.is_tiled:
            self.across, self.down = page.imagewidth, min(page.rowsperstrip, page.imagelength)
            plain = page.compression == _UNCOMPRESSED and page.predictor == 1 and page.bitspersample % 8 == 0
            if plain and self.down == page.imagelength:
                self.row_bytes = page.imagewidth * (page.bitspersample // 8) * self.channels
                self.down = min(_ROWS, self.down)

    @property
    def columns(self) -> int:
        """Tiles from left to right."""
        return -(-self.page.imagewidth // self.across)

    @property
    def rows(self) -> int:
        """Tiles, or strips, from top to bottom."""
        return -(-self.page.imagelength // self.down)

    @property
    def channels(self) -> int:
        """Values of a pixel that a tile holds."""
        return self.page.samplesperpixel if self.page.planarconfig == tifffile.PLANARCONFIG.CONTIG else 1

    def planes(self, index: int) -> Iterator[tuple[tifffile.TiffPage | tifffile.TiffFrame, int]]:
        """Page and number of each segment that holds a part of the colours of tile `index`."""
        if self.channels > 1:
            yield self.pages[0], index
        elif len(self.pages) > 1:
            yield from ((page, index) for page in self.pages)
        else:
            yield from ((self.pages[0], index + plane * self.rows * self.columns) for plane in range(3))


class TiffLevels:
    """Decoder of the levels of an open TIFF."""

    def __init__(self, file: tifffile.TiffFile, levels: Sequence[Level]) -> None:
        self._file, self._levels = file, tuple(levels)
        self._tiles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._kept, self._most = 0, _KEPT_BYTES
        for level in levels:
            if not level.page.is_tiled:  # a strip serves all blocks from left to right
                self._most = max(self._most, 3 * level.size[0] * min(level.size[1], _BLOCK + 2 * level.down))

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level, as `Decoder.read`."""
        layout = self._levels[level]
        across, down = layout.across, layout.down
        found = np.full((height, width, 3), WHITE, np.uint8)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, layout.size[0]), min(y + height, layout.size[1])
        if right <= left or bottom <= top:
            return found
        for row in range(top // down, -(-bottom // down)):
            for column in range(left // across, -(-right // across)):
                tile = self._tile(level, row * layout.columns + column)
                if tile is None:
                    continue
                x0, y0 = max(left, column * across), max(top, row * down)
                x1, y1 = min(right, (column + 1) * across), min(bottom, (row + 1) * down)
                found[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - row * down : y1 - row * down, x0 - column * across : x1 - column * across
                ]
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _tile(self, level: int, index: int) -> UInt8[np.ndarray, "t t 3"] | None:
        """Decoded tile of a level; None for one without data."""
        key = (level, index)
        if key in self._tiles:
            self._tiles.move_to_end(key)
            return self._tiles[key]
        layout = self._levels[level]
        planes = [self._segment(layout, page, number, index) for page, number in layout.planes(index)]
        if any(plane is None for plane in planes):
            return None
        tile = _rgb(planes[0] if len(planes) == 1 else np.concatenate(planes, -1), layout)
        self._tiles[key] = tile
        self._kept += tile.nbytes
        while self._kept > self._most and len(self._tiles) > 1:
            self._kept -= self._tiles.popitem(last=False)[1].nbytes
        return tile

    def _segment(
        self, layout: Level, page: tifffile.TiffPage | tifffile.TiffFrame, number: int, index: int
    ) -> np.ndarray | None:
        """Decoded values [h, w, channels] of a tile or strip; None for one without data."""
        if layout.row_bytes:
            return self._rows(layout, page, number, index)
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        if not count:
            return None
        data = self._bytes(offset, count, number)
        try:
            decoded, _, _ = page.keyframe.decode(data, number, jpegtables=page.jpegtables, _fullsize=True)
        except Exception as error:  # every codec raises its own
            raise DamagedPixels(f"tile {number} cannot be decoded: {error}") from error
        return decoded.reshape(decoded.shape[-3:])

    def _rows(self, layout: Level, page, number: int, index: int) -> np.ndarray | None:
        """Rows of an uncompressed strip that is the whole image, or a whole plane of it."""
        strip = (number - index) // (layout.rows * layout.columns)
        if not page.databytecounts[strip]:
            return None
        count = min(layout.down, layout.size[1] - index * layout.down)
        offset = page.dataoffsets[strip] + index * layout.down * layout.row_bytes
        data = self._bytes(offset, count * layout.row_bytes, index)
        kind = np.dtype(f"{self._file.byteorder}u{layout.page.bitspersample // 8}")
        return np.frombuffer(data, kind).reshape(count, layout.size[0], layout.channels)

    def _bytes(self, offset: int, count: int, number: int) -> bytes:
        handle = self._file.filehandle
        handle.seek(offset)
        data = handle.read(count)
        if len(data) < count:
            raise DamagedPixels(f"tile {number} is cut short")
        return data


def _rgb(values: np.ndarray, layout: Level) -> UInt8[np.ndarray, "h w 3"]:
    """Values of a tile as 8-bit RGB, on white where there is an alpha channel."""
    if values.dtype != np.uint8 or layout.white != WHITE:
        steps = np.arange(2 ** (8 * values.dtype.itemsize))
        values = np.round(np.minimum(steps / layout.white, 1) * WHITE).astype(np.uint8)[values]
    if values.shape[-1] == 3:
        return values
    alpha = layout.page.extrasamples[0] if layout.page.extrasamples else 0
    colour = values[..., :3]
    if alpha == _ASSOCIATED:
        return np.minimum(colour.astype(np.uint16) + (WHITE - values[..., 3:4]), WHITE).astype(np.uint8)
    if alpha == _UNASSOCIATED:
        cover = values[..., 3:4] / np.float32(WHITE)
        return np.round(colour * cover + WHITE * (1 - cover)).astype(np.uint8)
    return colour


def open_tiles(path: Path, sizes: Sequence[tuple[int, int]]) -> TiffLevels:
    """Decoder of a TIFF that OpenSlide opens, for its levels in their order and sizes (width, height).

    Raises ValueError, naming the reason, for a file that has not all of them as tiled RGB of 8 bits in JPEG, LZW,
    deflate or uncompressed, such as Aperio's SVS in JPEG and what tifffile, vips and QuPath write.
    """
    try:
        file = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError, ValueError) as error:
        raise ValueError(f"not a TIFF ({error})") from None
    try:
        pages = {(page.imagewidth, page.imagelength): page for page in reversed(list(_pages(file)))}
        return TiffLevels(file, [Level((_checked(pages.get(tuple(size)), size),)) for size in sizes])
    except ValueError:
        file.close()
        raise


def _pages(file: tifffile.TiffFile):
    for page in file.pages:
        yield page
        yield from (sub for sub in page.pages or () if isinstance(sub, tifffile.TiffPage))


def _checked(page: tifffile.TiffPage | None, size: tuple[int, int]) -> tifffile.TiffPage:
    if page is None:
        raise ValueError(f"no page of {size[0]} x {size[1]} pixels")
    planes = page.samplesperpixel, page.planarconfig, page.bitspersample
    if not page.is_tiled or planes != (3, tifffile.PLANARCONFIG.CONTIG, 8):
        raise ValueError(f"the page of {size[0]} x {size[1]} pixels is not tiled RGB of 8 bits")
    if not (page.compression == _JPEG and page.photometric in (_RGB, _YCBCR)) and not (
        page.compression in _CODECS and page.photometric == _RGB
    ):
        raise ValueError(f"its tiles are compressed in another way than JPEG, LZW or deflate ({page.compression!s})")
    return page
