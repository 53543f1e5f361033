"""DICOM header elements that identify the slide of a file, and the image in it.

OpenSlide gives a header only after inspecting every other file of the folder; here a single header is parsed, up to the
size of the image. Nothing is imported for it: files are told apart before it is known which reader they need.
"""

import struct
from pathlib import Path
from typing import NamedTuple

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_IMPLICIT, _BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_CLASS, _SYNTAX, _SERIES, _CONTAINER = (2, 2), (2, 16), (0x20, 0x0E), (0x40, 0x512)
_TYPE, _MODALITY, _FRAMES, _ROWS, _COLUMNS = (8, 8), (8, 0x60), (0x28, 8), (0x28, 0x10), (0x28, 0x11)
_CONCATENATION, _PART, _PARTS, _TILING = (0x20, 0x9161), (0x20, 0x9162), (0x20, 0x9163), (0x20, 0x9311)
_WIDTH, _HEIGHT = (0x48, 6), (0x48, 7)
_TEXTS = (_CLASS, _SYNTAX, _SERIES, _CONTAINER, _TYPE, _MODALITY, _FRAMES, _CONCATENATION, _TILING)
_NUMBERS = (_ROWS, _COLUMNS, _PART, _PARTS, _WIDTH, _HEIGHT)
_HEAD = 1 << 17  # bytes: all of them come before any pixels, palette or colour profile
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED = 0xFFFFFFFF
_ENDS = ((0xFFFE, 0xE00D), (0xFFFE, 0xE0DD))  # of an item, of a sequence, of undefined length


class Header(NamedTuple):
    """Metadata of a DICOM file: its kind, its series and the identifier on the glass; "" for what it lacks."""

    kind: str
    series: str
    container: str

    @property
    def is_slide(self) -> bool:
        """Whether it is (a level of) a whole-slide image, not a radiograph, annotation or directory."""
        return self.kind == _WHOLE_SLIDE


class Instance(NamedTuple):
    """Image of a DICOM file: its header and size; 0 and "" for what it lacks.

    `kind` holds the values of ImageType, `tile` and `size` are (width, height). `part` of `parts` is the file's place
    in `concatenation`, a level divided over files.
    """

    path: Path
    header: Header
    syntax: str
    modality: str
    kind: tuple[str, ...]
    frames: int
    tile: tuple[int, int]
    size: tuple[int, int]
    is_full: bool
    concatenation: str
    part: int
    parts: int

    @property
    def flavour(self) -> str:
        """Kind of image: VOLUME for a level of the slide, else LABEL, OVERVIEW or THUMBNAIL."""
        return self.kind[2] if len(self.kind) > 2 else ""


def read_header(path: Path) -> Header | None:
    """Read the header of a DICOM file, None for any other file. Raises OSError where it cannot be read."""
    found = _read(path)
    return None if found is None else _header(found)


def read_instance(path: Path) -> Instance | None:
    """Read the facts about the image of a DICOM file, None for any other file. Raises OSError as `read_header`."""
    found = _read(path)
    if found is None:
        return None

    def number(tag: tuple[int, int]) -> int:
        text = str(found.get(tag, "")).strip()
        return int(text) if text.isdecimal() else 0

    return Instance(
        path,
        _header(found),
        syntax=found.get(_SYNTAX, ""),
        modality=found.get(_MODALITY, ""),
        kind=tuple(word.strip() for word in found.get(_TYPE, "").split("\\")),
        frames=number(_FRAMES),
        tile=(number(_COLUMNS), number(_ROWS)),
        size=(number(_WIDTH), number(_HEIGHT)),
        is_full=found.get(_TILING, "") == "TILED_FULL",
        concatenation=found.get(_CONCATENATION, ""),
        part=number(_PART),
        parts=number(_PARTS),
    )


def _header(found: dict[tuple[int, int], str]) -> Header:
    return Header(found.get(_CLASS, ""), found.get(_SERIES, ""), found.get(_CONTAINER, ""))


def _read(path: Path) -> dict[tuple[int, int], str] | None:
    """Values of a DICOM file by their tags, as text; None for any other file."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
        head = file.read(_HEAD)
    found: dict[tuple[int, int], str] = {}
    try:
        _parse(head, found)
    except struct.error:  # the end of the bytes read, or of a truncated file
        pass
    return found


def _parse(head: bytes, found: dict[tuple[int, int], str]) -> None:
    """Parse the top-level elements, from the file's meta information to the size of a slide."""
    at, depth = 0, 0
    while True:
        tag = struct.unpack_from("<HH", head, at)
        syntax = found.get(_SYNTAX) if tag[0] > 2 else None
        if syntax in (_BIG_ENDIAN, _DEFLATED) or (depth == 0 and tag > _HEIGHT):
            return
        if tag[0] == 0xFFFE or syntax == _IMPLICIT:  # items of a sequence carry no type either
            start, layout = at + 4, "<I"
        elif head[at + 4 : at + 6] in _LONG:
            start, layout = at + 8, "<I"
        else:
            start, layout = at + 6, "<H"
        (length,) = struct.unpack_from(layout, head, start)
        at = start + struct.calcsize(layout)
        if tag in _ENDS:
            depth -= 1
        elif length == _UNDEFINED:
            depth += 1
        else:
            if depth == 0 and tag in _TEXTS:
                (value,) = struct.unpack_from(f"{length}s", head, at)
                found[tag] = value.decode("utf-8", "replace").strip(" \0")
            elif depth == 0 and tag in _NUMBERS and length in (2, 4):
                found[tag] = str(*struct.unpack_from("<H" if length == 2 else "<I", head, at))
            at += length
