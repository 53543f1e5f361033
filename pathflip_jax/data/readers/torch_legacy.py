"""PyTorch feature files that only PyTorch reads; runs only in the worker of `guarded.py`.

Those are files from before version 1.6 and of dtypes of which `torch_archive.py` knows nothing. It is a module of its
own as the worker imports modules before it limits its memory. No other file imports PyTorch to read features.
"""

import re
from typing import Any

import ml_dtypes
import torch

from pathflip_jax.data.readers import torch_file
from pathflip_jax.data.readers.guarded import Parsed, Refused

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16, torch.int32, torch.int64)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def read(path: str, with_arrays: bool, fault: str) -> Parsed:
    """As `torch_file.read`, of a file that it refused for `fault`. Never unpickles code."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises different types for different kinds of damage
        raise Refused(_reason(str(error) or type(error).__name__, fault)) from None
    if isinstance(found, dict):
        wanted = [name for name in found if name in (*torch_file.FEATURES, torch_file.COORDS)]
        found = found | {name: _as_array(found[name], name) for name in wanted}
    else:
        found = _as_array(found, torch_file.FEATURES[0])
    return torch_file.parsed(found, path, with_arrays)


def _as_array(value: Any, name: str) -> Any:
    """A tensor as an array, and anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES:
        raise torch_file.unsupported(name, f"{value.dtype}, {value.layout}, on {value.device}")
    value = value.detach()
    is_bfloat16 = value.dtype == torch.bfloat16
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else value.numpy()


def _reason(message: str, fault: str) -> str:
    if "array of objects" in fault:
        return f"a pickled NumPy array of Python objects; {torch_file.SAVE_NUMBERS}"
    message = _COLOURS.sub("", message).splitlines()[0]
    return f"not a tensor that can be read without running code ({message}); save it again"
