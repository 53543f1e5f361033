"""NumPy arrays of patch features: slide2vec's .npz, and the .npy pairs of TIAToolbox 1."""

import re
from pathlib import Path

import numpy as np

from pathflip_jax.data.readers import guarded, numpy_file
from pathflip_jax.data.readers.companions import COMPANIONS, NUMPY_READER, companion_fields, has_companion
from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat
from pathflip_jax.data.readers.h5_features import squeezed

_HEAD = re.compile(r"\.features(\.\d+)?$")  # TIAToolbox: <slide>.features.0.npy of output 0, <slide>.position.npy
POSITIONS = ".position.npy"


def read_numpy(path: Path, mpp: float | None = None, encoder: str | None = None) -> FeatureFields:
    """Features of a slide, with the coordinates beside them (`companions.py`, or the positions of TIAToolbox)."""
    wanted = (numpy_file.ALONE, "features", "coords", "tile_index")
    facts, arrays = guarded.parse(NUMPY_READER, path, wanted)
    features = arrays.pop("features", arrays.pop(numpy_file.ALONE, None))
    if features is None:
        raise ValueError(f"{path}: {_other_arrays(facts['shapes'])}")
    fields: FeatureFields = {"features": squeezed(features)}
    if "coords" in arrays:
        fields["coords"] = arrays["coords"]
    elif (positions := _positions(path)).is_file():
        fields |= _bounds(positions)
    elif fields["features"].ndim == 2:
        fields |= companion_fields(path, mpp, len(fields["features"]), arrays.get("tile_index"))
    if "coords" not in fields and path.suffix.lower() == ".npy":
        found = f"a NumPy array of shape {features.shape}"
        raise ValueError(f"{path}: {found} without coordinates; save both as HDF5, datasets 'features' and 'coords'")
    return fields


def bounds_fields(bounds: np.ndarray, where: str) -> FeatureFields:
    """Coordinates from TIAToolbox's rows left, top, right, bottom, in pixels of the resolution that it read.

    That resolution is not stated, so that `edge` is returned to scale them by.
    """
    if bounds.ndim != 2 or bounds.shape[1] != 4:
        raise ValueError(f"{where}: bounds of shape {bounds.shape}, expected [patches, 4]: left, top, right, bottom")
    sizes = np.unique(bounds[:, 2:] - bounds[:, :2])
    if len(sizes) > 1 or (len(sizes) and sizes[0] <= 0):
        sizes = ", ".join(f"{size:g}" for size in sizes[:4])
        raise ValueError(f"{where}: patches with edges of {sizes} px, expected squares of one size; extract them again")
    return {"coords": bounds[:, :2], "edge": float(sizes[0]) if len(sizes) else 0.0}


def _positions(path: Path) -> Path:
    return path.with_name(_HEAD.sub("", path.stem) + POSITIONS)


def _bounds(path: Path) -> FeatureFields:
    _, arrays = guarded.parse(NUMPY_READER, path, (numpy_file.ALONE,))
    if numpy_file.ALONE not in arrays:
        raise ValueError(f"{path}: no single array, expected TIAToolbox's positions [patches, 4]; extract them again")
    return bounds_fields(arrays[numpy_file.ALONE], str(path))


def _other_arrays(shapes: dict[str, list[int]]) -> str:
    """Message for an archive without features."""
    named = ", ".join(f"{name} {tuple(shape)}" for name, shape in list(shapes.items())[:8])
    cure = "save a slide's features as HDF5, datasets 'features' and 'coords'"
    if {"x", "y", "tile_index"} <= shapes.keys():
        cure = "these are coordinates; pass the slide's file in slide2vec's tile_embeddings"
    elif "arr_0" in shapes and shapes["arr_0"][1:] == [2]:
        cure = "these may be coordinates; pass the slide's file of features"
    return f"NumPy arrays {named}, expected 'features' [patches, width]; {cure}"


def is_features(path: Path) -> bool:
    """Whether a NumPy file holds features: an archive that has them, or an array whose name and companion say so."""
    if path.name.endswith(COMPANIONS) or path.name.endswith(POSITIONS):
        return False
    if path.suffix.lower() == ".npy":
        return bool(_HEAD.search(path.stem)) and _positions(path).is_file()
    try:
        return "features" in guarded.parse(NUMPY_READER, path, ())[0]["shapes"]
    except (OSError, ValueError):
        return has_companion(path)


def _recognises(start: bytes, path: Path) -> bool:
    """Whether a file is a NumPy array or an archive of some; PyTorch's are ZIP archives too."""
    is_archive = start[:4] == b"PK\x03\x04" and path.suffix.lower() == ".npz"
    return is_archive or start.startswith(numpy_file.MAGIC)


FORMAT = FeatureFormat(
    name="NumPy",
    extensions=(".npz", ".npy"),
    tools=("slide2vec", "TIAToolbox"),
    recognises=_recognises,
    read=read_numpy,
    is_features=is_features,
)
