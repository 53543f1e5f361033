"""Shared fixtures of the preparation tests: DICOM headers, and drawn slides."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
LONG = ("SQ", "OB", "UN")
GLASS, PINK = (240, 240, 242), (200, 120, 180)


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


def _image(height: int, width: int, *boxes, color=PINK, seed: int = 0) -> np.ndarray:
    """Glass with tissue in boxes (top, bottom, left, right), both with grain."""
    image = np.empty((height, width, 3), np.int16)
    image[:] = GLASS
    for top, bottom, left, right in boxes:
        image[top:bottom, left:right] = color
    grain = np.random.default_rng(seed).integers(-6, 7, image.shape, np.int16)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def _write(path: Path, image: np.ndarray, mpp: float | None = 0.5, downsamples=(1,), description: str | None = None):
    with tifffile.TiffWriter(path) as out:
        for downsample in downsamples:
            level = image if downsample == 1 else np.asarray(Image.fromarray(image).reduce(downsample))
            resolution = {} if mpp is None else {"resolution": (1e4 / (mpp * downsample),) * 2}
            resolution |= {} if mpp is None else {"resolutionunit": "CENTIMETER"}
            out.write(
                level,
                photometric="rgb",
                tile=(128, 128),
                compression="deflate",
                subfiletype=0 if downsample == 1 else 1,
                metadata=None,
                description=description if downsample == 1 else None,
                **resolution,
            )
    return path


@pytest.fixture(scope="session")
def draw():
    """Draws glass with boxes of tissue."""
    return _image


@pytest.fixture(scope="session")
def write_tiff():
    """Writes a picture as a tiled TIFF that OpenSlide opens."""
    return _write
