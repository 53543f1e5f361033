"""Tables of features in the Zarr stores of LazySlide and SpatialData; runs only in the worker of `guarded.py`.

A table of AnnData, `tables/<encoder>_tiles`, has features `X` and names the shapes that its rows belong to; those are
squares in pixels at level 0 in a GeoParquet table, `shapes/tiles`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pathflip_jax.data.readers.guarded import Parsed, Refused
from pathflip_jax.data.readers.zarr_nodes import COPY, TABLES, groups_of, node
from pathflip_jax.data.readers.zarr_store import read_array

SHAPES, PARQUET = "shapes", "shapes.parquet"
DENSE = ("array",)  # encodings of X that hold features; genes are sparse
# A polygon of five points in well-known binary, little-endian: byte order, type, rings, points, x and y of each.
SQUARE = np.dtype([("order", "u1"), ("type", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))])
POLYGON = 3


def read_table(path: str, encoder: str) -> Parsed:
    """Arrays `features` and `coords` of the table of an encoder; the facts are patch size, step, mpp, size and encoder.

    Raises Refused if the store has no such table, or several and none is chosen.
    """
    store = Path(path)
    tables = _feature_tables(store)
    name = _choose(tables, encoder)
    region = tables[name]
    corners, edge, numbers = _squares(store, region)
    instance = node(store / TABLES / name)["attributes"].get("instance_key")
    rows = _rows(store, name, instance, numbers)
    facts = {"encoder": _encoder(name, region), "patch_size": edge} | _slide_facts(node(store)["attributes"], region)
    return facts, {"features": read_array(store, f"{TABLES}/{name}/X"), "coords": corners[rows]}


def _feature_tables(store: Path) -> dict[str, str]:
    """Names of the tables of dense numbers about shapes, with the name of these shapes."""
    found, others = {}, []
    for name in groups_of(store / TABLES):
        table, values = node(store / TABLES / name), node(store / TABLES / name / "X")
        region = (table or {"attributes": {}})["attributes"].get("region")
        region = region[0] if isinstance(region, list) and len(region) == 1 else region
        kind = (values or {"attributes": {}})["attributes"].get("encoding-type")
        if isinstance(region, str) and kind in DENSE and values["node_type"] == "array" and _is_name(region):
            found[name] = region
        else:
            others.append(name)
    if not found:
        raise Refused(
            f"tables {', '.join(others[:8])}, none of which holds features of tiles (dense numbers X about shapes); "
            "extract features with LazySlide (`tl.feature_extraction`) and write the store again"
        )
    return found


def _is_name(text: str) -> bool:
    return "/" not in text and "\\" not in text and text.strip(".") != ""


def _encoder(table: str, region: str) -> str:
    return table.removesuffix(f"_{region}")


def _choose(tables: dict[str, str], encoder: str) -> str:
    wanted = encoder.casefold()
    chosen = [name for name in tables if wanted in (name.casefold(), _encoder(name, tables[name]).casefold())]
    if len(chosen) == 1:
        return chosen[0]
    if len(tables) == 1:
        return next(iter(tables))
    names = [_encoder(name, region) for name, region in tables.items()]
    names = sorted(names if len(set(names)) == len(names) else tables)
    asked = f"none is {encoder!r}" if encoder and not chosen else "one has to be chosen"
    raise Refused(f"features of {len(tables)} encoders ({', '.join(names)}), {asked}; pass encoder (--encoder)")


def _squares(store: Path, region: str) -> tuple[np.ndarray, int, dict[str, np.ndarray]]:
    """Corners [tiles, 2] of the squares of a region, their edge, and the table's columns of whole numbers by name."""
    file, shapes = store / SHAPES / region / PARQUET, node(store / SHAPES / region)
    if shapes is None or not file.is_file():
        raise Refused(f"{SHAPES}/{region}/{PARQUET}, the tiles of the features, is missing; {COPY}")
    for transform in shapes["attributes"].get("coordinateTransformations") or ():
        if isinstance(transform, dict) and transform.get("type") != "identity":
            kind = transform.get("type")
            raise Refused(
                f"the tiles {region!r} are transformed by {kind!r}; write them in pixels at level 0 of the slide"
            )
    pa.set_memory_pool(pa.system_memory_pool())  # others reserve memory, as do threads
    with file.open("rb") as opened:
        table = pa.parquet.ParquetFile(opened).read(use_threads=False)
    if "geometry" not in table.column_names:
        raise Refused(f"{SHAPES}/{region} has no column 'geometry'; write the store again")
    stored = [bytes(value or b"") for value in table["geometry"].to_pylist()]
    lengths = sorted({len(value) for value in stored})
    if stored and lengths != [SQUARE.itemsize]:
        found = f"shapes of {lengths[0]} to {lengths[-1]} bytes"
        raise Refused(
            f"{SHAPES}/{region} has {found}, expected squares: cells, spots or tissue, not the tiles of a slide"
        )
    boxes = np.frombuffer(b"".join(stored), SQUARE)
    low, high = boxes["xy"].min(axis=1), boxes["xy"].max(axis=1)
    on_edge = (boxes["xy"] == low[:, None]) | (boxes["xy"] == high[:, None])
    if not (on_edge.all() and (boxes["type"] == POLYGON).all() and (boxes["order"] == 1).all()):
        raise Refused(f"{SHAPES}/{region} has polygons that are not squares; extract features of tiles")
    edges = np.unique(np.round(high - low, 3))
    if len(edges) != 1 and len(stored):
        raise Refused(f"tiles {region!r} with edges of {', '.join(f'{edge:g}' for edge in edges[:4])} px, expected one")
    columns = {name: table[name] for name in table.column_names if pa.types.is_integer(table[name].type)}
    numbers = {name: column.to_numpy() for name, column in columns.items() if not column.null_count}
    return low, round(float(edges[0])) if len(stored) else 0, numbers


