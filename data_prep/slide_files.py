"""Discovery of slide files below a folder: slides, their ids, and unreadable files with the reason.

Links are followed, hidden files are skipped, and no file that a pathologist would call a slide is skipped silently: an
unreadable one is returned as a `Failure` with the cure.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.dicom import name_series
from pathflip_jax.data.pixels.dicom_headers import Header, read_header
from pathflip_jax.data.storage.failures import Failure, preview

# OpenSlide 4's formats: Aperio, DICOM, Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, plain TIFF.
SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".btf", ".dcm", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi",
)  # fmt: skip
_CONVERT = "convert it, for example with `QuPath convert-ome {name} {stem}.ome.tif`"
_EXPORT = "export it with the vendor's own converter, to SVS, DICOM or tiled TIFF"
_FLUORESCENCE = "it is fluorescence, and H&E is needed: pass the brightfield slide, or remove the file"
_FOREIGN = {
    ".vsi": ("an Olympus slide", _CONVERT),
    ".oir": ("an Olympus image", _CONVERT),
    ".oib": ("an Olympus FluoView image", _FLUORESCENCE),
    ".oif": ("an Olympus FluoView image", _FLUORESCENCE),
    ".lif": ("a Leica image", _CONVERT),
    ".lsm": ("a Zeiss confocal image", _FLUORESCENCE),
    ".zvi": ("a Zeiss AxioVision image", _CONVERT),
    ".nd2": ("a Nikon image", _CONVERT),
    ".ims": ("an Imaris image", _CONVERT),
    ".qptiff": ("an Akoya slide", _CONVERT),
    ".ndpis": ("a Hamamatsu set of fluorescence slides", _FLUORESCENCE),
    ".afi": ("an Aperio set of fluorescence slides", _FLUORESCENCE),
    ".isyntax": ("a Philips iSyntax slide", "export it as TIFF or DICOM from the Philips system"),
    ".i2syntax": ("a Philips iSyntax slide", "export it as TIFF or DICOM from the Philips system"),
    ".sdpc": ("a Sqray slide", _EXPORT),
    ".dyqx": ("a Sqray slide", _EXPORT),
    ".kfb": ("a KFBIO slide", _EXPORT),
    ".kfbf": ("a KFBIO slide", _EXPORT),
    ".tmap": ("a UNIC slide", _EXPORT),
    ".tron": ("an InteliMedical slide", _EXPORT),
    ".mdsx": ("a Motic slide", _EXPORT),
    ".mds": ("a Motic slide", _EXPORT),
    ".jp2": ("a JPEG 2000 image", "convert it: `vips tiffsave {name} {stem}.tiff --tile --pyramid --compression jpeg`"),
    ".jpx": ("a JPEG 2000 image", "convert it: `vips tiffsave {name} {stem}.tiff --tile --pyramid --compression jpeg`"),
}
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z")
_UNFINISHED = (".part", ".partial", ".crdownload", ".filepart", ".download", ".tmp", ".aria2")
_WRAPPED = (*_PACKED, *_UNFINISHED, ".dvc")  # extensions that may follow a slide's suffix
_JUNK = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})  # of archives, servers and disks
_FILE_TYPE = re.compile(r"\.[a-z][a-z0-9]{0,7}", re.IGNORECASE)  # a real suffix, not the end of a UID
_POINTER = 1024  # bytes: pointers to files stored elsewhere are smaller
_OME = re.compile(r"\.ome(?=\.(tiff?|btf|zarr)$)", re.IGNORECASE)


def find_slides(slides: Path | str | Sequence[Path | str]) -> tuple[dict[str, Path], list[Failure]]:
    """Map from slide id to file, for a folder with its subfolders, a file or a list of both, and the unreadable slides.

    A slide's id is its file name without the suffix; a DICOM series is one slide, named by `dicom.name_series`. Raises
    FileNotFoundError for a missing path and where there is no slide, ValueError where two files have one id.
    """
    given = [Path(slides)] if isinstance(slides, (str, Path)) else [Path(path) for path in slides]
    absent = [path for path in given if not path.is_dir() and not path.is_file()]
    if absent or not given:
        raise FileNotFoundError(f"{preview(absent) or 'an empty list'}: no such slide or folder of slides")
    failed: list[Failure] = []
    files: dict[str, Path] = {}
    dicom: dict[Path, Header] = {}
    for path in given:
        for file in _walk(path, failed) if path.is_dir() else [path]:
            kind = _classify(file, failed, asked=file is path)
            if isinstance(kind, Header):
                dicom[file] = kind
            elif kind:
                _add(files, slide_id_of_file(file), _with_pixels(file))
    for path, name in name_series(dicom).items():
        _add(files, name, path)
    files = _without_duplicates(files, failed)
    if not files and not failed:
        raise FileNotFoundError(f"{preview(given)}: no slides in it or its subfolders ({' '.join(SLIDE_SUFFIXES)})")
    return files, sorted(failed)


def slide_id_of_file(path: Path) -> str:
    """Id of a single-file slide: its name without the suffix, which for OME-TIFF is double."""
    name = path.name
    if path.suffix.lower() in _WRAPPED:
        name = path.stem
    name = _OME.sub("", name)
    return Path(name).stem if name.lower().endswith((*SLIDE_SUFFIXES, *_FOREIGN, ".zarr")) else path.name


def _with_pixels(path: Path) -> Path:
    """File next to a MIRAX slide's pixel folder; for a link without such a folder, the link's target."""
    linked = path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir()
    return path.resolve() if linked else path


def _add(files: dict[str, Path], name: str, path: Path) -> None:
    """Add a slide, only once where links lead to one file twice."""
    other = files.setdefault(name, path)
    if not os.path.samefile(other, path):
        raise ValueError(
            f"{other} and {path} have the same slide id, {name}, by which texts are matched to slides; rename one, "
            "or prepare them in two folders"
        )


def _without_duplicates(files: dict[str, Path], failed: list[Failure]) -> dict[str, Path]:
    """Slides whose file has no other id: one slide under two names would be its own negative."""
    names: dict[str, str] = {}
    for name, path in sorted(files.items()):
        first = names.setdefault(os.path.realpath(path), name)
        if first != name:
            error = f"{path}: the same file as {files[first]}, through a link; remove one of the two"
            failed.append(Failure(name, str(path), error))
    return {name: files[name] for name in sorted(names.values())}


def _walk(folder: Path, failed: list[Failure]) -> Iterator[Path]:
    """Walk the files below a folder in order, through links, each folder once; image folders (.zarr) count as files."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.listdir(here))
        except OSError as error:
            cure = "fix its permissions, or remove it from the input"
            failed.append(
                Failure(here.name, str(here), f"{here}: the folder cannot be read ({error.strerror}); {cure}")
            )
            continue
        below = []
        for path in (here / name for name in entries):
            if path.name.startswith(".") or path.name in _JUNK:
                if path.name.endswith(".icloud"):
                    name = path.name[1:].removesuffix(".icloud")
                    error = f"{path}: {name} is in iCloud and not on this disk; download it"
                    failed += [Failure(Path(name).stem, str(path), error)] * (Path(name).suffix in SLIDE_SUFFIXES)
            elif os.path.isdir(path) and not _is_image_folder(path):
                below.append(path)
            else:
                yield path
        waiting += sorted(reversed(below), key=os.path.islink, reverse=True)  # folders before links to them


