"""Tiles of a pyramidal TIFF decoded by tifffile and imagecodecs: the pixels of OpenSlide, several times as fast.

OpenSlide composes each region through cairo in 32 bits per pixel. Here the tiles under a region are decoded directly,
and the last ones kept. For files whose levels are tiled RGB of 8 bits in JPEG, LZW, deflate or uncompressed, such as
Aperio's SVS in JPEG and what tifffile, vips and QuPath write; the others stay with OpenSlide.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import UInt8

_KEPT_BYTES = 32 << 20  # of decoded tiles, as in OpenSlide's cache
_JPEG = 7
_CODECS = (1, 5, 8, 32946)  # uncompressed, LZW, deflate and its old number
_RGB, _YCBCR = 2, 6
WHITE = 255


class DamagedTile(Exception):
    """Tile that cannot be read or decoded."""


class TiffTiles:
    """Levels of an open TIFF, in the order and with the sizes (width, height) of `levels`.

    Raises ValueError, naming the reason, for a file that has not all of them as tiled RGB of 8 bits.
    """

    def __init__(self, path: Path, levels: Sequence[tuple[int, int]]) -> None:
        try:
            self._file = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, OSError, ValueError) as error:
            raise ValueError(f"not a TIFF ({error})") from None
        try:
            pages = {(page.imagewidth, page.imagelength): page for page in reversed(list(_pages(self._file)))}
            self._pages = [_checked(pages.get(tuple(size)), size) for size in levels]
        except ValueError:
            self.close()
            raise
        self._tiles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._kept = 0

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level; x, y, width and height in its pixels. Areas outside, and empty tiles, are white.

        Raises DamagedTile.
        """
        page = self._pages[level]
        across, down = page.tilewidth, page.tilelength
        found = np.full((height, width, 3), WHITE, np.uint8)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, page.imagewidth), min(y + height, page.imagelength)
        if right <= left or bottom <= top:
            return found
        for row in range(top // down, -(-bottom // down)):
            for column in range(left // across, -(-right // across)):
                tile = self._tile(level, row * -(-page.imagewidth // across) + column)
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
        page = self._pages[level]
        count = page.databytecounts[index]
        if not count:
            return None
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(count)
        if len(data) < count:
            raise DamagedTile(f"tile {index} is cut short")
        try:
            decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables, _fullsize=True)
        except Exception as error:  # every codec raises its own
            raise DamagedTile(f"tile {index} cannot be decoded: {error}") from error
        tile = decoded.reshape(decoded.shape[-3:])
        self._tiles[key] = tile
        self._kept += tile.nbytes
        while self._kept > _KEPT_BYTES and len(self._tiles) > 1:
            self._kept -= self._tiles.popitem(last=False)[1].nbytes
        return tile


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
