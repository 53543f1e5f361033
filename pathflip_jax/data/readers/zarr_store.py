"""Arrays of a Zarr store; runs only in the worker of `guarded.py`, and imports zarr, which is an extra.

A missing file of an array means zeros, so that it is checked that all are there. Only codecs of the list below are run,
as others of numcodecs unpickle.
"""

import math
import os
import struct
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pathflip_jax.data.readers.guarded import Parsed, Refused, shared_empty
from pathflip_jax.data.readers.zarr_nodes import COORDS, COPY, FEATURES, MOST_NODES, node

CODECS = {"bytes", "endian", "transpose", "zstd", "gzip", "zlib", "blosc", "lz4", "bz2", "lzma", "shuffle", "crc32c"}
CONTAINERS = {"sharding_indexed"}
BLOSC_HEADER = struct.Struct("<12xI")  # of which the last number is the size of the compressed bytes


def read_arrays(path: str) -> Parsed:
    """Features and coordinates of a store of plain arrays; the fact `coords` is the name of the latter."""
    store = Path(path)
    name = next(name for name in COORDS if node(store / name))
    return {"coords": name}, {"features": read_array(store, FEATURES), "coords": read_array(store, name)}


def read_array(store: Path, name: str) -> np.ndarray:
    """Array of numbers under a name, in shared memory.

    Raises Refused for one that lacks files, is not numeric, needs other codecs or is larger than its files can hold.
    """
    stated = node(store / name)
    if stated is None or stated["node_type"] != "array":
        raise Refused(f"{name!r} is no array; {COPY}")
    last = _last_codec(name, stated)
    with zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1}):
        found = zarr.open_array(store=store / name, mode="r", zarr_format=stated.get("zarr_format", 2))
        if np.dtype(found.dtype).kind not in "fiu":
            raise Refused(f"{name!r} has type {found.dtype}, expected numbers; extract the slide again")
        size = sum(file.stat().st_size for file in _files(store / name))
        array = shared_empty(found.shape, np.dtype(found.dtype).newbyteorder("="), size, repr(name))
        keys = _check_chunks(store / name, name, found)
        if last == "blosc":
            _check_blosc(store / name, name, keys)
        if array.ndim == 0:
            array[...] = found[()]
            return array
        step = max(1, (found.shards or found.chunks)[0])
        for start in range(0, len(array), step) if array.size else ():
            array[start : start + step] = found[start : start + step]
    return array


def _last_codec(name: str, stated: dict[str, Any]) -> str:
    """Name of the codec that wrote the bytes of an array's files. Raises Refused for one that is not in the lists."""
    *_, last = "", *(_codec_name(codec) for codec in stated.get("codecs") or () if codec)
    last = _codec_name(stated["compressor"]) if stated.get("compressor") else last
    codecs = [*(stated.get("codecs") or ()), *(stated.get("filters") or ()), stated.get("compressor")]
    while codecs:
        codec = codecs.pop()
        if codec is None:
            continue
        known = _codec_name(codec)
        if known in CONTAINERS:
            inner = codec.get("configuration") or {}
            if inner.get("index_location", "end") != "end":  # a shard cut short would pass unnoticed
                raise Refused(
                    f"{name!r} has shards with the index at their start, expected at their end; write it anew"
                )
            codecs += [*(inner.get("codecs") or ()), *(inner.get("index_codecs") or ())]
        elif known not in CODECS:
            raise Refused(f"{name!r} is encoded by {known!r:.40}, expected {', '.join(sorted(CODECS))}; write it anew")

    return last


def _codec_name(codec: Any) -> str:
    known = codec.get("name", codec.get("id")) if isinstance(codec, dict) else codec
    return str(known).removeprefix("numcodecs.")


def _check_blosc(folder: Path, name: str, keys: list[str]) -> None:
    """Raise Refused for a file that is shorter or longer than it says: numcodecs reads beyond its end."""
    for key in keys:
        with (folder / key).open("rb") as file:
            head, size = file.read(BLOSC_HEADER.size), os.fstat(file.fileno()).st_size
        if len(head) < BLOSC_HEADER.size or BLOSC_HEADER.unpack(head)[0] != size:
            raise Refused(f"chunk {key} of {name!r} has {size} bytes, which is not the size that it states; {COPY}")


def _check_chunks(folder: Path, name: str, found: Any) -> list[str]:
    """Files of an array. Raises Refused if some are missing, which would be read as zeros."""
    edges = found.shards or found.chunks
    counts = [math.ceil(size / edge) for size, edge in zip(found.shape, edges, strict=True)]
    there = {str(file.relative_to(folder)) for file in _files(folder)}
    total = math.prod(counts)
    if total > len(there) + MOST_NODES:
        raise Refused(f"{total - len(there)} of the {total} chunks of {name!r} are missing; {COPY}")
    keys = [found.metadata.encode_chunk_key(place) for place in product(*(range(count) for count in counts))]
    if missing := [key for key in keys if key not in there]:
        raise Refused(
            f"{len(missing)} of the {total} chunks of {name!r} are missing (the first is {missing[0]}); {COPY}"
        )
    return keys


def _files(folder: Path) -> Iterator[Path]:
    for place, _, files in os.walk(folder):
        yield from (Path(place) / file for file in files)
