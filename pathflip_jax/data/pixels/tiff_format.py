"""Pixel format of a TIFF: 8-bit RGB, RGB that only tifffile reads, or no brightfield image at all."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import openslide
import tifffile

from pathflip_jax.data.pixels.ome import Ome, read_ome
from pathflip_jax.data.pixels.source import WHITE, LevelSource, Unreadable
from pathflip_jax.data.pixels.tiff_levels import Level, TiffLevels
from pathflip_jax.data.storage.failures import preview

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # faults are raised here, with the file and the cure
_TIFF = ("generic-tiff", "aperio")  # vendors whose files may hold other formats; the others write only 8-bit RGB
_COLOUR = ("RGB", "YCBCR")
_LOSSY_YCBCR = (6, 7, 33007, 34892)  # JPEG, whose codec converts YCbCr to RGB
_ASPECT = 0.02  # relative difference of the sides' ratios between a level and level 0
LARGEST_UNTILED = 2**28  # pixels of a level in strips; a strip may be the whole level, 0.8 GB of 8-bit RGB
_LARGEST_TILE = 2**26  # pixels
_VIPS = "convert it, for example `vips tiffsave {name} OUT.tiff --tile --pyramid --compression jpeg`"
_UNIT = {2: 25400.0, 3: 10000.0}  # um: inch, centimetre
_MAX_SAMPLE, _PROFILE = 281, 34675


def tiff_fault(path: Path, properties: Mapping[str, str], size: tuple[int, int]) -> str:
    """Pixel format of a TIFF that OpenSlide opens, "" for 8-bit RGB and for formats other than TIFF."""
    if properties.get(openslide.PROPERTY_NAME_VENDOR) not in _TIFF:
        return ""
    ome = read_ome(properties.get("tiff.ImageDescription", ""), *size)
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if (page.imagewidth, page.imagelength) == size]
            return _fault(path, pages, ome) if pages else ""
    except Exception:  # parser error on a broken file; OpenSlide has opened it, and reads it or reports why not
        return ""


def _fault(path: Path, pages: list, ome: Ome | None) -> str:
    """Format of the level-0 pages of a TIFF where it is not 8-bit RGB."""
    page = pages[0].keyframe
    bits, samples, kind = page.bitspersample, page.samplesperpixel, page.photometric.name
    names = [name for name in ome.names if name] if ome else []
    if kind == "PALETTE":
        return "a palette image of indexed colours, such as a mask"
    if samples >= 3 and kind in _COLOUR:
        return f"{bits}-bit RGB; convert it to 8 bits" if bits != 8 else ""
    channels = max(len(pages), len(ome.names) if ome else 0) * samples
    if channels == 3 and bits == 8 and (is_rgb(names) or not names):
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


def is_rgb(names) -> bool:
    """Whether names of channels are those of red, green and blue."""
    return [name.lower()[:1] for name in names] == ["r", "g", "b"]


def open_tiff(path: Path) -> LevelSource:
    """TIFF decoded by tifffile: RGB of 8 to 16 bits, interleaved or in planes, in tiles or strips, with its pyramid.

    Levels are those of an OME-TIFF, in SubIFDs, or pages marked as reduced. Raises Unreadable for other formats.
    """
    try:
        file = tifffile.TiffFile(path, _multifile=False)
    except (tifffile.TiffFileError, OSError, ValueError) as error:
        raise Unreadable(f"tifffile cannot open it ({error}); the file is damaged: copy it again") from None
    try:
        return _source(path, file)
    except Unreadable:
        file.close()
        raise
    except Exception as error:  # parser error on a broken file
        file.close()
        raise Unreadable(f"tifffile cannot read it ({error}); the file is damaged: copy it again") from None


def _source(path: Path, file: tifffile.TiffFile) -> LevelSource:
    series = max(file.series, key=lambda one: one.sizes.get("width", 0) * one.sizes.get("height", 0), default=None)
    if series is None:
        raise Unreadable("a TIFF without images; the file is damaged: copy it again")
    page = series.levels[0].pages[0].keyframe
    size = page.imagewidth, page.imagelength
    description = file.pages[0].description if file.is_ome else page.description
    ome = read_ome(description, *size)
    _check_planes(path, series, ome)
    white = _white(page, ome)
    levels = [Level(one.pages, white) for one in [*series.levels, *_reduced(file, series)]]
    levels = list({level.size: level for level in reversed(levels)}.values())
    levels.sort(key=lambda level: level.size, reverse=True)
    for level in levels:
        _check_layout(path, level)
    notes = ()
    if page.bitspersample > 8:
        notes = (f"{page.bitspersample}-bit RGB, of which the value {white} is read as white",)
    profile = page.tags.valueof(_PROFILE)
    source = TiffLevels(file, levels)
    properties = _properties(page, description)
    return LevelSource("tifffile", source, [level.size for level in levels], properties, profile, notes)


def _check_planes(path: Path, series: tifffile.TiffPageSeries, ome: Ome | None) -> None:
    """Raise Unreadable for what is not one plane of RGB, by the axes of the image."""
    page, pages = series.levels[0].pages[0].keyframe, series.levels[0].pages
    axes = {axis: count for axis, count in zip(series.axes, series.shape, strict=True) if count > 1}
    colours = axes.pop("S", 1)
    channels = axes.pop("C", 1)
    deep = {axis: count for axis, count in axes.items() if axis not in "YX"}
    if any(one is None for one in pages):
        raise Unreadable("an OME-TIFF of several files, of which this is one; combine them into one file")
    if deep and set(deep) != {"I"}:
        count = next(iter(deep.values()))
        raise Unreadable(f"a stack of {count} images ({', '.join(deep)}); export one plane of it, in RGB")
    rgb = colours >= 3 and page.photometric.name in _COLOUR and channels == 1 and not deep
    planes = channels == 3 and colours == 1 and not deep and ome is not None and is_rgb(ome.names)
    if not (rgb or planes):
        found = _fault(path, list(pages), ome) or f"an image of axes {series.axes}"
        raise Unreadable(f"{found}; expected an RGB brightfield slide")
    if page.dtype is None or page.dtype.kind != "u" or not 8 <= page.bitspersample <= 16:
        raise Unreadable(f"RGB of {page.bitspersample} bits ({page.dtype}); convert it to 8 bits")
    if page.photometric.name == "YCBCR" and page.compression not in _LOSSY_YCBCR:
        raise Unreadable(f"YCbCr in {page.compression!s}, which is not decoded here; {_VIPS.format(name=path.name)}")


def _reduced(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Iterator[tifffile.TiffPageSeries]:
    """Levels of a plain TIFF beside level 0: reduced images of the same kind and shape; labels are of another."""
    page = series.levels[0].pages[0].keyframe
    if file.is_ome or len(series.levels) > 1:
        return
    for other in file.series:
        own = other.pages[0].keyframe
        scale = page.imagewidth / own.imagewidth
        same = all(
            getattr(own, name) == getattr(page, name)
            for name in ("photometric", "samplesperpixel", "planarconfig", "bitspersample", "is_tiled")
        )
        if same and own.is_reduced and scale > 1 and abs(page.imagelength / own.imagelength / scale - 1) < _ASPECT:
            yield other


def _white(page: tifffile.TiffPage, ome: Ome | None) -> int:
    """Value of white: the largest of the bits that the camera filled, where the file says how many."""
    if page.bitspersample == 8:
        return WHITE
    most = page.tags.valueof(_MAX_SAMPLE)
    most = max(most) if isinstance(most, tuple) else most
    bits = ome.bits if ome and 8 <= ome.bits <= page.bitspersample else page.bitspersample
    stated = isinstance(most, int) and WHITE <= most < 2**bits
    return most if stated else 2**bits - 1


def _check_layout(path: Path, level: Level) -> None:
    (width, height), page = level.size, level.page
    if page.compression not in tifffile.TIFF.DECOMPRESSORS and page.compression != 1:
        raise Unreadable(f"compressed as {page.compression!s}, which is not decoded; {_VIPS.format(name=path.name)}")
    if page.is_tiled and level.across * level.down > _LARGEST_TILE:
        raise Unreadable(
            f"tiles of {level.across} x {level.down} pixels, more than are decoded at once; "
            f"{_VIPS.format(name=path.name)}"
        )
    if not page.is_tiled and width * height > LARGEST_UNTILED:
        raise Unreadable(
            f"{width} x {height} pixels without tiles, more than the {LARGEST_UNTILED / 1e6:.0f} million that are read "
            f"without; {_VIPS.format(name=path.name)}"
        )


def _properties(page: tifffile.TiffPage, description: str) -> dict[str, str]:
    """Vendor, description and resolution, as OpenSlide names and states them."""
    found = {openslide.PROPERTY_NAME_VENDOR: "generic-tiff", "tiff.ImageDescription": description}
    unit = _UNIT.get(int(page.resolutionunit or 0))
    for name, tag in ((openslide.PROPERTY_NAME_MPP_X, 282), (openslide.PROPERTY_NAME_MPP_Y, 283)):
        value = page.tags.valueof(tag)
        if unit and value and value[0] and value[1]:
            found[name] = repr(unit * value[1] / value[0])
    return found
