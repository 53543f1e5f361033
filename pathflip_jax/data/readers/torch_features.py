"""PyTorch tensors of patch features, alone or in a dictionary, parsed by the worker of `torch_file.py`."""

from pathlib import Path

import ml_dtypes

from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat
from pathflip_jax.data.readers.h5_features import squeezed

# Runs in the worker of `guarded.py`: broken files crash PyTorch.
READER = "pathflip_jax.data.readers.torch_file:read"


def read_pt(path: Path, mpp: float | None = None, encoder: str | None = None) -> FeatureFields:
    """Contents of CLAM's .pt: a tensor, or a dictionary of features and coordinates. Never unpickles code."""
    try:
        facts, arrays = guarded.parse(READER, path)
    except ImportError:
        cure = "install the extra `torch`, or use the .h5 file next to it"
        raise ImportError(f"{path}: reading a .pt file needs PyTorch; {cure}") from None
    if facts["bfloat16"]:
        arrays["features"] = arrays["features"].view(ml_dtypes.bfloat16)
    return {name: squeezed(array) for name, array in arrays.items()}


def _recognises(start: bytes, path: Path) -> bool:
    """Whether a file is a ZIP archive or a pickle; NumPy's .npz is a ZIP archive too."""
    return start[:1] == b"\x80" or (start[:4] == b"PK\x03\x04" and path.suffix.lower() != ".npz")


FORMAT = FeatureFormat(
    name="PyTorch",
    extensions=(".pt",),
    tools=("CLAM", "Prov-GigaPath"),
    recognises=_recognises,
    read=read_pt,
    has_coords=False,
)
