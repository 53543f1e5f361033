"""Pixel size, objective and channels of an OME-TIFF, from the OME-XML of its first page."""

from typing import NamedTuple
from xml.etree import ElementTree

_LARGEST = 1 << 22  # characters: longer descriptions are not parsed
_UM = {
    "m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "pm": 1e-6,
    "in": 25400.0,
}  # fmt: skip


class Ome(NamedTuple):
    """Image of an OME-TIFF: um per pixel in x and y (0: not given), objective power (0: not given), and channels.

    `samples` holds the samples per pixel of each channel: one channel of 3 is RGB, three of 1 are separate planes.
    `bits` is the number of bits of a value that the camera filled (0: not given).
    """

    across: float
    down: float
    power: float
    names: tuple[str, ...]
    samples: tuple[int, ...]
    bits: int = 0


def read_ome(description: str, width: int, height: int) -> Ome | None:
    """Image of `width` x `height` pixels in an OME-XML; None if the text is not OME-XML or has no such image."""
    if "<OME" not in description[:2000] or len(description) > _LARGEST or "<!ENTITY" in description:
        return None
    try:
        root = ElementTree.fromstring(description)
    except ElementTree.ParseError:
        return None
    powers = {}
    for objective in root.iterfind(".//{*}Objective"):
        powers[objective.get("ID", "")] = _number(objective.get("NominalMagnification"))
    for image in root.iterfind(".//{*}Image"):
        pixels = image.find("{*}Pixels")
        if pixels is None or (pixels.get("SizeX"), pixels.get("SizeY")) != (str(width), str(height)):
            continue
        used = image.find("{*}ObjectiveSettings")
        channels = pixels.findall("{*}Channel")
        return Ome(
            _size(pixels, "X"),
            _size(pixels, "Y"),
            powers.get(used.get("ID", ""), 0.0) if used is not None else 0.0,
            tuple(channel.get("Name", "") for channel in channels),
            tuple(int(_number(channel.get("SamplesPerPixel"))) or 1 for channel in channels),
            int(_number(pixels.get("SignificantBits"))),
        )
    return None


def _size(pixels: ElementTree.Element, axis: str) -> float:
    unit = _UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)
    return unit * _number(pixels.get(f"PhysicalSize{axis}"))


def _number(text: str | None) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 < value < 1e9 else 0.0
