"""Table of the readers of slides, and the choice of one by the content of a file.

OpenSlide reads what it opens as RGB. Other TIFF goes to tifffile, other DICOM to wsidicom. A reader asked for by name
decodes the pixels of files of its kind that OpenSlide opens, too: the same pixels, by another way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import openslide

from pathflip_jax.data.pixels.dicom_levels import open_dicom, open_frames
from pathflip_jax.data.pixels.dicom_series import check_complete, is_dicom, series_of, volume_file
from pathflip_jax.data.pixels.file_kinds import describe
from pathflip_jax.data.pixels.reader_names import READERS
from pathflip_jax.data.pixels.source import Decoder, LevelSource, OpenSlideSource, PixelSource, Unreadable
from pathflip_jax.data.pixels.tiff_format import open_tiff, tiff_fault
from pathflip_jax.data.pixels.tiff_levels import open_tiles

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class _Reader(NamedTuple):
    """Reader of a kind of files: whether a file is of it, and how it is opened without and with OpenSlide."""

    accepts: Callable[[Path], bool]
    open: Callable[[Path], LevelSource]
    decode: Callable[[Path, Sequence[tuple[int, int]]], Decoder]


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF


_READERS = {  # beside OpenSlide
    "tifffile": _Reader(_is_tiff, open_tiff, open_tiles),
    "wsidicom": _Reader(is_dicom, open_dicom, open_frames),
}


def open_source(path: Path, reader: str = READERS[0]) -> PixelSource:
    """Open a slide, or the folder of a DICOM series, with pixels decoded by one of `READERS`.

    The reader is for files of its kind; OpenSlide decodes the others that it opens, as a note says. A source with a
    `fault` has pixels, but not those of an RGB slide. Raises Unreadable for what is no slide, or an incomplete one;
    OSError where the file cannot be read.
    """
    series = series_of(path) if path.is_dir() or is_dicom(path) else []
    if any(one.header.is_slide for one in series):
        check_complete(series)
        path = volume_file(series)
    own = next((name for name, one in _READERS.items() if one.accepts(path)), "")
    try:
        source = OpenSlideSource(path)
    except openslide.OpenSlideError as error:
        return _open_other(path, own, error)
    source.fault = tiff_fault(path, source.properties, source.dimensions)
    if source.fault and own:
        try:
            other = _READERS[own].open(path)
        except Unreadable:
            return source
        source.close()
        return other
    if reader != READERS[0]:
        _set_decoder(source, path, reader, own)
    return source


def _open_other(path: Path, own: str, error: Exception) -> PixelSource:
    """Source of a file that OpenSlide does not open."""
    reason = describe(path)
    if own and not reason:
        try:
            return _READERS[own].open(path)
        except Unreadable as why:
            reason = str(why)
    raise Unreadable(
        f"OpenSlide cannot open it ({error}); "
        + (
            reason
            or "expected a complete whole slide image. Convert other formats to a tiled TIFF, for example "
            "`vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`"
        )
    ) from None


def _set_decoder(source: OpenSlideSource, path: Path, reader: str, own: str) -> None:
    try:
        if reader != own:
            raise ValueError(f"not a {'TIFF' if reader == 'tifffile' else 'DICOM series'}")
        source.decoder = _READERS[reader].decode(path, source.level_dimensions)
        source.reader = reader
    except ValueError as error:
        source.notes = (f"decoded by OpenSlide instead of {reader}: {error}",)
