"""Groups and arrays in a Zarr store, version 2 or 3, by their JSON files; runs only in the worker of `guarded.py`."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

from pathflip_jax.data.readers.guarded import Parsed, Refused
from pathflip_jax.data.storage.folders import STORE_FILES
from pathflip_jax.data.storage.json_values import json_object

FEATURES, COORDS = "features", ("coordinates", "coords")  # TIAToolbox's bounds, or plain corners
TABLES = "tables"
CONSOLIDATED = (".zmetadata", "zmetadata")  # of version 2, the latter by older SpatialData
LARGEST_JSON = 2**25  # bytes
MOST_NODES = 1000
COPY = "the store was copied in part, or its writing did not finish: copy it again with all of its files"


def read_kind(path: str) -> Parsed:
    """Fact `kind` of a store: "arrays" (TIAToolbox, or `features` and `coords`), "tables" (LazySlide, SpatialData) or a
    description of another content.

    Raises Refused for a store that lacks metadata.
    """
    store = Path(path)
    root = node(store)
    if root is None:
        raise Refused(f"no {' or '.join(STORE_FILES)} in the folder, so that it is no Zarr store; {COPY}")
    _check_consolidated(store, root)
    return {"kind": _kind(store, root)}, {}


def node(folder: Path) -> dict[str, Any] | None:
    """Metadata of a group or array in either version, with the keys `attributes` and `node_type`, or None."""
    if (file := folder / "zarr.json").is_file():
        found = _json(file)
        return {"attributes": {}} | found
    for name, kind in ((".zarray", "array"), (".zgroup", "group")):
        if (file := folder / name).is_file():
            attributes = _json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}
            return _json(file) | {"node_type": kind, "attributes": attributes}
    return None


def groups_of(folder: Path) -> list[str]:
    """Names of the folders in a group."""
    return sorted(entry.name for entry in islice(os.scandir(folder), MOST_NODES) if entry.is_dir())


def _kind(store: Path, root: dict[str, Any]) -> str:
    if root["node_type"] == "array":
        return f"a single array of shape {tuple(root.get('shape', ()))}"
    for name in (FEATURES, *COORDS, TABLES):
        if (store / name).is_dir() and node(store / name) is None:
            raise Refused(f"the metadata of {name!r} are missing; {COPY}")
    if node(store / FEATURES) and any(node(store / name) for name in COORDS):
        return "arrays"
    if (store / TABLES).is_dir() and groups_of(store / TABLES):
        return "tables"
    attributes = root["attributes"]
    if "multiscales" in attributes or "multiscales" in (attributes.get("ome") or {}) or "omero" in attributes:
        return "an image (OME-Zarr)"
    return f"a group of {', '.join(groups_of(store)[:8]) or 'nothing'}"


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > LARGEST_JSON:
        raise Refused(
            f"{file.name} has {file.stat().st_size} bytes, expected a small description; write the store again"
        )
    try:
        return json_object(file, file.read_bytes())
    except ValueError:
        raise Refused(f"{file.parent.name}/{file.name} is damaged or empty; {COPY}") from None


def _check_consolidated(store: Path, root: dict[str, Any]) -> None:
    """Raise Refused if the root lists groups and arrays that are not there."""
    listed = (root.get("consolidated_metadata") or {}).get("metadata") or {}
    expected = [f"{name}/zarr.json" for name in listed]
    for name in CONSOLIDATED:
        if (store / name).is_file():
            expected += [key for key in _json(store / name).get("metadata") or {} if not key.endswith(".zattrs")]
    missing = [name for name in expected if not (store / name).is_file()]
    if missing:
        raise Refused(f"{len(missing)} of its {len(expected)} groups and arrays are missing ({missing[0]}); {COPY}")
