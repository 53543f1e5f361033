"""DICOM header elements that identify the slide of a file.

Archives name files by instance ("DCM_0.dcm", a UUID, only digits), so a slide's name is in the header or is the
folder's. OpenSlide, which reads the pixels, gives a header only after inspecting every other file of the folder; here a
single header is parsed, up to the container's identifier.
"""

import re
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_IMPLICIT, _BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_CLASS, _SYNTAX, _SERIES, _CONTAINER = (2, 2), (2, 16), (0x20, 0x0E), (0x40, 0x512)
_HEAD = 1 << 17  # bytes: the container's identifier comes before any pixels, palette or colour profile
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED = 0xFFFFFFFF
_ENDS = ((0xFFFE, 0xE00D), (0xFFFE, 0xE0DD))  # of an item, of a sequence, of undefined length
# Uninformative names given by exporters and archives: counters, UIDs, UUIDs.
_UID = r"([a-z]{1,3}_)?\d+(\.\d+){2,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}"
_COUNTER = r"(dcm|im|img|image|i|level|series|instance|sm)[-_]?\d{1,8}([-_]\d{1,4})*"
_INSTANCE = re.compile(f"{_COUNTER}|{_UID}", re.IGNORECASE)
_NO_NAME = re.compile(f"{_UID}|dicom|dcm|series", re.IGNORECASE)
_NUMBER = re.compile(r"\d+([-_]\d+)*")  # a counter of the files of one series, but a slide's name among others


class Header(NamedTuple):
    """Metadata of a DICOM file: its kind, its series and the identifier on the glass; "" for what it lacks."""

    kind: str
    series: str
    container: str

    @property
    def is_slide(self) -> bool:
        """Whether it is (a level of) a whole-slide image, not a radiograph, annotation or directory."""
        return self.kind == _WHOLE_SLIDE


def read_header(path: Path) -> Header | None:
    """Read the header of a DICOM file, None for any other file. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
        head = file.read(_HEAD)
    found: dict[tuple[int, int], str] = {}
    try:
        _parse(head, found)
    except struct.error:  # the end of the bytes read, or of a truncated file
        pass
    return Header(found.get(_CLASS, ""), found.get(_SERIES, ""), found.get(_CONTAINER, ""))


def _parse(head: bytes, found: dict[tuple[int, int], str]) -> None:
    """Parse the top-level elements, from the file's meta information to the container's identifier."""
    at, depth = 0, 0
    while True:
        tag = struct.unpack_from("<HH", head, at)
        syntax = found.get(_SYNTAX) if tag[0] > 2 else None
        if syntax in (_BIG_ENDIAN, _DEFLATED) or (depth == 0 and tag > _CONTAINER):
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
            if depth == 0 and tag in (_CLASS, _SYNTAX, _SERIES, _CONTAINER):
                (value,) = struct.unpack_from(f"{length}s", head, at)
                found[tag] = value.decode("utf-8", "replace").strip(" \0")
            at += length


def name_series(headers: Mapping[Path, Header]) -> dict[Path, str]:
    """Map from one file of each series to the slide id of the series; OpenSlide opens a series by any of its files.

    A file that is its whole series and has an informative name gives the id. Otherwise the folder names the slide where
    it holds one series and its name is not a UID; else the container does (the identifier on the glass), and the UID of
    the series where two series share a container or it is empty.
    """
    groups: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path, header in sorted(headers.items()):
        groups[path.parent, header.series or path.name].append(path)
    in_folder = Counter(folder for folder, _ in groups)
    series_per_container = Counter(
        container for _, container in {(key[1], headers[own[0]].container) for key, own in groups.items()}
    )
    names = {}
    for (folder, series), (first, *others) in groups.items():
        named = (folder.name or folder.resolve().name) if in_folder[folder] == 1 else ""
        stem = _stem(first)
        own = "" if others or _INSTANCE.fullmatch(stem) or (named and _NUMBER.fullmatch(stem)) else stem
        container = re.sub(r"[/\\:\x00-\x1f]+", "_", headers[first].container).lstrip(".")
        container = container if series_per_container[headers[first].container] == 1 else ""
        informative = "" if _NO_NAME.fullmatch(named) else named
        names[first] = own or informative or container or named or series
    return names


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in (".dcm", ".dicom", ".ima") else path.name
