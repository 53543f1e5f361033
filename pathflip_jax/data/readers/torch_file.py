"""Feature files of PyTorch: a tensor, or a dictionary of tensors; runs in the worker of `guarded.py` only.

No other file imports PyTorch to read features.
"""

import os
import re
from typing import Any

import numpy as np
import torch

from pathflip_jax.data.readers.guarded import Parsed, Refused, shared_empty

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int16, torch.int32, torch.int64)
FEATURES = ("features", "feats", "tile_embeds", "embeddings")  # tile_embeds: Prov-GigaPath's
MOST_NAMES = 8
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def read(path: str) -> Parsed:
    """The features of a .pt file, and the coordinates where it is a dictionary that has them.

    bfloat16, which NumPy lacks, comes as int16, and `bfloat16` says so. Never unpickles code. Raises Refused for what
    is no tensor of floating point numbers, or one larger than its file: strides of 0 make terabytes of nothing.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way of being broken
        raise Refused(_reason(str(error) or type(error).__name__)) from None
    tensors = _tensors(found)
    bfloat16 = tensors["features"].dtype == torch.bfloat16
    if bfloat16:
        tensors["features"] = tensors["features"].view(torch.int16)
    return {"bfloat16": bfloat16}, {name: _array(tensor, path) for name, tensor in tensors.items()}


def _reason(message: str) -> str:
    message = _COLOURS.sub("", message)
    if "numpy" in message and ("_reconstruct" in message or "multiarray" in message):
        return (
            "a pickled NumPy array (as TRIDENT writes with saveas pt), which cannot be read without running code; give "
            "the .h5 of the slide, or save the tensor: torch.save(torch.from_numpy(features), path)"
        )
    return f"not a tensor that can be read without running code ({message.splitlines()[0]}); save it again"


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    """The tensor, or those of a dictionary, by the names that a feature file has them under."""
    if isinstance(found, dict):
        name = next((name for name in FEATURES if isinstance(found.get(name), torch.Tensor)), "")
        if not name:
            names = ", ".join(str(key)[:40] for key in list(found)[:MOST_NAMES])
            raise Refused(
                f"holds a dict of {len(found)} entries ({names}), expected one tensor [patches, width], or a dict of "
                f"{' or '.join(FEATURES)}, and coords; save the features alone"
            )
        coords = found.get("coords")
        tensors = {"features": found[name]}
        if coords is not None and not isinstance(coords, torch.Tensor):
            raise Refused(f"holds 'coords' of type {type(coords).__name__}, expected a tensor [patches, 2]")
        if coords is not None:
            tensors["coords"] = coords
    elif isinstance(found, torch.Tensor):
        tensors = {"features": found}
    else:
        kind = type(found).__name__
        raise Refused(f"holds a {kind}, expected one tensor [patches, width]; save the features alone")
    for name, tensor in tensors.items():
        right = DTYPES if name == "features" else DTYPES[2:] + WHOLE
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in right:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in right[:3])
            raise Refused(f"its {name} are {kind}; expected {expected}; extract them again")
        tensors[name] = tensor.detach()
    return tensors


def _array(tensor: torch.Tensor, path: str) -> np.ndarray:
    array = tensor.numpy()
    copy = shared_empty(array.shape, array.dtype, os.path.getsize(path), "a tensor")
    copy[...] = array
    return copy
