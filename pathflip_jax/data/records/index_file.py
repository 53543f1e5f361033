"""Binary format of an index: a header, the slides as JSON, their regions as raw arrays, and a CRC32C.

It is untrusted input: the content is validated for all slides of a shard together, before anything is read by it.
"""

import json
import struct
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.readers.features import check_slide_id
from pathflip_jax.data.records.columns import ARRAYS, DTYPES, SCALARS, TEXTS, ShardRegions, SlideInfo, Slides
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.framing import crc32c
from pathflip_jax.data.storage.json_values import parse_json

MAGIC, VERSION = b"PATHFLIP", 1
HEAD = struct.Struct("<8sIQ")
_NAMES = (*TEXTS, "mpp", *(name for name in SCALARS if name not in (*TEXTS, "mpp")), "regions")
_BYTES = 20  # per region, plus 8 per slide


class Index(NamedTuple):
    """Index of one shard: its slides, and the size and CRC32C of the shard file."""

    shard_bytes: int
    shard_crc32c: int
    slides: Slides


def encode_index(index: Index) -> bytes:
    """Serialized index."""
    slides = [{name: getattr(info, name) for name in SCALARS} | {"regions": info.num_regions} for info in index.slides]
    head = json.dumps({"bytes": index.shard_bytes, "crc32c": index.shard_crc32c, "slides": slides}).encode()
    parts = [HEAD.pack(MAGIC, VERSION, len(head)), head]
    parts += [getattr(info, name).astype(dtype).tobytes() for info in index.slides for name, dtype in ARRAYS.items()]
    data = b"".join(parts)
    return data + struct.pack("<I", crc32c(data))


def decode_index(data: bytes, shard: Place, size: int, names: dict[str, str]) -> Index:
    """Index of a shard of that size, parsed from bytes; `names` interns texts.

    Raises ValueError for bytes that are damaged, of another version, or of another shard, and for an index that
    contradicts itself or points outside of its shard; TypeError, KeyError, AttributeError or OverflowError for anything
    that is not an index.
    """
    if len(data) < HEAD.size + 4 or crc32c(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ValueError("damaged or cut short: its CRC32C does not match")
    magic, version, length = HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"index version {version} of {magic!r}, expected {VERSION}")
    start = HEAD.size + length
    head = parse_json(data[HEAD.size : start].decode())
    if head["bytes"] != size:
        raise ValueError(f"belongs to a shard of {head['bytes']} bytes, {shard.name} has {size}")
    if type(head["crc32c"]) is not int:
        raise TypeError(f"crc32c is {head['crc32c']!r:.40}")
    columns = _columns(head["slides"])
    sizes = columns.pop("regions")
    needed = sum(_BYTES * count + 8 for count in sizes.tolist())
    if start + needed > len(data) - 4:
        raise ValueError(f"not an index: it ends before the {needed} bytes of its regions")
    regions = _regions(data, start, sizes)
    _check(columns, sizes, regions, shard, size)
    return Index(head["bytes"], head["crc32c"], Slides.of_shard(shard, columns, sizes, regions, names))


def _columns(entries: list[dict]) -> dict[str, list[str] | np.ndarray]:
    """Slides as columns. Raises TypeError for values of a type other than in `SlideInfo`, or negative ones."""
    columns = [[entry[name] for entry in entries] for name in _NAMES]
    for entry in entries:
        if len(entry) > len(_NAMES):
            raise TypeError(f"a slide with {', '.join(sorted(set(entry) - set(_NAMES)))}")
    for name, own in zip(_NAMES, columns, strict=True):
        kinds = {str} if name in TEXTS else {int, bool, float} if name == "mpp" else {int, bool}
        if not set(map(type, own)) <= kinds:
            raise TypeError(f"{name} is {next(value for value in own if type(value) not in kinds)!r:.40}")
    mpp, numbers = np.array(columns[len(TEXTS)], np.float64), np.array(columns[len(TEXTS) + 1 :], np.int64)
    if (mpp < 0).any() or (numbers < 0).any():
        for name, own in zip(_NAMES[len(TEXTS) :], (mpp, *numbers), strict=True):
            if (own < 0).any():
                raise TypeError(f"{name} is {own[own < 0][0]}")
    return dict(zip(_NAMES, (*columns[: len(TEXTS)], mpp, *numbers), strict=True))


