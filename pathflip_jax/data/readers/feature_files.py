"""Search for slide feature files below a folder, with notes on the other files."""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.folders import stand_in, walk_files

FEATURE_SUFFIXES = (".h5", ".hdf5", ".pt", ".csv")
# Folders next to features that hold none: coordinates, masks, images.
NOT_FEATURES = {"patches", "masks", "stitches", "thumbnails", "contours", "contours_geojson", "visualization"}
SLIDE_EMBEDDINGS = "slide_features_"  # TRIDENT's folders of one vector per slide: slide_features_titan
# File types that may be mistaken for features, and the cure.
UNREADABLE = {
    ".npy": "save features and coordinates together as HDF5 (datasets 'features' and 'coords')",
    ".npz": "save its arrays as HDF5 (datasets 'features' and 'coords')",
    ".parquet": "save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".feather": "save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".pkl": "a pickle can run code; save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".pickle": "a pickle can run code; save features and coordinates as HDF5 (datasets 'features' and 'coords')",
    ".pth": "weights of a model have this ending; rename it to .pt if it is a slide's feature tensor",
    ".zarr": "save its arrays as HDF5 (datasets 'features' and 'coords')",
    ".safetensors": "save features and coordinates as HDF5 (datasets 'features' and 'coords')",
}


def slide_id_of(path: Path | str) -> str:
    """Slide id from a feature file's name: no extension, no trailing `_features`, `_feats` or `_patches`.

    Text after a dot is kept: it is the UUID of a TCGA id.
    """
    return re.sub(r"[_.-](features|feats|patches)$", "", Path(path).stem, flags=re.IGNORECASE)


class FeatureFiles(NamedTuple):
    """Feature files of a folder in order of slide id, unreachable ones, and notes on files left out."""

    files: list[Path]
    unreachable: list[Failure]
    notes: list[str]


def find_feature_files(folder: Path | str) -> FeatureFiles:
    """Feature files in a folder tree of any of these tools, following links (`walk_files`), one for each slide.

    A CLAM folder holds every slide twice, as .h5 and .pt: the .h5 files are used, as they have the coordinates. Other
    tables, the coordinate files in `patches/` and slide embeddings are skipped. Raises FileNotFoundError if there is
    none, ValueError if a slide has several (features of two encoders in one folder tree).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name the folder that holds the feature files")
    walked = walk_files(folder)
    inside = [path for path in walked.files if not NOT_FEATURES.intersection(path.relative_to(folder).parts[:-1])]
    embeddings = [path for path in inside if _is_embedding(path, folder)]
    inside = [path for path in inside if path not in set(embeddings)]
    found = [path for path in inside if path.suffix.lower() in FEATURE_SUFFIXES]
    tables = {path: is_feature_table(path) for path in found if path.suffix.lower() == ".csv"}
    found = [path for path in found if tables.get(path, True)]
    with_coords = {slide_id_of(path) for path in found if path.suffix.lower() != ".pt"}
    found = [path for path in found if path.suffix.lower() != ".pt" or slide_id_of(path) not in with_coords]
    broken = {path: fault for path, fault in walked.broken.items() if _may_be_features(path, folder)}
    unreachable = [Failure(slide_id_of(path), str(path), f"{path}: {fault}") for path, fault in broken.items()]
    notes = _notes(folder, inside, embeddings)
    if any(tables.values()) and not all(tables.values()):
        others = [path.relative_to(folder) for path, taken in tables.items() if not taken]
        notes.append(f"csv files that are no tables of features are not read: {len(others)} ({preview(others)})")
    if not found:
        reasons = [*(failure.error for failure in unreachable[:3]), *notes]
        seen = f"; {'; '.join(reasons)}" if reasons else ""
        raise FileNotFoundError(
            f"{folder}: no feature files ({', '.join(FEATURE_SUFFIXES)}) found in it or below{seen}"
        )
    return FeatureFiles(_one_for_each_slide(found, folder), unreachable, notes)


def _one_for_each_slide(found: list[Path], folder: Path) -> list[Path]:
    slides: dict[str, Path] = {}
    for path in found:
        other = slides.setdefault(slide_id_of(path), path)
        if other != path and not other.samefile(path):
            raise ValueError(
                f"{folder}: slide {slide_id_of(path)} has two feature files, {other.relative_to(folder)} and "
                f"{path.relative_to(folder)}; name the folder of one encoder, or take one file away"
            )
    return [slides[slide_id] for slide_id in sorted(slides)]


def is_feature_table(path: Path) -> bool:
    """Whether a CSV header is SlideChat's: numbered columns and a patch name. Slide lists and logs have words.

    A pointer to a file that was never fetched is accepted too: reading it reports what it is.
    """
    if stand_in(path):
        return True
    with path.open("rb") as file:
        header = file.readline(1 << 20).decode("utf-8-sig", errors="replace").strip().split(",")
    return len(header) > 1 and all(re.search(r"\d$", cell) for cell in header[:-1])


def _is_embedding(path: Path, folder: Path) -> bool:
    return any(part.startswith(SLIDE_EMBEDDINGS) for part in path.relative_to(folder).parts[:-1])


def _may_be_features(path: Path, folder: Path) -> bool:
    """Whether an unreachable path may hold features: by its suffix, or as a folder, which has none."""
    if NOT_FEATURES.intersection(path.relative_to(folder).parts):
        return False
    suffix = path.suffix.lower()
    return suffix in FEATURE_SUFFIXES or not re.fullmatch(r"\.[a-z]\w*", suffix)


def _notes(folder: Path, files: list[Path], embeddings: list[Path]) -> list[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in UNREADABLE:
            kinds[path.suffix.lower()].append(str(path.relative_to(folder)))
    notes = [
        f"{suffix} files are not read: {len(names)} ({preview(names)}); {UNREADABLE[suffix]}"
        for suffix, names in sorted(kinds.items())
    ]
    if embeddings:
        names = preview(path.relative_to(folder) for path in embeddings)
        notes.append(
            f"slide embeddings are not read: {len(embeddings)} ({names}); patch features lie in features_<encoder>"
        )
    return notes
