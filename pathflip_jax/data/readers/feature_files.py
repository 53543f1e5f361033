"""Search for slide feature files below a folder, with notes on the other files."""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from pathflip_jax.data.readers import h5_features
from pathflip_jax.data.readers.companions import COMPANIONS
from pathflip_jax.data.readers.feature_format import slide_id_of
from pathflip_jax.data.readers.formats import extensions, format_by_extension
from pathflip_jax.data.readers.numpy_features import POSITIONS
from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.folders import is_store, walk_files

COORDINATES = "patches"  # folders of coordinates, which AtlasPatch completes with features
# Folders next to feature folders that hold no features: coordinates, masks, images.
NOT_FEATURES = {COORDINATES, "masks", "stitches", "thumbnails", "contours", "contours_geojson", "visualization"}
SLIDE_EMBEDDINGS = "slide_features_"  # TRIDENT's folders of one vector per slide: slide_features_titan
OTHER_EMBEDDINGS = {"slide_embeddings", "slide_latents", "patient_embeddings", "hierarchical_embeddings"}  # slide2vec's
# File types that may be mistaken for features, and the cure.
UNREADABLE = {
    ".npy": "save features and coordinates together as HDF5 (datasets 'features' and 'coords')",
    ".npz": "save its arrays as HDF5 (datasets 'features' and 'coords')",
    ".parquet": "save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".feather": "save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".pkl": "a pickle can run code; save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".pickle": "a pickle can run code; save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".pth": "this extension is used for model weights; rename the file to .pt if it is a slide's feature tensor",
    ".zarr": "they hold no features (LazySlide's tables, or arrays 'features' and 'coords'), but images or other data",
    ".safetensors": "save features and coordinates as HDF5 (datasets 'features' and 'coords')",
}


class FeatureFiles(NamedTuple):
    """Feature files of a folder in order of slide id, unreachable ones, and notes on skipped files."""

    files: list[Path]
    unreachable: list[Failure]
    notes: list[str]


