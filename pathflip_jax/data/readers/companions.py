"""Coordinates and metadata in files beside a slide's features, for formats whose feature files lack them.

slideflow writes `<slide>.index.npz` and `bags_config.json` beside a tensor, slide2vec `<slide>.meta.json` and a table
of coordinates, TRIDENT and CLAM a `patches/` folder beside the folder of features.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.data.readers import guarded, numpy_file
from pathflip_jax.data.readers.coordinates import EXTRACT
from pathflip_jax.data.readers.feature_format import FeatureFields
from pathflip_jax.data.readers.h5_features import read_sibling, sibling_of
from pathflip_jax.data.storage.json_values import json_object

NUMPY_READER = "pathflip_jax.data.readers.numpy_file:read"
LARGEST_JSON = 2**22
INDEXES = (".index.npz", ".index.npy")  # slideflow's; the latter where its compression is off
SIDECAR, COORDINATES = ".meta.json", ".coordinates.npz"  # slide2vec's
TILES = "tiles"  # slide2vec's folder of coordinates
COMPANIONS = (*INDEXES, COORDINATES)  # ends of names that are not features though their extension suggests it


def has_companion(path: Path) -> bool:
    """Whether the coordinates of a feature file lie beside it."""
    return any(index.is_file() for index in _indexes(path)) or _sidecar(path).is_file() or sibling_of(path) is not None


def companion_fields(path: Path, mpp: float | None, patches: int, rows: np.ndarray | None = None) -> FeatureFields:
    """Fields of a slide from the files beside its features, empty if there are none.

    `rows` are slide2vec's numbers of the tiles that the features belong to. Raises OSError or ValueError, naming the
    file, for one that is damaged or has another number of patches than the features.
    """
    if index := next((index for index in _indexes(path) if index.is_file()), None):
        found, beside = _slideflow_fields(index, mpp), index
    elif _sidecar(path).is_file():
        found, beside = _slide2vec_fields(path, rows)
    elif beside := sibling_of(path):
        found = read_sibling(beside)
    else:
        return {}
    if "coords" in found and len(found["coords"]) != patches:
        places = f"{len(found['coords'])} patches, the features {patches}"
        raise ValueError(f"{path}: {beside} has the coordinates of {places}; they are of two runs: {EXTRACT}")
    return found


def _indexes(path: Path) -> Iterator[Path]:
    return (path.with_name(path.stem + ending) for ending in INDEXES)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.stem + SIDECAR)


def _read_json(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json_object(path, file.read(LARGEST_JSON))


def _number(values: dict, name: str) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and 0 < value < 2**31 else 0.0


def _object(values: dict, name: str) -> dict[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _slideflow_fields(index: Path, mpp: float | None) -> FeatureFields:
    """Fields of a bag of slideflow, whose coordinates are the centres of tiles in pixels at level 0.

    A tile's edge is stated in micrometres, or by a magnification ("20x"), which says nothing without the slide.
    """
    names = (numpy_file.ALONE, "arr_0", "locations")
    _, arrays = guarded.parse(NUMPY_READER, index, names)
    centres = next((arrays[name] for name in ("locations", "arr_0", numpy_file.ALONE) if name in arrays), None)
    if centres is None or centres.ndim != 2 or centres.shape[1] != 2:
        found = "no array of locations" if centres is None else f"locations of shape {centres.shape}"
        raise ValueError(f"{index}: {found}, expected the x, y of a bag's tiles; export the bags of slideflow again")
    fields: FeatureFields = {"coords": centres, "centres": True}
    config = index.with_name("bags_config.json")
    if not config.is_file():
        return fields | {"notes": ("no bags_config.json beside the bags: their encoder and tile size are unknown",)}
    stated = _read_json(config)
    extractor = _object(stated, "extractor").get("class")
    if isinstance(extractor, str):
        fields["encoder"] = extractor.rpartition(".")[2]
    if mpp and (tile_um := _number(stated, "tile_um")):
        fields["patch_size"] = int(tile_um / mpp)  # as slideflow rounds
    return fields


def _slide2vec_fields(path: Path, rows: np.ndarray | None) -> tuple[FeatureFields, Path]:
    """Fields of a slide of slide2vec and the file of its coordinates, corners in pixels at level 0.

    The folders may have been moved: coordinates are looked for beside the features before the path that is stated.
    """
    sidecar = _sidecar(path)
    stated = _read_json(sidecar)
    kind = stated.get("artifact_type")
    if kind not in ("tile_embeddings", None):
        cure = "pass the slide's file in tile_embeddings"
        raise ValueError(f"{path}: {sidecar.name} says that these are {kind}, not the features of patches; {cure}")
    fields: FeatureFields = {"patch_size": round(_number(stated, "tile_size_lv0"))}
    if isinstance(encoder := stated.get("encoder_name"), str):
        fields["encoder"] = encoder
    told = str(stated.get("coordinates_npz_path") or "")
    name = Path(told).name or path.stem + COORDINATES
    places = [parent / TILES / name for parent in path.absolute().parents[1:4]]
    table = next((place for place in (*places, Path(told)) if told and place.is_file()), None)
    if table is None:
        cure = "copy slide2vec's folder `tiles` beside that of the features"
        raise ValueError(f"{path}: its coordinates ({told or name}) are missing; {cure}")
    _, arrays = guarded.parse(NUMPY_READER, table, ("x", "y", "tile_index"))
    if "x" not in arrays or "y" not in arrays or arrays["x"].shape != arrays["y"].shape or arrays["x"].ndim != 1:
        raise ValueError(f"{table}: no arrays 'x' and 'y' of one length, expected coordinates of hs2p; {EXTRACT}")
    coords = np.stack([arrays["x"], arrays["y"]], axis=1)
    fields["coords"] = coords if rows is None else _selected(table, coords, arrays.get("tile_index"), rows)
    meta = table.with_name(table.name.removesuffix(".npz") + SIDECAR)
    return fields | (_tiling_fields(_read_json(meta)) if meta.is_file() else {}), table


def _selected(table: Path, coords: np.ndarray, numbers: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Coordinates of the tiles `rows`, by the tiles' `numbers` in their table."""
    numbers = np.arange(len(coords)) if numbers is None else numbers
    order = np.argsort(numbers, kind="stable")
    places = np.searchsorted(numbers[order], rows).clip(max=max(0, len(numbers) - 1))
    if len(numbers) != len(coords) or (len(rows) and (not len(coords) or (numbers[order][places] != rows).any())):
        raise ValueError(f"{table}: lacks some of the tiles that have features; they are of two runs: {EXTRACT}")
    return coords[order][places]


def _tiling_fields(stated: dict) -> FeatureFields:
    """Fields from the description of the tiles that hs2p writes for slide2vec."""
    slide, tiling = _object(stated, "slide"), _object(stated, "tiling")
    fields: FeatureFields = {"mpp": _number(slide, "base_spacing_um")}
    size = slide.get("dimensions")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(edge, int) and 0 < edge < 2**31 for edge in size):
        fields |= {"width": size[0], "height": size[1]}
    for name, key in (("patch_size", "tile_size_lv0"), ("step", "step_px_lv0")):
        if number := _number(tiling, key):
            fields[name] = round(number)
    return fields
