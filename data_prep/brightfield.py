"""Detection of brightfield slides among the grey, 16-bit and fluorescence files whose pixels can be read."""

from collections.abc import Mapping
from pathlib import Path

_NEEDED = "expected an 8-bit RGB brightfield slide: pass that file, or leave the slide out"


def check_brightfield(path: Path, properties: Mapping[str, str], fault: str = "") -> None:
    """Raise ValueError naming a slide's format where it is not RGB brightfield; `fault` is that of its pixels."""
    found = fault
    illumination = [properties.get(name, "") for name in ("mirax.GENERAL.SLIDE_TYPE", "leica.illumination-source")]
    illumination.append(properties.get("dicom.OpticalPathSequence[0].IlluminationTypeCodeSequence[0].CodeMeaning", ""))
    if any("fluor" in text.lower() for text in illumination):
        found = "fluorescence"
    if properties.get("dicom.SamplesPerPixel", "3") == "1":
        found = "one grey channel: fluorescence, or a mask"
    if found:
        raise ValueError(f"{path}: {found}; {_NEEDED}")
