"""Parquet files of slide embeddings: one row per slide, and the file's provenance in its metadata."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.inference.predictor import Embedding

FORMAT = 1
METADATA = b"pathflip"  # Parquet metadata key of the JSON object that describes the file
IDENTITY = {  # entries in which two runs must agree to write to one file
    "format": "format", "checkpoint_hash": "checkpoint", "records_hash": "records",
    "slides_hash": "selection of slides", "regions": "choice of --regions",
}  # fmt: skip
ROW_GROUP_BYTES = 16 << 20


def _schema(claim: dict) -> pa.Schema:
    vector = pa.list_(pa.float32(), claim["embed_dim"])
    fields = [("slide_id", pa.string()), ("case_id", pa.string()), ("embedding", vector)]
    fields += [("num_patches", pa.int32()), ("num_regions", pa.int32())]
    if claim["regions"]:
        fields += [("regions", pa.list_(vector)), ("region_grid", pa.list_(pa.list_(pa.int32(), 2)))]
    return pa.schema(fields, metadata={METADATA: json.dumps(claim).encode()})


def make_table(rows: Sequence[Embedding], archive: Records, claim: dict) -> pa.Table:
    """Embeddings as Arrow columns."""
    infos = [archive.slides[archive.position(row.slide_id)] for row in rows]
    columns = [
        pa.array([info.slide_id for info in infos]),
        pa.array([info.case_id for info in infos]),
        _vectors(np.stack([row.slide for row in rows]), np.float32),
        pa.array([info.num_patches for info in infos], pa.int32()),
        pa.array([len(row.regions) for row in rows], pa.int32()),
    ]
    if claim["regions"]:
        starts = pa.array(np.cumsum([0, *(len(row.regions) for row in rows)]), pa.int32())
        for parts, dtype in (([r.regions for r in rows], np.float32), ([r.grid for r in rows], np.int32)):
            columns.append(pa.ListArray.from_arrays(starts, _vectors(np.concatenate(parts), dtype)))
    return pa.table(columns, schema=_schema(claim))


def _vectors(values: np.ndarray, dtype: type) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(dtype).ravel()), values.shape[1])


def write_table(path: Path, tables: Iterator[pa.Table] | list[pa.Table]) -> None:
    """Write a Parquet file atomically, one row group per table."""
    tables = iter(tables)
    first = next(tables)
    options = {"use_dictionary": False, "write_page_checksum": True}
    with atomic_file(path) as out, pq.ParquetWriter(_Sink(out), first.schema, **options) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


class _Sink:
    """Subset of Python's file interface that Arrow writes to."""

    closed = False

    def __init__(self, out) -> None:
        self.write = out.write

    def flush(self) -> None:
        """No-op: nothing is buffered."""


def open_embeddings(path: str | Path) -> tuple[pa.Table, dict]:
    """Table and provenance (hashes, settings, versions) of a file that `embed` wrote. ValueError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `pathflip embed` writes it")
    return pq.read_table(path), read_provenance(path)


def read_provenance(path: Path) -> dict:
    """Read the JSON provenance of a file. ValueError for a file that `embed` did not write."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[METADATA])
    except (KeyError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(
            f"{path}: not a valid file of embeddings written by this command ({str(error).splitlines()[0]}); choose "
            "another --out, or delete it"
        ) from None


def _read_group(path: Path, group: int, columns: list[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=columns)
    except (ValueError, OSError) as error:
        cure = "delete it and run the same command again: its slides are embedded again"
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]}); {cure}") from None


def find_rows(paths: Sequence[Path], claim: dict) -> dict[str, tuple[Path, int, int]]:
    """Map from slide id to file, row group and row, for files of this provenance. Raises ValueError for others."""
    places = {}
    for path in paths:
        found = read_provenance(path)
        changed = [
            f"{what} {_show(found, name)}, now {_show(claim, name)}"
            for name, what in IDENTITY.items()
            if found.get(name) != claim[name]
        ]
        if changed:
            raise ValueError(
                f"{path} was written with another {'; '.join(changed)}. Pass what it was started with, choose another "
                "--out, or delete it to start over"
            )
        for group in range(pq.read_metadata(path).num_row_groups):
            names = _read_group(path, group, ["slide_id"])["slide_id"].to_pylist()
            places |= {name: (path, group, row) for row, name in enumerate(names)}
    return places


def _show(claim: dict, name: str) -> str:
    value = str(claim.get(name))
    place = {"checkpoint_hash": "checkpoint", "records_hash": "records", "slides_hash": "split"}.get(name)
    return f"{value[:12]} ({claim.get(place) or 'all'})" if place else value


def in_order(ids: Sequence[str], places: dict[str, tuple[Path, int, int]], claim: dict) -> Iterator[pa.Table]:
    """Rows of all files in the order of `ids`, as tables of about ROW_GROUP_BYTES."""

    read = functools.lru_cache(maxsize=2)(_read_group)  # a part, and the file whose gap it fills
    schema, held, size = _schema(claim), [], 0
    for slide_id in ids:
        if slide_id not in places:
            continue
        path, group, row = places[slide_id]
        held.append(read(path, group).slice(row, 1).cast(schema))
        size += held[-1].nbytes
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held, size = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()
