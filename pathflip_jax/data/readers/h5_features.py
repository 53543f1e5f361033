"""HDF5 patch features in the layouts of TRIDENT, CLAM, STAMP and AtlasPatch, parsed by the worker of `hdf5.py`."""

import math
from pathlib import Path

import numpy as np

from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.coordinates import smallest_step
from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat, is_text, slide_id_of
from pathflip_jax.data.storage import blocks

# Runs in the worker of `guarded.py`: broken files crash and hang libhdf5.
READER = "pathflip_jax.data.readers.hdf5:read"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
EXTENSIONS = (".h5", ".hdf5")
# Nominal micrometres per pixel of a scan at 1x (40x is 0.25); scanners differ from it by up to 10 percent.
UM_TIMES_MAGNIFICATION = 10.0
LEVEL0_MPP = "level0_mpp"  # our own attribute beside TRIDENT's: the exact resolution, in `export/trident.py`
HEST_UM = 112.0  # edge of HEST-bench's patches: 224 px at 0.5 um per px
STAMP1_PIXELS, STAMP1_UM = 224, 256.0  # STAMP 1 uses pixels of its tiles: 224 of them are 256 um
OWN_LAYOUT = (
    "rename it to 'features' if its rows are patches whose top-left corners, in pixels at level 0, are 'coords'"
)


def read_h5(path: Path, mpp: float | None, encoder: str | None) -> FeatureFields:
    """Contents of an HDF5 file in any of these layouts.

    `mpp` converts STAMP's micrometres to pixels; `encoder` selects among the features of several encoders.
    """
    facts, arrays = guarded.parse(READER, path, True, encoder or "")
    arrays |= {name: _array_at(path, *place) for name, place in facts["places"].items()}
    if "feats" in arrays:
        return _stamp_fields(path, facts, arrays, mpp)
    if "features" not in arrays:
        raise ValueError(f"{path}: {_other_layout(facts['names'])}")
    attributes = facts["features"]
    named = _text(attributes.get("encoder")) or facts.get("encoder", "")
    fields = {"features": squeezed(arrays["features"]), "encoder": named}
    if "coords" not in arrays:
        if others := [name for name in facts["names"] if name not in ("features", "passports", "slide_features")]:
            fields["notes"] = (f"no 'coords' in the file; not read: {', '.join(map(repr, others[:5]))}",)
        return fields
    fields["coords"] = squeezed(arrays["coords"])
    if "barcodes" in facts["names"]:
        return fields | _spot_fields(path, mpp)
    fields |= _grid_attributes(facts["/"] | facts["coords"])
    if fields["coords"].ndim == 2 and fields["coords"].shape[1] == 5 and "encoder" in facts:
        fields |= _atlas_coords(path, fields)
    if "patch_size" not in fields and (sibling := sibling_of(path)):
        fields |= read_sibling(sibling, with_coords=False)
    return fields


def holds_features(path: Path) -> bool:
    """Whether a file in a `patches/` folder holds features, as AtlasPatch's do, besides the coordinates of others'."""
    facts, _ = guarded.parse(READER, path, False, "")
    return "features" in facts or bool(facts.get("encoders"))


def _other_layout(names: list[str]) -> str:
    """Message for a file without patch features."""
    if "embeddings" in names:
        return f"'embeddings' of a kind that is not stated, expected 'features' of a slide's patches; {OWN_LAYOUT}"
    if "img" in names and "coords" in names:
        return (
            "images of patches ('img', as HEST and patch extractors write them), not their features; pass the file of "
            "the features extracted from them, HEST-bench's with 'embeddings'"
        )
    cure = "the layout is unknown; save a slide's patch features as 'features', their corners at level 0 as 'coords'"
    if "coords" in names:
        cure = "it holds coordinates; pass the file of the features extracted there"
    return f"datasets {names}, expected 'features' [patches, width]; {cure}"


