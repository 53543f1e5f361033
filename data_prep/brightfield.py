"""Detection of 8-bit RGB brightfield images among the grey, 16-bit and fluorescence files that OpenSlide also opens."""

from collections.abc import Mapping
from pathlib import Path

import openslide
import tifffile

from pathflip_jax.data.readers.ome import Ome, read_ome
from pathflip_jax.data.storage.failures import preview

_TIFF = ("generic-tiff", "aperio")  # vendors whose files may hold other formats; the others write only 8-bit RGB
_COLOUR = ("RGB", "YCBCR")
_NEEDED = "expected an 8-bit RGB brightfield slide: pass that file, or leave the slide out"


def check_brightfield(path: Path, properties: Mapping[str, str], size: tuple[int, int]) -> None:
    """Raise ValueError naming a slide's format where it is not 8-bit RGB brightfield."""
    found = ""
    if properties.get(openslide.PROPERTY_NAME_VENDOR) in _TIFF:
        found = _tiff(path, size, read_ome(properties.get("tiff.ImageDescription", ""), *size))
    illumination = [properties.get(name, "") for name in ("mirax.GENERAL.SLIDE_TYPE", "leica.illumination-source")]
    illumination.append(properties.get("dicom.OpticalPathSequence[0].IlluminationTypeCodeSequence[0].CodeMeaning", ""))
    if any("fluor" in text.lower() for text in illumination):
        found = "fluorescence"
    if properties.get("dicom.SamplesPerPixel", "3") == "1":
        found = "one grey channel: fluorescence, or a mask"
    if found:
        raise ValueError(f"{path}: {found}; {_NEEDED}")


def _tiff(path: Path, size: tuple[int, int], ome: Ome | None) -> str:
    """Pixel format of the level-0 pages of a TIFF; "" for 8-bit RGB and for unrecognised formats."""
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if (page.imagewidth, page.imagelength) == size]
            if not pages:
                return ""
            bits, samples, kind = pages[0].bitspersample, pages[0].samplesperpixel, pages[0].photometric.name
    except Exception:  # parser error on a broken file; OpenSlide has opened it, and reads it or reports why not
        return ""
    names = [name for name in ome.names if name] if ome else []
    if kind == "PALETTE":
        return "a palette image of indexed colours, such as a mask"
    if samples >= 3 and kind in _COLOUR:
        return f"{bits}-bit RGB; convert it to 8 bits" if bits != 8 else ""
    channels = max(len(pages), len(ome.names) if ome else 0) * samples
    if channels == 3 and bits == 8 and (_is_rgb(names) or not names):
        what = "RGB in three planes" if names else "three planes without names"
        cure = f"interleave them{'' if names else ' if they are RGB'}: `{_interleave(path, ome)}`"
        return f"{what}, of which OpenSlide reads only the first; {cure}"
    named = f" ({preview(names)})" if names else ""
    if channels > 1 and samples < 3:
        return f"{channels} channels of {bits} bits{named}, as in fluorescence"
    if samples == 1:
        return f"one grey channel of {bits} bits{named}: fluorescence, or a mask"
    return f"{samples} channels of {bits} bits in {kind}{named}"


def _interleave(path: Path, ome: Ome | None) -> str:
    """Command that converts planar RGB to the interleaved form OpenSlide reads, for images that fit in memory."""
    size = ""
    if ome and ome.across > 0:
        size = f", resolution=({1e4 / ome.across:g},) * 2, resolutionunit='CENTIMETER'"
    written = path.name.split(".")[0] + "_rgb.tif"
    return (
        f"python -c \"import tifffile as t; t.imwrite('{written}', t.imread('{path.name}').transpose(1, 2, 0), "
        f"photometric='rgb', tile=(256, 256), compression='jpeg'{size})\""
    )


def _is_rgb(names: list[str]) -> bool:
    return [name.lower()[:1] for name in names] == ["r", "g", "b"]