def _regions(data: bytes, start: int, sizes: np.ndarray) -> ShardRegions:
    """Regions from byte `start` on; those whose rows do not increase, or do not start at 0, count no patches."""
    arrays = {name: [np.zeros(0, dtype)] for name, dtype in ARRAYS.items()}
    for size in sizes.tolist():
        for name, items in (("region_rows", size + 1), ("region_grid", 2 * size), ("region_crc32c", size)):
            arrays[name].append(np.frombuffer(data, ARRAYS[name], items, start))
            start += arrays[name][-1].nbytes
    row, grid, crcs = map(np.concatenate, arrays.values())
    last = np.cumsum(sizes + 1) - 1
    count = np.delete(np.where(row[1:] > row[:-1], np.diff(row), 0), last[:-1])
    first = np.cumsum(sizes) - sizes
    broken = (row[last - sizes] != 0) & (sizes > 0)
    count[first[broken]] = 0
    return ShardRegions(count, grid.reshape(-1, 2), crcs)


def _check(columns: dict, sizes: np.ndarray, regions: ShardRegions, shard: Place, size: int) -> None:
    """Raise ValueError for the first slide that `check_info` refuses or that extends beyond its shard."""
    for slide_id in columns["slide_id"]:
        check_slide_id(slide_id)
    last = np.cumsum(sizes)
    for at in np.flatnonzero(_suspect_slides(columns, sizes, regions.count)).tolist():
        scalars = {name: own[at] if name in TEXTS else own.item(at) for name, own in columns.items()}
        own = ShardRegions(*(array[last[at] - sizes[at] : last[at]] for array in regions))
        rows = np.concatenate([[0], np.cumsum(own.count, dtype=np.int64)])
        check_info(SlideInfo(**scalars, region_rows=rows, region_grid=own.grid, region_crc32c=own.crc32c, shard=shard))
    width = columns["feature_dim"] * np.array([DTYPES[dtype].itemsize for dtype in columns["feature_dtype"]], np.int64)
    end = columns["features_offset"] + columns["num_patches"] * width
    end = np.maximum(end, columns["coords_offset"] + columns["coords_bytes"])
    huge = columns["num_patches"] * (width * 1.0) + columns["features_offset"] + columns["coords_offset"] > 2**62
    for at in np.flatnonzero((end > size) | huge).tolist():
        found = f"byte {end[at]}" if not huge[at] else "an impossible size"
        raise ValueError(
            f"slide {columns['slide_id'][at]} extends beyond {shard.name}: to {found}, the file has {size}"
        )


def _suspect_slides(columns: dict, sizes: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Slides [n] that `check_info` must examine, found for all slides of a shard in one vectorised pass."""
    patches, mpp, coords = columns["num_patches"], columns["mpp"], columns["coords_bytes"]
    found = np.array([dtype not in DTYPES for dtype in columns["feature_dtype"]], bool)
    found |= (patches < 1) | (patches > 2**31) | (columns["feature_dim"] < 1) | (columns["feature_dim"] > 2**31)
    for name in ("patch_size", "width", "height"):
        found |= columns[name] >= 2**31
    found |= ~((mpp >= 0) & (mpp < 1e4)) | ((coords != 0) & (coords != 8 * patches))
    row, last = np.concatenate([[0], np.cumsum(count, dtype=np.int64)]), np.cumsum(sizes)
    found |= row[last] - row[last - sizes] != patches
    found[np.repeat(np.arange(len(sizes)), sizes)[count < 1]] = True
    return found


def check_info(info: SlideInfo, features_bytes: int | None = None) -> None:
    """Raise ValueError for an index entry that contradicts itself, as it is untrusted input.

    `features_bytes` is the size of its features, if known from a source other than the index.
    """
    check_slide_id(info.slide_id)
    where, rows = f"slide {info.slide_id}", info.region_rows
    sizes = (info.patch_size, info.width, info.height, info.num_patches - 1, info.feature_dim - 1)
    if info.feature_dtype not in DTYPES:
        raise ValueError(f"{where} has features of {info.feature_dtype!r:.40}, expected one of {', '.join(DTYPES)}")
    if not all(0 <= size < 2**31 for size in sizes) or not 0 <= info.mpp < 1e4:
        found = f"{info.num_patches} patches of {info.patch_size} px, {info.feature_dim} wide, mpp {info.mpp}"
        raise ValueError(f"{where} has {found}, in {info.width} x {info.height}, which are not plausible sizes")
    expected = info.num_patches * info.row_bytes
    stored = expected if features_bytes is None else features_bytes
    if stored != expected or info.coords_bytes not in (0, 8 * info.num_patches):
        found = f"{stored} bytes of features and {info.coords_bytes} of coords"
        raise ValueError(f"{where} has {found} for {info.num_patches} patches of {info.row_bytes} bytes")
    if not (len(rows) == len(info.region_grid) + 1 == len(info.region_crc32c) + 1 and rows[0] == 0
            and rows[-1] == info.num_patches and (rows[1:] > rows[:-1]).all()):  # fmt: skip
        raise ValueError(f"{where} has regions that do not cover its {info.num_patches} patches")
