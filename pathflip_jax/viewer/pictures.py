"""Tiles and thumbnails of slide files, read in worker processes, because a broken file may crash its reader.

The file is checked on disk at every request, so that a slide that is deleted while shown is reported immediately, and a
replaced one is read again rather than shown from the cache. Labels, macro images and scanner properties are never read,
because they can identify the patient.
"""

import io
import os
import queue
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pathflip_jax.data.readers import guarded
from pathflip_jax.runtime.limits import processors
from pathflip_jax.viewer.cache import Cache

READERS = min(4, processors())  # worker processes
CACHE_BYTES = 256 * 2**20  # of tiles and thumbnails
THUMBNAIL = 256  # longer side, in pixels
QUALITY = 82  # JPEG quality of tiles and thumbnails
SOURCE = "pathflip_jax.data.readers.slide_pixels"


class Pyramid(NamedTuple):
    """Slide as Deep Zoom tiles: its measures (as `grounding.placement.Measures`), levels, and tile layout."""

    width: int
    height: int
    mpp: float
    bounds: tuple[int, int]
    levels: int
    tile: int
    overlap: int

    def size(self, level: int) -> tuple[int, int]:
        """Size of a level in pixels; the last level is the slide's level 0."""
        step = 2 ** (self.levels - 1 - level)
        return -(-self.width // step), -(-self.height // step)

    def tiles(self, level: int) -> tuple[int, int]:
        """Number of tiles of a level across and down."""
        width, height = self.size(level)
        return -(-width // self.tile), -(-height // self.tile)


class Pictures:
    """Reader of slide files with `readers` worker processes, usable from any number of threads."""

    def __init__(self, readers: int = READERS, cache_bytes: int = CACHE_BYTES) -> None:
        self._readers: queue.SimpleQueue[guarded.Reader] = queue.SimpleQueue()
        for _ in range(readers):
            self._readers.put(guarded.Reader())
        self._cache = Cache(cache_bytes, lambda value: len(value) if isinstance(value, bytes) else 1)

    def pyramid(self, path: Path) -> Pyramid:
        """Pyramid of a slide. Raises ValueError or OSError, naming the file, if it cannot be read."""
        return self._cached(path, ("pyramid",), lambda: Pyramid(**self._parse("pyramid", path)[0]))

    def tile(self, path: Path, level: int, column: int, row: int, quality: int = QUALITY) -> bytes:
        """One tile as JPEG. Raises IndexError for a tile outside the slide, else as `pyramid`."""
        pyramid = self.pyramid(path)
        if not 0 <= level < pyramid.levels:
            raise IndexError(f"{path.name}: no level {level}; expected 0 to {pyramid.levels - 1}")
        across, down = pyramid.tiles(level)
        if not (0 <= column < across and 0 <= row < down):
            raise IndexError(
                f"{path.name}: no tile {column}, {row} in level {level}, which has {across} x {down} tiles"
            )

        def make() -> bytes:
            return self._parse("tile", path, level, column, row, quality)[1]["jpeg"].tobytes()

        return self._cached(path, (level, column, row, quality), make)

    def thumbnail(self, path: Path) -> bytes:
        """Thumbnail of the whole slide as JPEG."""

        def make() -> bytes:
            picture = Image.fromarray(self._parse("thumbnail", path, THUMBNAIL)[1]["picture"])
            with io.BytesIO() as out:
                picture.save(out, "JPEG", quality=QUALITY)
                return out.getvalue()

        return self._cached(path, ("thumbnail",), make)

    def _cached(self, path: Path, what: tuple, make) -> Any:
        try:
            state = os.stat(path)
        except FileNotFoundError:
            cure = "restore it, or restart without it"
            raise FileNotFoundError(f"{path.name}: the slide file no longer exists; {cure}") from None
        return self._cache.get((path, state.st_mtime_ns, state.st_size, *what), make)

    def _parse(self, function: str, path: Path, *arguments: Any) -> guarded.Parsed:
        reader = self._readers.get()
        try:
            return reader.parse(f"{SOURCE}:{function}", path, *arguments, memory=guarded.SLIDE_MEMORY)
        except (ValueError, OSError) as error:  # names the file without its folder, which the page must not show
            raise type(error)(str(error).replace(str(path), path.name)) from None
        finally:
            self._readers.put(reader)

    def close(self) -> None:
        """End the worker processes."""
        while not self._readers.empty():
            self._readers.get().stop()
