"""PyTorch feature files: a tensor, or a dictionary of tensors; runs only in the worker of `guarded.py`.

No other file imports PyTorch to read features.
"""

import os
import re
from typing import Any

import numpy as np
import torch

from pathflip_jax.data.readers.guarded import Parsed, Refused, shared_empty

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64)
FEATURES = ("features", "feats", "tile_embeds", "embeddings")  # tile_embeds: Prov-GigaPath's
MOST_NAMES = 8
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def read(path: str) -> Parsed:
    """Features of a .pt file, and coordinates if it is a dictionary that has them.

    bfloat16, which NumPy lacks, is returned as int16 with the fact `bfloat16`. Never unpickles code. Raises Refused for
    anything but floating point tensors, and for one larger than its file: strides of 0 can claim terabytes.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises different types for different kinds of damage
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
            "a pickled NumPy array (as TRIDENT writes with saveas pt), which cannot be read without running code; pass "
            "the slide's .h5 file, or save the tensor: torch.save(torch.from_numpy(features), path)"
        )
    return f"not a tensor that can be read without running code ({message.splitlines()[0]}); save it again"


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    """Tensors by name: the single tensor, or those of a dictionary under known names."""
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
        allowed = DTYPES if name == "features" else DTYPES[2:] + INTEGERS
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in allowed:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed[:3])
            raise Refused(f"its {name} are {kind}; expected {expected}; extract them again")
        tensors[name] = tensor.detach()
    return tensors


def _array(tensor: torch.Tensor, path: str) -> np.ndarray:
    array = tensor.numpy()
    copy = shared_empty(array.shape, array.dtype, os.path.getsize(path), "a tensor")
    copy[...] = array
    return copy
