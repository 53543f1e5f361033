"""What the tests of preparation share: DICOM headers, written element by element."""

import struct
from pathlib import Path

import pytest

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
LONG = ("SQ", "OB", "UN")


def _element(group: int, number: int, kind: str, value: bytes, implicit: bool = False, length: int | None = None):
    value += b"\0" * (len(value) % 2)
    length = len(value) if length is None else length
    if implicit:
        return struct.pack("<HHI", group, number, length) + value
    if kind in LONG:
        return struct.pack("<HH2sHI", group, number, kind.encode(), 0, length) + value
    return struct.pack("<HH2sH", group, number, kind.encode(), length) + value


@pytest.fixture
def write_dicom():
    """Writes a header whose sequences name other series: one of a known length, one of an undefined."""

    def write(
        path: Path, series: str = "1.2.3", container: str = "S19-1", kind: str = WHOLE_SLIDE, implicit: bool = False
    ) -> Path:
        syntax = b"1.2.840.10008.1.2" if implicit else b"1.2.840.10008.1.2.1"
        meta = _element(2, 2, "UI", kind.encode()) + _element(2, 16, "UI", syntax)
        other = _element(0x20, 0x0E, "UI", b"9.9.9", implicit)
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(other)) + other
        open_item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + other + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
        end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        body = _element(8, 0x1115, "SQ", item, implicit)
        body += _element(8, 0x1140, "SQ", open_item + end, implicit, length=0xFFFFFFFF)
        body += _element(0x20, 0x0E, "UI", series.encode(), implicit)
        body += _element(0x40, 0x512, "LO", container.encode(), implicit)
        body += _element(0x40, 0x513, "SQ", b"", implicit) + _element(0x7FE0, 0x10, "OB", b"pixels", implicit)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 128 + b"DICM" + meta + body)
        return path

    return write