def _spot_fields(path: Path, mpp: float | None) -> dict:
    """Patch size and notes of HEST-bench's patches about the spots of an assay, by the patches' images or by mpp.

    The spots of an assay are not a grid of patches, so that their gaps tell no patch size.
    """
    sibling, fields = sibling_of(path), {"spots": True}
    if sibling:
        facts, _ = guarded.parse(READER, sibling, False, "")
        attributes = facts.get("coords", {})
        fields |= {"patch_size": _pixels(_number(attributes, "patch_size_src"))}
        if pixel_size := _number(attributes, "pixel_size"):
            fields["mpp"] = pixel_size
    if not fields.get("patch_size") and mpp:
        fields |= {
            "patch_size": _pixels(HEST_UM / mpp),
            "notes": (f"patches of HEST-bench: {HEST_UM:g} um, 224 px at 0.5 um per px",),
        }
    return fields


def _array_at(path: Path, offset: int, shape: list[int], dtype: str) -> np.ndarray:
    """Contiguous array in a file; large ones are mapped, so that only accessed parts are read."""
    if math.prod(shape) * np.dtype(dtype).itemsize > blocks.LARGE:
        array = np.memmap(path, dtype, "r", offset, tuple(shape))
    else:
        array = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def squeezed(array: np.ndarray) -> np.ndarray:
    """Array without a leading axis of size one; an empty slide may have been written flat."""
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    return array.reshape(0, 2) if array.ndim == 1 and not array.size else array


def _text(value) -> str:
    return "" if value is None or str(value) == "None" else str(value)


def _number(attributes: dict, name: str) -> float:
    """Numeric attribute, the first of several values; 0 if it is absent or empty."""
    try:
        value = float(np.ravel(attributes[name])[0]) if name in attributes else 0.0
    except (TypeError, ValueError, IndexError):
        return 0.0
    return value if 0 <= value < 2**31 else 0.0


def _pixels(value: float) -> int:
    """Size in whole pixels; 0, for unknown, if it is absurd."""
    return round(value) if 0 <= value < 2**31 else 0


def _grid_attributes(attributes: dict) -> dict:
    """Patch size, mpp and slide size from the attributes that TRIDENT, CLAM or AtlasPatch store with `coords`.

    Some versions store them as floats. TRIDENT's mpp is the nominal one of its magnification, unless our own attribute
    states it (`LEVEL0_MPP`). CLAM's `patch_size` is in pixels of `patch_level`, TRIDENT's and its `overlap`
    in pixels at the target magnification; older TRIDENT has no `patch_size_level0`.
    """
    fields = {}
    downsample = _number(attributes, "downsample") or 1.0
    level0, target = _number(attributes, "level0_magnification"), _number(attributes, "target_magnification")
    scale = level0 / target if level0 and target else downsample
    patch_size = _number(attributes, "patch_size_level0") or _number(attributes, "patch_size") * scale
    if patch_size := _pixels(patch_size):
        fields["patch_size"] = patch_size
        if "overlap" in attributes:
            fields["step"] = patch_size - _number(attributes, "overlap") * scale
    if mpp := _number(attributes, LEVEL0_MPP) or _number(attributes, "mpp"):  # the latter is AtlasPatch's
        fields["mpp"] = mpp
    elif level0:  # nominal
        fields["mpp"] = UM_TIMES_MAGNIFICATION / level0
    width, height = _number(attributes, "level0_width"), _number(attributes, "level0_height")
    size = attributes.get("level_dim")
    if not width and isinstance(size, list) and np.shape(size) == (2,):
        width, height = size[0] * downsample, size[1] * downsample
    return fields | {"width": _pixels(width), "height": _pixels(height)}


def _atlas_coords(path: Path, fields: dict) -> dict:
    """Coordinates from AtlasPatch's rows x, y, width, height, level: the corner in level-0 pixels, the size at level.

    Raises ValueError for differing sizes, as a slide has a single patch size.
    """
    coords = fields["coords"]
    sizes = np.unique(coords[:, 2:], axis=0)
    if len(sizes) > 1:
        raise ValueError(
            f"{path}: 'coords' has patches of {len(sizes)} sizes and levels, expected one; extract the slide again"
        )
    found = {"coords": coords[:, :2]}
    if "patch_size" not in fields and len(sizes) and sizes[0, 2] == 0 and sizes[0, 0] == sizes[0, 1]:
        found["patch_size"] = _pixels(float(sizes[0, 0]))
    return found