def find_feature_files(folder: Path | str) -> FeatureFiles:
    """Feature files of any format in a folder tree, following links (`walk_files`), one for each slide.

    A CLAM folder holds every slide twice, as .h5 and .pt: the .h5 files are used, as they have the coordinates. Files
    in `patches/` are used if they hold features and no other file of the slide does. Other tables, coordinate files and
    slide embeddings are skipped. Raises FileNotFoundError if there is
    none, ValueError if a slide has several (features of two encoders in one folder tree).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; pass the folder that contains the feature files")
    if is_store(folder):
        raise ValueError(f"{folder}: the store of one slide; pass the folder that contains the slides' stores")
    walked = walk_files(folder)
    inside = [path for path in walked.files if not NOT_FEATURES.intersection(path.relative_to(folder).parts[:-1])]
    embeddings = [path for path in inside if _is_embedding(path, folder) and path.suffix.lower() != ".json"]
    inside = [path for path in inside if path not in set(embeddings)]
    formats = {path: known for path in inside if (known := format_by_extension(path))}
    tables = {path: known.is_features(path) for path, known in formats.items() if known.is_features}
    found = [path for path in formats if tables.get(path, True)]
    with_coords = {slide_id_of(path) for path in found if formats[path].has_coords}
    found = [path for path in found if formats[path].has_coords or slide_id_of(path) not in with_coords]
    beside, lacking = _beside_coordinates(walked.files, folder, {slide_id_of(path) for path in found})
    found += beside
    broken = {path: fault for path, fault in walked.broken.items() if _may_be_features(path, folder)}
    unreachable = [Failure(slide_id_of(path), str(path), f"{path}: {fault}") for path, fault in broken.items()]
    notes = [*_notes(folder, inside, embeddings, found), *_other_tables(tables, folder)]
    if lacking and (beside or not found):
        names = preview(path.relative_to(folder) for path in lacking)
        notes.append(f"files of coordinates without features are not read: {len(lacking)} ({names}); extract them")
    if not found:
        reasons = [*(failure.error for failure in unreachable[:3]), *notes]
        seen = f"; {'; '.join(reasons)}" if reasons else ""
        raise FileNotFoundError(f"{folder}: no feature files ({', '.join(extensions())}) found in it or below{seen}")
    return FeatureFiles(_one_for_each_slide(found, folder), unreachable, notes)


def _beside_coordinates(files: list[Path], folder: Path, slides: set[str]) -> tuple[list[Path], list[Path]]:
    """Files in `patches/` that hold features, as AtlasPatch's do, and those that hold only coordinates.

    Files of the `slides` that have features elsewhere are not opened. Damaged ones count as files with features if
    others have them: reading them reports the fault.
    """
    found, damaged, lacking = [], [], []
    for path in files:
        *above, place = ("", *path.relative_to(folder).parts[:-1])
        if place != COORDINATES or NOT_FEATURES.intersection(above):
            continue
        if path.suffix.lower() not in h5_features.EXTENSIONS or slide_id_of(path) in slides:
            continue
        try:
            (found if h5_features.holds_features(path) else lacking).append(path)
        except (OSError, ValueError):
            damaged.append(path)
    return (found + damaged, lacking) if found else ([], lacking)


def _one_for_each_slide(found: list[Path], folder: Path) -> list[Path]:
    slides: dict[str, Path] = {}
    for path in found:
        other = slides.setdefault(slide_id_of(path), path)
        if other != path and not other.samefile(path):
            raise ValueError(
                f"{folder}: slide {slide_id_of(path)} has two feature files, {other.relative_to(folder)} and "
                f"{path.relative_to(folder)}; pass the folder of one encoder, or remove one of the files"
            )
    return [slides[slide_id] for slide_id in sorted(slides)]


def _is_embedding(path: Path, folder: Path) -> bool:
    above = path.relative_to(folder).parts[:-1]
    return any(part.startswith(SLIDE_EMBEDDINGS) or part in OTHER_EMBEDDINGS for part in above)


def _may_be_features(path: Path, folder: Path) -> bool:
    """Whether an unreachable path may be a feature file, by its suffix, or a folder, which has none."""
    if NOT_FEATURES.intersection(path.relative_to(folder).parts):
        return False
    suffix = path.suffix.lower()
    return suffix in extensions() or not re.fullmatch(r"\.[a-z]\w*", suffix)


def _is_companion(path: Path) -> bool:
    """Whether a file's name is that of coordinates beside features (`companions.py`)."""
    return path.name.lower().endswith((*COMPANIONS, POSITIONS))


def _notes(folder: Path, files: list[Path], embeddings: list[Path], found: list[Path]) -> list[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    known = set(found)
    for path in files:
        if path.suffix.lower() in UNREADABLE and path not in known and not _is_companion(path):
            kinds[path.suffix.lower()].append(str(path.relative_to(folder)))
    notes = [
        f"{suffix} files are not read: {len(names)} ({preview(names)}); {UNREADABLE[suffix]}"
        for suffix, names in sorted(kinds.items())
    ]
    if embeddings:
        names = preview(path.relative_to(folder) for path in embeddings)
        notes.append(
            f"slide embeddings are not read: {len(embeddings)} ({names}); patch features are in features_<encoder>, "
            "those of slide2vec in tile_embeddings"
        )
    return notes


def _other_tables(tables: dict[Path, bool], folder: Path) -> list[str]:
    """Notes on tables without features, for extensions that other files with features have.

    `tables` says which files have features.
    """
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path, has_features in tables.items():
        if not has_features and path.suffix.lower() not in UNREADABLE:
            kinds[path.suffix.lower()].append(path.relative_to(folder))
    with_features = {path.suffix.lower() for path, has_features in tables.items() if has_features}
    return [
        f"{suffix[1:]} files that are not feature tables are not read: {len(others)} ({preview(others)})"
        for suffix, others in kinds.items()
        if suffix in with_features
    ]
