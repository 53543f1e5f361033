"""PyTorch feature files: a tensor or array, or a dictionary of them; runs only in the worker of `guarded.py`.

They are read without PyTorch (`torch_archive.py`), except for the few that `torch_legacy.py` reads.
"""

import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pathflip_jax.data.readers.guarded import Parsed, Refused, shared_empty
from pathflip_jax.data.readers.torch_archive import read_archive

DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
INTEGERS = tuple(np.dtype(dtype) for dtype in (np.int16, np.int32, np.int64))
FEATURES = ("features", "feats", "tile_embeds", "embeddings")  # tile_embeds: Prov-GigaPath's
COORDS = "coords"
MOST_NAMES = 8
SAVE_NUMBERS = "save its numbers: torch.save(torch.tensor(features), path)"
_WEIGHTS = re.compile(r"\.(weight|bias)$")


def read(path: str, with_arrays: bool) -> Parsed:
    """Features of a .pt file, and coordinates if it is a dictionary that has them; only their names in the fact
    `names` without `with_arrays`.

    bfloat16, which NumPy lacks, is returned as int16 with the fact `bfloat16`. Never unpickles code. A file that
    `torch_archive.py` refuses gives only the fact `fault`, its reason. Raises Refused for anything but floating point
    numbers, and for a tensor larger than its file: strides of 0 can claim terabytes.
    """
    try:
        found = read_archive(Path(path), numpy_arrays=True)
    except ValueError as error:
        return {"fault": str(error).removeprefix(f"{path}: ")}, {}
    return parsed(found, path, with_arrays)


def parsed(found: Any, path: str, with_arrays: bool) -> Parsed:
    """Facts and arrays of a file's content, in which tensors are arrays."""
    arrays = _chosen(found)
    facts = {"names": list(arrays), "bfloat16": arrays["features"].dtype == ml_dtypes.bfloat16}
    if not with_arrays:
        return facts, {}
    return facts, {name: _shared(array, path) for name, array in arrays.items()}


def _chosen(found: Any) -> dict[str, np.ndarray]:
    """Arrays by name: the single one, or those of a dictionary under known names."""
    if isinstance(found, dict):
        name = next((name for name in FEATURES if isinstance(found.get(name), np.ndarray)), "")
        if not name:
            raise Refused(_other_dictionary(found))
        coords = found.get(COORDS)
        arrays = {"features": found[name]}
        if coords is not None and not isinstance(coords, np.ndarray):
            raise Refused(f"holds 'coords' of type {type(coords).__name__}, expected a tensor [patches, 2]")
        if coords is not None:
            arrays[COORDS] = coords
    elif isinstance(found, np.ndarray):
        arrays = {"features": found}
    else:
        kind = type(found).__name__
        raise Refused(f"holds a {kind}, expected one tensor [patches, width]; save the features alone")
    for name, array in arrays.items():
        if array.dtype.newbyteorder("=") not in _allowed(name):
            raise unsupported(name, f"torch.{array.dtype}")
    return arrays


def _other_dictionary(found: dict) -> str:
    names = ", ".join(str(key)[:40] for key in list(found)[:MOST_NAMES])
    if sum(bool(_WEIGHTS.search(str(key))) for key in found) > 1 or "state_dict" in found:
        return f"holds the weights of a model ({names}), not the features of a slide; pass the slide's feature file"
    return (
        f"holds a dict of {len(found)} entries ({names}), expected one tensor [patches, width], or a dict of "
        f"{' or '.join(FEATURES)}, and coords; save the features alone"
    )


def _allowed(name: str) -> tuple[np.dtype, ...]:
    return DTYPES[2:] + INTEGERS if name == COORDS else DTYPES


def unsupported(name: str, kind: str) -> Refused:
    """Objection to the dtype of a tensor."""
    expected = ", ".join(str(dtype) for dtype in _allowed(name)[:3])
    return Refused(f"its {name} are {kind}; expected {expected}; extract them again")


def _shared(array: np.ndarray, path: str) -> np.ndarray:
    """Copy in shared memory, in this machine's byte order."""
    array = array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
    copy = shared_empty(array.shape, array.dtype.newbyteorder("="), os.path.getsize(path), "a tensor")
    copy[...] = array
    return copy