def _is_image_folder(path: Path) -> bool:
    """Whether a .zarr folder is an OME-Zarr image; other tools store tables in such folders next to their slides."""
    if path.suffix.lower() != ".zarr":
        return False
    if _OME.search(path.name):
        return True
    for name in (".zattrs", "zarr.json"):
        try:
            attributes = json.loads((path / name).read_bytes())
            attributes = attributes.get("attributes", attributes)
        except (OSError, ValueError, AttributeError):
            continue
        return "multiscales" in attributes or "ome" in attributes
    return False


def _classify(path: Path, failed: list[Failure], asked: bool) -> Header | bool:
    """DICOM header of a file, or whether it is a slide; a file `asked` for by name is, whatever its suffix."""
    suffix = path.suffix.lower()
    error = _unreadable(path, suffix)
    if error:
        failed.append(Failure(slide_id_of_file(path), str(path), f"{path}: {error}"))
        return False
    listed = suffix in SLIDE_SUFFIXES
    if listed and suffix != ".dcm" or not listed and _FILE_TYPE.fullmatch(suffix) and not asked:
        return listed
    try:
        header = read_header(path)
    except OSError as error:
        if listed or asked:
            cure = "check its permissions and its disk"
            failed.append(
                Failure(slide_id_of_file(path), str(path), f"{path}: cannot be read ({error.strerror}); {cure}")
            )
        return False
    if header is None:
        return listed or asked
    return header if header.is_slide or asked else False


def _unreadable(path: Path, suffix: str) -> str:
    """Reason that a slide-like file cannot be read here, with the cure; "" where none is found."""
    if suffix in _WRAPPED:
        if Path(path.stem).suffix.lower() not in SLIDE_SUFFIXES:
            return ""
        if suffix == ".dvc":
            return "" if path.with_suffix("").exists() else "a DVC pointer to a slide that is not here; run `dvc pull`"
        if suffix in _PACKED:
            return "a compressed slide; unpack it"
        return f"an unfinished download; finish it, and rename it to {path.stem}"
    if suffix == ".zarr":
        return f"an OME-Zarr image, which OpenSlide does not open; {_cure(_CONVERT, path)}"
    like_slide = suffix in SLIDE_SUFFIXES or suffix in _FOREIGN
    if not like_slide and _FILE_TYPE.fullmatch(suffix):
        return ""
    if path.is_symlink() and not os.path.exists(path):  # a path without a suffix may have been a folder of slides
        target = os.readlink(path)
        if "annex/objects" in target:
            return f"its content is in git-annex and not here; run `git annex get {path.name}`"
        return f"a link to {target}, which does not exist; restore that file or remove the link"
    if not like_slide:
        return ""
    if suffix in _FOREIGN:
        what, cure = _FOREIGN[suffix]
        return f"{what} ({suffix}), which OpenSlide does not open; {_cure(cure, path)}"
    if suffix == ".mrxs" and not _with_pixels(path).with_suffix("").is_dir():
        return f"a MIRAX slide without its folder {path.stem}, which holds its pixels; copy that folder next to it"
    return _pointer(path)


def _cure(cure: str, path: Path) -> str:
    return cure.format(name=path.name, stem=_OME.sub("", path.name).rpartition(".")[0])


def _pointer(path: Path) -> str:
    """Description of the unfetched file that a placeholder of a few bytes represents."""
    try:
        size = path.stat().st_size
        head = path.read_bytes() if 0 < size <= _POINTER else b""
    except OSError:  # reported when it is opened
        return ""
    if not size:
        return "an empty file; copy it again"
    if head.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer and not the slide; run `git lfs pull --include {path.name}`"
    if head.startswith(b"/annex/objects/"):
        return f"a git-annex pointer and not the slide; run `git annex get {path.name}`"
    return ""
