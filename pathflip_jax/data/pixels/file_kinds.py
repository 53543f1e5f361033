"""Kinds of files that are given for slides and are none, by their first bytes and their companions."""

import re
import zipfile
from pathlib import Path

from PIL import Image

from pathflip_jax.data.pixels.dicom_headers import Header, read_instance
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.folders import describe_placeholder

_PICTURES = {"JPEG": "a JPEG photograph", "PNG": "a PNG picture", "BMP": "a BMP picture", "GIF": "a GIF picture",
             "WEBP": "a WebP picture", "JPEG2000": "a JPEG 2000 image"}  # fmt: skip
_PYRAMID = "pass the scanner's own file, or make a slide of it: `vips tiffsave {name} OUT.tiff --tile --pyramid`"
_FEATURES = "pass the slide, or import features with `pathflip import`"
_MAGIC = {
    b"\x1f\x8b": ("a gzip file", "unpack it"),
    b"7z\xbc\xaf": ("a 7-Zip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it"),
    b"BZh": ("a bzip2 file", "unpack it"),
    b"\xfd7zXZ": ("an xz file", "unpack it"),
    b"%PDF": ("a PDF document", "pass the slide's image file"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as of features", _FEATURES),
    b"\x93NUMPY": ("a NumPy array, as of features", _FEATURES),
    b"PAR1": ("a Parquet table, as of features", _FEATURES),
    b"\xd0\xcf\x11\xe0": ("an OLE document, such as of Zeiss or Microsoft", "export the slide to SVS, DICOM or TIFF"),
}
_PART = re.compile(rb"^\s*(?:ImageFile|MapFile|OptimisationFile)[^=\r\n]*=[ \t]*([^\r\n]+)", re.MULTILINE)


def describe(path: Path) -> str:
    """Kind of a file that is no slide, with the cure; "" for an unknown one. Raises OSError where it cannot be read."""
    if fault := describe_placeholder(path):
        return fault
    if not path.stat().st_size:
        return "an empty file; copy it again"
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if path.suffix.lower() == ".mrxs":
        absent = not path.with_suffix("").is_dir()
        return f"a MIRAX slide without its folder {path.stem}, which holds its pixels; copy it next to it" * absent
    if path.suffix.lower() in (".vms", ".vmu"):
        return _missing_parts(path, head)
    if head[128:132] == b"DICM":
        return _dicom(path)
    if head.startswith(b"PK\3\4"):
        return _zip(path)
    for magic, (what, cure) in _MAGIC.items():
        if head.startswith(magic):
            return f"{what}, not a whole slide image; {cure}"
    return _picture(path)


def _missing_parts(path: Path, head: bytes) -> str:
    """Files that a Hamamatsu index names and that are not beside it."""
    names = [name.decode("utf-8", "replace").strip() for name in _PART.findall(head)]
    absent = [name for name in names if name and not (path.parent / name).exists()]
    if not absent:
        return ""
    return f"a Hamamatsu slide without {len(absent)} of its files ({preview(absent)}); copy them next to it"


def _dicom(path: Path) -> str:
    found = read_instance(path)
    if found is None or found.header.is_slide or found.header == Header("", "", ""):
        return ""
    modality = f" of modality {found.modality}" if found.modality else ""
    return f"a DICOM file{modality}, not a whole slide image; pass a file of the slide's series"


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    if any(name.endswith("data.pkl") for name in names):
        return f"a PyTorch file, as of features, not a whole slide image; {_FEATURES}"
    if names and all(name.endswith(".npy") for name in names):
        return f"NumPy arrays, as of features, not a whole slide image; {_FEATURES}"
    return "a ZIP archive, not a whole slide image; unpack it"


def _picture(path: Path) -> str:
    try:
        with Image.open(path, formats=list(_PICTURES)) as image:
            what, (width, height) = _PICTURES[image.format], image.size
    except Exception:  # no picture, or one that Pillow refuses as too large
        return ""
    size = f"{width} x {height} pixels"
    return f"{what} of {size}, not a whole slide image; {_PYRAMID.format(name=path.name)}"