def sibling_of(path: Path) -> Path | None:
    """File of a slide in the `patches/` folder next to a feature folder (CLAM `X.h5`, TRIDENT `X_patches.h5`).

    It is searched for next to a link and next to the link's target.
    """
    slide_id = slide_id_of(path)
    for parent in dict.fromkeys([*path.absolute().parents[1:3], *path.resolve().parents[1:3]]):
        for name in (f"{slide_id}.h5", f"{slide_id}_patches.h5"):
            if (sibling := parent / "patches" / name).is_file():
                return sibling
    return None


def read_sibling(path: Path, with_coords: bool = True) -> FeatureFields:
    """Fields of a slide from its file in the `patches/` folder, with its coordinates or only their attributes."""
    facts, arrays = guarded.parse(READER, path, with_coords, "")
    if "coords" not in facts:
        raise OSError(f"{path}: the file has no patch coordinates; write it again, or pass patch_size")
    fields: FeatureFields = _grid_attributes(facts["/"] | facts["coords"])
    if not with_coords:
        return fields
    arrays |= {name: _array_at(path, *place) for name, place in facts["places"].items()}
    fields["coords"] = squeezed(arrays["coords"])
    if fields["coords"].ndim == 2 and fields["coords"].shape[1] == 5:
        fields |= _atlas_coords(path, fields)
    return fields


def _stamp_fields(path: Path, facts: dict, arrays: dict[str, np.ndarray], mpp: float | None) -> dict:
    """Fields of STAMP's `feats`: coordinates in um, in STAMP 1 and marugoto in tile pixels (224 px = 256 um)."""
    top = facts["/"]
    fields = {"features": squeezed(arrays["feats"]), "encoder": _text(top.get("extractor"))}
    if "coords" not in arrays:
        return fields
    coords, unit = squeezed(arrays["coords"]).astype(np.float64), _text(top.get("unit"))
    tile_um = _number(top, "tile_size_um") or (_number(top, "tile_size") if unit == "um" else 0.0)
    if unit in ("", "um") and tile_um:
        found = f"STAMP coordinates are in micrometres (tiles of {tile_um:g} um)"
    elif not unit and fields["encoder"] and _is_stamp1(top, coords):
        coords, tile_um = coords / STAMP1_PIXELS * STAMP1_UM, STAMP1_UM
        found = "STAMP 1 coordinates are in pixels of its tiles (224 px are 256 um)"
    else:
        found = f"in {unit!r}" if unit else "in a unit that is not stated"
        raise ValueError(
            f"{path}: 'feats' with coordinates {found}, without the tile size that STAMP writes (tile_size_um); "
            f"{OWN_LAYOUT}, else extract the slide again"
        )
    if not mpp:
        raise ValueError(
            f"{path}: {found}, and the file does not say the slide's mpp; pass mpp, such as --mpp 0.25 for a 40x scan"
        )
    fields["coords"] = np.round(coords / mpp)
    return fields | {"patch_size": _pixels(tile_um / mpp), "mpp": mpp}


def _is_stamp1(attributes: dict, coords: np.ndarray) -> bool:
    size = _number(attributes, "tile_size")
    if not size and coords.ndim == 2 and len(coords):
        size = smallest_step(coords)
    return round(size) == STAMP1_PIXELS


def _recognises(start: bytes, path: Path) -> bool:
    """Whether a file has the HDF5 signature at byte 0, 512, 1024, 2048, ..., or only an extension of HDF5.

    Faults of the latter are reported by libhdf5, unless the file is text.
    """
    offset = 0
    with path.open("rb") as file:
        while data := file.read(len(SIGNATURE)):
            if data == SIGNATURE:
                return True
            offset = max(512, 2 * offset)
            file.seek(offset)
    return path.suffix.lower() in EXTENSIONS and not is_text(start)


FORMAT = FeatureFormat(
    name="HDF5",
    extensions=EXTENSIONS,
    tools=("CLAM", "TRIDENT", "STAMP", "AtlasPatch", "HEST-bench"),
    recognises=_recognises,
    read=read_h5,
)
