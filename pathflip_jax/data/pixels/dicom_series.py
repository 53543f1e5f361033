"""Files of a DICOM series of a slide, and what is missing of it."""

from collections.abc import Sequence
from pathlib import Path

from pathflip_jax.data.pixels.dicom_headers import Instance, read_instance
from pathflip_jax.data.pixels.source import Unreadable
from pathflip_jax.data.storage.failures import preview

_VOLUME, _RESAMPLED = "VOLUME", "RESAMPLED"
_CURE = "copy all files of the series into the folder, or leave the slide out"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def series_of(path: Path) -> list[Instance]:
    """Images of the series that a file belongs to, or that a folder holds, in the order of their names.

    They are those of the file's folder. Raises Unreadable for a folder without whole slide images, or with several
    series.
    """
    folder = path if path.is_dir() else path.parent
    instances = [found for file in sorted(folder.iterdir()) if (found := _instance(file))]
    if not path.is_dir():
        own = read_instance(path)
        if own is None or not own.header.series:
            return [own] if own else []
        return [one for one in instances if one.header.series == own.header.series]
    slides = [one for one in instances if one.header.is_slide]
    series = sorted({one.header.series for one in slides})
    if not series:
        raise Unreadable("a folder without DICOM whole slide images; pass a slide file, or the folder of a series")
    if len(series) > 1:
        raise Unreadable(f"a folder of {len(series)} DICOM series; pass a file of one, such as {slides[0].path.name}")
    return slides


def check_complete(series: Sequence[Instance]) -> None:
    """Raise Unreadable for a series without its full resolution, or with missing parts of a level, with the cure."""
    volume = [one for one in series if one.flavour == _VOLUME]
    if not volume:
        if flavours := sorted({one.flavour.lower() for one in series} - {""}):
            raise Unreadable(f"a DICOM series of {preview(flavours)} images, without the slide itself; {_CURE}")
        return
    for level in _levels(volume):
        _check_level(level)
    first = max(volume, key=lambda one: one.size)
    if first.kind[3:4] == (_RESAMPLED,):
        width, height = first.size
        raise Unreadable(
            f"a DICOM series without its full resolution: the largest level here, {width} x {height} pixels, is "
            f"resampled from a larger one; {_CURE}"
        )


def volume_file(series: Sequence[Instance]) -> Path:
    """File of the largest level of a series."""
    return max(series, key=lambda one: (one.flavour == _VOLUME, one.size)).path


def _instance(path: Path) -> Instance | None:
    try:
        return read_instance(path) if path.is_file() else None
    except OSError:  # OpenSlide passes over it, too
        return None


def _levels(volume: Sequence[Instance]) -> list[list[Instance]]:
    """Files of each level: one, or the parts of a concatenation."""
    found: dict[str, list[Instance]] = {}
    for one in volume:
        found.setdefault(one.concatenation or str(one.path), []).append(one)
    return list(found.values())


def _check_level(level: Sequence[Instance]) -> None:
    (width, height), (across, down) = level[0].size, level[0].tile
    place = f"the level of {width} x {height} pixels"
    if level[0].concatenation:
        total = max(max(one.parts, one.part) for one in level)
        absent = sorted(set(range(1, total + 1)) - {one.part for one in level})
        if absent:
            parts = preview([str(number) for number in absent])
            raise Unreadable(f"an incomplete DICOM series: {place} lacks part {parts} of {total}; {_CURE}")
    if level[0].is_full and across and down:
        needed, frames = -(-width // across) * -(-height // down), sum(max(one.frames, 1) for one in level)
        if frames < needed:
            raise Unreadable(f"an incomplete DICOM series: {place} has {frames} of {needed} tiles; {_CURE}")
