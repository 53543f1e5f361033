"""DICOM whole slide images decoded by wsidicom: compressions and tilings that OpenSlide does not read.

Needs the extra `dicom`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openslide
from jaxtyping import UInt8

from pathflip_jax.data.pixels.dicom_series import series_of, volume_file
from pathflip_jax.data.pixels.source import WHITE, DamagedPixels, LevelSource, Unreadable

_KEPT_BYTES = 32 << 20  # of decoded frames, and of encoded ones
_TAGS = ["SamplesPerPixel", "BitsAllocated", "OpticalPathSequence"]  # not the places of its tiles, which may be many
_LAMP = "dicom.OpticalPathSequence[0].IlluminationTypeCodeSequence[0].CodeMeaning"


class DicomLevels:
    """Decoder of the levels of an open series, in the order and with the sizes (width, height) of `sizes`.

    Raises ValueError for a series that has not all of them.
    """

    def __init__(self, slide, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        self._slide = slide
        own = {(level.size.width, level.size.height): level.level for level in slide.pyramid}
        self.sizes = tuple(map(tuple, sizes or sorted(own, reverse=True)))
        if absent := [size for size in self.sizes if size not in own]:
            raise ValueError(f"no level of {absent[0][0]} x {absent[0][1]} pixels")
        self._numbers = [own[size] for size in self.sizes]

    def read(self, x: int, y: int, level: int, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a level, as `Decoder.read`."""
        found = np.full((height, width, 3), WHITE, np.uint8)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, self.sizes[level][0]), min(y + height, self.sizes[level][1])
        if right <= left or bottom <= top:
            return found
        size = right - left, bottom - top
        try:
            pixels = self._slide.read_region((left, top), self._numbers[level], size, as_array=True)
        except Exception as error:  # every codec raises its own
            raise DamagedPixels(f"a tile cannot be decoded: {error}") from error
        found[top - y : bottom - y, left - x : right - x] = pixels
        return found

    def close(self) -> None:
        """Close the files."""
        self._slide.close()


def open_frames(path: Path, sizes: Sequence[tuple[int, int]]) -> DicomLevels:
    """Decoder of a series that OpenSlide opens, for its levels. Raises ValueError, naming the reason, where it cannot.

    The levels are in the order and with the sizes (width, height) of `sizes`.
    """
    slide = _open(path)
    try:
        return DicomLevels(slide, sizes)
    except ValueError:
        slide.close()
        raise


def open_dicom(path: Path) -> LevelSource:
    """Series of a DICOM whole slide image decoded by wsidicom. Raises Unreadable for other images."""
    slide = _open(path)
    try:
        base = _elements(path)
        samples, bits = base.get("SamplesPerPixel", 0), base.get("BitsAllocated", 0)
        if (samples, bits) != (3, 8):
            what = "one grey channel: fluorescence, or a mask" if samples == 1 else f"{samples} channels"
            raise Unreadable(f"DICOM, {what}, of {bits} bits; expected RGB of 8 bits: pass the brightfield slide")
        levels = DicomLevels(slide)
        return LevelSource("wsidicom", levels, levels.sizes, _properties(base, slide), _profile(base))
    except Unreadable:
        slide.close()
        raise
    except Exception as error:  # parser error on a broken file
        slide.close()
        raise Unreadable(f"wsidicom cannot read it ({error}); copy the series again") from None


def _elements(path: Path):
    """Elements of the file of the largest level."""
    from pydicom import dcmread

    return dcmread(volume_file(series_of(path)), stop_before_pixels=True, specific_tags=_TAGS)


def _open(path: Path):
    try:
        from wsidicom import Settings, WsiDicom
    except ImportError:
        raise Unreadable(
            "DICOM that wsidicom reads, which is not installed; run `pip install 'pathflip-jax[dicom]'`"
        ) from None
    settings = Settings(
        strict_tile_size_check=False,
        decoded_frame_cache_size=_KEPT_BYTES,
        encoded_frame_cache_size=_KEPT_BYTES,
    )
    try:
        slide = WsiDicom.open([one.path for one in series_of(path)], settings=settings)
    except Exception as error:
        raise Unreadable(f"wsidicom cannot open it ({error}); copy all files of the series again") from None
    return slide


def _properties(base, slide) -> dict[str, str]:
    """Vendor, resolution, objective and lamp, as OpenSlide names them."""
    optics = (base.get("OpticalPathSequence") or [{}])[0]
    found = {openslide.PROPERTY_NAME_VENDOR: "dicom", "dicom.SamplesPerPixel": str(base.SamplesPerPixel)}
    spacing = slide.pyramid.mpp
    found |= {openslide.PROPERTY_NAME_MPP_X: repr(spacing.width), openslide.PROPERTY_NAME_MPP_Y: repr(spacing.height)}
    if power := optics.get("ObjectiveLensPower"):
        found[openslide.PROPERTY_NAME_OBJECTIVE_POWER] = str(power)
    if lamps := optics.get("IlluminationTypeCodeSequence"):
        found[_LAMP] = str(lamps[0].get("CodeMeaning", ""))
    return found


def _profile(base) -> bytes | None:
    optics = (base.get("OpticalPathSequence") or [{}])[0]
    return optics.get("ICCProfile") or None
