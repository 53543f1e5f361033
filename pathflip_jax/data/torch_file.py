"""CLAM's .pt files: one tensor each; runs in the worker of `guarded.py` only, which alone imports PyTorch for it."""

import os

import torch

from pathflip_jax.data.guarded import Parsed, Refused, shared_empty

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read(path: str) -> Parsed:
    """The features of a .pt file; bfloat16, which NumPy lacks, comes as int16, and `bfloat16` says so.

    Never unpickles code. Raises Refused for what is no tensor of floating point numbers, or one larger than its file:
    strides of 0 make terabytes of nothing.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way of being broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"not a tensor that can be read without running code ({reason}); save it again") from None
    if not isinstance(tensor, torch.Tensor):
        raise Refused(f"holds a {type(tensor).__name__}, expected one tensor [patches, width]; save the features alone")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise Refused(f"its features are {found}; expected float16, bfloat16 or float32; extract them again")
    tensor = tensor.detach()
    bfloat16 = tensor.dtype == torch.bfloat16
    tensor = tensor.view(torch.int16) if bfloat16 else tensor
    array = tensor.numpy()
    features = shared_empty(array.shape, array.dtype, os.path.getsize(path), "a tensor")
    features[...] = array
    return {"bfloat16": bfloat16}, {"features": features}