def _rows(store: Path, table: str, instance: Any, numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Row of its tile for each row of a table, by the tiles' numbers."""
    obs = store / TABLES / table / "obs"
    if not isinstance(instance, str) or not _is_name(instance) or not node(obs / instance):
        raise Refused(
            f"table {table!r} does not say which tile each row is about (instance_key); write the store again"
        )
    wanted = read_array(store, f"{TABLES}/{table}/obs/{instance}")
    tiles = numbers.get(instance, numbers.get("__index_level_0__"))
    if tiles is None:
        tiles = np.arange(len(next(iter(numbers.values()), wanted)))
    order = np.argsort(tiles, kind="stable")
    places = np.searchsorted(tiles[order], wanted).clip(max=max(0, len(tiles) - 1))
    if len(wanted) and (not len(tiles) or (tiles[order][places] != wanted).any()):
        raise Refused(
            f"table {table!r} has rows of tiles that the shapes lack; they are of two runs: extract them again"
        )
    if len(np.unique(wanted)) < len(wanted):
        raise Refused(f"table {table!r} has several rows of one tile ({instance}); {COPY}")
    return order[places]


def _slide_facts(attributes: dict[str, Any], region: str) -> dict[str, float]:
    """Facts about the slide and its tiles that LazySlide stores; others have none."""
    facts = {}
    slide, specs = attributes.get("slide_properties"), attributes.get("tile_spec")
    slide = slide if isinstance(slide, dict) else {}
    spec = specs.get(region) if isinstance(specs, dict) else None
    if _is_positive(slide.get("mpp")):
        facts["mpp"] = slide["mpp"]
    size = slide.get("shape")
    if isinstance(size, list) and len(size) == 2 and all(map(_is_positive, size)):
        facts |= {"height": int(size[0]), "width": int(size[1])}
    if isinstance(spec, dict):
        steps = [spec.get("stride_width"), spec.get("stride_height"), spec.get("base_downsample")]
        if all(map(_is_positive, steps)) and steps[0] == steps[1]:
            facts["step"] = steps[0] * steps[2]
    return facts


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 2**31
