"""PyTorch tensors of patch features, alone or in a dictionary, parsed by the worker of `torch_file.py`.

CLAM, TRIDENT (`saveas pt`), slideflow and slide2vec write the features alone; the coordinates lie beside the file.
"""

from pathlib import Path

import ml_dtypes

from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.companions import companion_fields, has_companion
from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat
from pathflip_jax.data.readers.h5_features import squeezed

# Run in the worker of `guarded.py`: broken files crash PyTorch, which reads what the other does not.
READER, LEGACY = (f"pathflip_jax.data.readers.{module}:read" for module in ("torch_file", "torch_legacy"))
ZIP = b"PK\x03\x04"
# An array that is not a tensor is a text of its bytes in the pickle, of which decoding takes several copies.
COPIES = 6


def read_pt(path: Path, mpp: float | None = None, encoder: str | None = None) -> FeatureFields:
    """Contents of a .pt file: a tensor or array, or a dictionary of features and coordinates. Never unpickles code.

    Features without coordinates are completed by the files beside them (`companions.py`).
    """
    facts, arrays = _parse(path, True)
    if facts["bfloat16"]:
        arrays["features"] = arrays["features"].view(ml_dtypes.bfloat16)
    fields: FeatureFields = {name: squeezed(array) for name, array in arrays.items()}
    if "coords" not in fields and fields["features"].ndim == 2:
        fields |= companion_fields(path, mpp, len(fields["features"]))
    return fields


def finds_coords(path: Path) -> bool:
    """Whether a .pt file has coordinates, in it or beside it; False for a damaged one."""
    if has_companion(path):
        return True
    try:
        return "coords" in _parse(path, False)[0]["names"]
    except (OSError, ValueError, ImportError):
        return False


def _parse(path: Path, with_arrays: bool) -> guarded.Parsed:
    memory = guarded.MEMORY + COPIES * path.stat().st_size
    facts, arrays = guarded.parse(READER, path, with_arrays, memory=memory)
    if "fault" not in facts:
        return facts, arrays
    try:
        return guarded.parse(LEGACY, path, with_arrays, facts["fault"], memory=memory)
    except ImportError:
        with path.open("rb") as file:
            if file.read(len(ZIP)) == ZIP:
                raise ValueError(f"{path}: {facts['fault']}") from None
        cure = "install the extra `torch`, or use the .h5 file next to it"
        raise ImportError(f"{path}: reading this .pt file needs PyTorch; {cure}") from None


def _recognises(start: bytes, path: Path) -> bool:
    """Whether a file is a ZIP archive or a pickle; NumPy's .npz is a ZIP archive too."""
    return start[:1] == b"\x80" or (start[:4] == ZIP and path.suffix.lower() != ".npz")


FORMAT = FeatureFormat(
    name="PyTorch",
    extensions=(".pt",),
    tools=("CLAM", "TRIDENT", "Prov-GigaPath", "slideflow", "slide2vec"),
    recognises=_recognises,
    read=read_pt,
    has_coords=False,
    finds_coords=finds_coords,
)
