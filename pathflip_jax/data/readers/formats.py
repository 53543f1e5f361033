"""Registry of feature file formats: one reader module and one entry each."""

from importlib import import_module
from pathlib import Path

from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat, is_text
from pathflip_jax.data.readers.file_kinds import describe_kind, describe_text
from pathflip_jax.data.storage.folders import describe_placeholder

# In the order in which help and errors list them, and in which files with a wrong extension are tried.
FILES = (
    "h5_features",
    "torch_features",
    "csv_features",
    "numpy_features",
    "zarr_features",
)
FORMATS: tuple[FeatureFormat, ...] = tuple(import_module(f"pathflip_jax.data.readers.{file}").FORMAT for file in FILES)
FIRST_BYTES = 40


def extensions() -> tuple[str, ...]:
    """Extensions of all formats."""
    return tuple(extension for known in FORMATS for extension in known.extensions)


def tools() -> str:
    """Programs whose files are read, for a sentence: "CLAM, TRIDENT or STAMP"."""
    *names, last = dict.fromkeys(tool for known in FORMATS for tool in known.tools)
    return f"{', '.join(names)} or {last}"


def format_by_extension(path: Path) -> FeatureFormat | None:
    """Format suggested by a file's extension, which its content may contradict; None for an unknown extension."""
    return next((known for known in FORMATS if path.suffix.lower() in known.extensions), None)


def finds_coords(path: Path) -> bool:
    """Whether a file that a folder's search found has coordinates, as far as its format and its surroundings say."""
    known = format_by_extension(path)
    return known.finds_coords(path) if known.finds_coords else known.has_coords


def read_fields(path: Path, mpp: float | None, encoder: str | None) -> FeatureFields:
    """Contents of a feature file, by the reader of the format recognised from its first bytes."""
    if path.is_dir():
        return next(known for known in FORMATS if known.is_folder and known.recognises(b"", path)).read(
            path, mpp, encoder
        )
    if fault := describe_placeholder(path):
        raise ValueError(f"{path}: {fault}")
    with path.open("rb") as file:
        start = file.read(FIRST_BYTES)
    if not start:
        raise ValueError(f"{path}: the file is empty (0 bytes); copy it or extract the features again")
    return _recognise(start, path).read(path, mpp, encoder)


def _recognise(start: bytes, path: Path) -> FeatureFormat:
    """Format of a file by its content; the format of its extension is tried first, then all others in order."""
    named, cure = format_by_extension(path), "save a slide's features as HDF5, datasets 'features' and 'coords'"
    if named is None and (found := describe_text(start)):
        raise ValueError(f"{path}: {found}, expected patch features of a slide; pass the slide, or its feature file")
    for known in sorted((known for known in FORMATS if not known.is_folder), key=lambda known: known is not named):
        if not known.recognises(start, path):
            continue
        if named not in (known, None) and is_text(start):
            found = start.decode(errors="replace").splitlines()[0]
            raise OSError(f"{path}: text ({found!r}), not a valid {named.name} file; download or copy it again")
        return known
    if found := describe_kind(start):
        kind, own_cure = found
        expected = "expected patch features of a slide with their coordinates"
        raise ValueError(f"{path}: {kind}, {expected}; {own_cure or cure}")
    names = ", nor ".join(f"{known.name} ({', '.join(known.extensions)})" for known in FORMATS)
    raise ValueError(f"{path}: neither {names}; {cure}")
