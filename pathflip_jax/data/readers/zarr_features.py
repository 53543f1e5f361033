"""Zarr stores of patch features of LazySlide, SpatialData and TIAToolbox 2, parsed by the worker of `guarded.py`."""

from pathlib import Path

from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat
from pathflip_jax.data.readers.h5_features import squeezed
from pathflip_jax.data.readers.numpy_features import bounds_fields
from pathflip_jax.data.storage.folders import is_store

# Run in the worker of `guarded.py`.
KIND = "pathflip_jax.data.readers.zarr_nodes:read_kind"
ARRAYS, TABLE = "pathflip_jax.data.readers.zarr_store:read_arrays", "pathflip_jax.data.readers.zarr_tables:read_table"
FACTS = ("patch_size", "step", "mpp", "width", "height", "encoder")


def read_zarr(path: Path, mpp: float | None = None, encoder: str | None = None) -> FeatureFields:
    """Features of a slide; `encoder` selects among those of several encoders."""
    kind = guarded.parse(KIND, path)[0]["kind"]
    if kind not in ("arrays", "tables"):
        raise ValueError(f"{path}: {_other_store(kind)}")
    try:
        chosen = (TABLE, encoder or "") if kind == "tables" else (ARRAYS,)
        facts, arrays = guarded.parse(chosen[0], path, *chosen[1:])
    except ImportError:
        raise ImportError(f"{path}: reading a Zarr store needs the package zarr; install the extra `zarr`") from None
    fields: FeatureFields = {name: squeezed(array) for name, array in arrays.items()}
    if facts.get("coords") == "coordinates":
        fields |= bounds_fields(arrays["coords"], str(path))
    return fields | {name: facts[name] for name in FACTS if facts.get(name)}


def _other_store(kind: str) -> str:
    expected = "expected LazySlide's tables of features, or arrays 'features' and 'coords'"
    cure = "pass the slide's store of features"
    if kind.startswith("an image"):
        cure = "it is a slide: extract its features first"
    return f"a Zarr store that holds {kind}, {expected}; {cure}"


def is_features(path: Path) -> bool:
    """Whether a store holds features, or is damaged: reading it then reports the fault. Images are stores too."""
    try:
        return guarded.parse(KIND, path)[0]["kind"] in ("arrays", "tables")
    except (OSError, ValueError):
        return True


FORMAT = FeatureFormat(
    name="Zarr",
    extensions=(".zarr",),
    tools=("LazySlide", "SpatialData", "TIAToolbox"),
    recognises=lambda start, path: is_store(path),
    read=read_zarr,
    is_features=is_features,
    is_folder=True,
)
