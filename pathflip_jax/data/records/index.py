"""Slide records, and the index of a shard: content and location of each record (DESIGN section 5).

With the index, opening a cohort reads no shard. It can be rebuilt from the shard alone, by walking protobuf tags, so
shards of any writer can be indexed.
"""

import errno
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.readers.features import SlideFeatures, all_finite, rows_lost_to_rounding
from pathflip_jax.data.records.columns import ARRAYS, DTYPES, SlideInfo, Slides
from pathflip_jax.data.records.index_file import Index, check_info, decode_index, encode_index
from pathflip_jax.data.records.regions import cut_regions
from pathflip_jax.data.records.tfrecord import bytes_offsets, example_parts, read_frames
from pathflip_jax.data.storage import blocks
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, as_path, file_sizes, read_in_turn
from pathflip_jax.data.storage.framing import Checksummed, Data, crc32c, extended, frame, nbytes

COORDS = np.dtype("<i4")
KEYS = {
    "slide_id", "case_id", "encoder", "feature_dtype", "feature_dim", "num_patches", "features", "coords", "patch_size",
    "mpp", "width", "height", "region_rows", "region_grid", "region_crc32c",
}  # fmt: skip
LARGEST_EXAMPLE = 2**31 - 2**20  # the protobuf limit of 2 GiB, less room for the small fields
REBUILD = "delete it, and the next opening rebuilds it from the shard"
REWRITE = "copy the shard again, or delete it and its .idx and run `pathflip prepare` or `import` again"


def index_path(shard: Place | str) -> Place:
    """Path of a shard's index."""
    shard = as_path(shard)
    return shard.with_name(f"{shard.name}.idx")


def encode_slide(
    slide: SlideFeatures, *, cut: str, edge_um: float, edge_px: int | None, dtype: str
) -> tuple[list[Data], SlideInfo]:
    """Slide as a serialized tf.train.Example in parts, patches in region order, and its index entry.

    The entry's offsets are relative to the start of the record. Raises ValueError for features out of the dtype's
    range, and for more than an Example can hold.
    """
    # Deferred import: it takes 0.4 s, and reading records does not need it.
    from tensorflow_datasets.proto import tf_example_pb2

    if dtype not in DTYPES:
        raise ValueError(f"records of dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    where = f"slide {slide.slide_id}"
    size = slide.features.size * 2
    if size > LARGEST_EXAMPLE:
        found = f"{len(slide.features)} patches x {slide.features.shape[1]} make {size / 1e9:.1f} GB"
        raise ValueError(f"{where}: {found}, a tf.train.Example holds at most 2; subsample its patches or leave it out")
    regions = cut_regions(slide, cut, edge_um, edge_px)
    features = stored_rows(slide.features, regions.order, dtype, where)
    coords = np.zeros((0, 2), COORDS)
    if slide.coords is not None:
        coords = slide.coords[regions.order].astype(COORDS, copy=False)
    payload, rows = features.view(np.uint8), regions.rows
    crcs, crc = [], 0
    for a, b in pairwise(rows.tolist()):
        own = crc32c(payload[a:b])
        crcs.append(crc32c(coords[a:b], start=own))
        crc = extended(crc, Checksummed(payload[a:b], own))
        blocks.release(features)
    texts = {"slide_id": slide.slide_id, "case_id": slide.case_id, "encoder": slide.encoder, "feature_dtype": dtype}
    numbers = {
        "feature_dim": features.shape[1], "num_patches": len(features), "patch_size": slide.patch_size,
        "width": slide.width, "height": slide.height,
    }  # fmt: skip
    arrays = {"region_rows": rows, "region_grid": regions.grid, "region_crc32c": np.array(crcs, np.int64)}
    message = tf_example_pb2.Example().features
    for key, text in texts.items():
        message.feature[key].bytes_list.value.append(text.encode())
    for key, number in numbers.items():
        message.feature[key].int64_list.value.append(number)
    for key, array in arrays.items():
        message.feature[key].int64_list.value.extend(array.ravel().tolist())
    message.feature["mpp"].float_list.value.append(slide.mpp)
    payloads = {"coords": coords.reshape(-1), "features": Checksummed(payload.reshape(-1), crc)}
    parts = example_parts(message.SerializeToString(deterministic=True), payloads)
    starts = np.cumsum([0, *map(nbytes, parts)]).tolist()
    info = SlideInfo(
        **texts,
        **numbers,
        **{key: array.astype(ARRAYS[key]) for key, array in arrays.items()},
        mpp=float(np.float32(slide.mpp)),
        features_offset=starts[-2],
        coords_offset=starts[-4],
        coords_bytes=coords.nbytes,
        coords_crc32c=crc32c(payloads["coords"]),
    )
    return parts, info


def stored_rows(
    features: Float[np.ndarray, "N F"], order: Int[np.ndarray, "N"], dtype: str, where: str
) -> Float[np.ndarray, "N F"]:
    """Features in stored order and dtype (`narrowed`), for a large slide in a temporary file.

    Raises as `narrowed`, and OSError if the folder for temporary files (TMPDIR) is full.
    """
    if features.nbytes <= blocks.LARGE:
        return narrowed(np.take(features, order, axis=0), dtype, where)
    place, found = np.empty(len(order), np.int64), blocks.scratch(features.shape, DTYPES[dtype])
    place[order] = np.arange(len(order))
    for rows, block in blocks.row_blocks(features):  # in file order: the file may be compressed
        found[place[rows]] = narrowed(block, dtype, where)
        blocks.release(found)
    return found


def narrowed(features: Float[np.ndarray, "N F"], dtype: str, where: str) -> Float[np.ndarray, "N F"]:
    """Features in the dtype of the records. Raises ValueError for numbers too large or too small for it."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = features.astype(DTYPES[dtype], copy=False)
    if narrow.dtype == features.dtype:
        return narrow
    cure = "write the records with --dtype bfloat16" if dtype == "float16" else "scale the features first"
    if not all_finite(narrow):
        largest = np.abs(features.astype(np.float32)).max()
        raise ValueError(f"{where}: features of up to {largest:.3g} overflow {dtype}; {cure}")
    if len(rows := rows_lost_to_rounding(features, narrow)):
        largest = np.abs(features[rows].astype(np.float32)).max()
        found = f"features of {len(rows)} of {len(features)} patches are at most {largest:.3g}, too small for {dtype}"
        raise ValueError(f"{where}: {found}, which loses most or all of their precision; {cure}")
    return narrow


def slide_info(data: bytes, offset: int, shard: Place) -> SlideInfo:
    """Index entry of a serialized record that starts at `offset`. Raises ValueError for a foreign record."""
    from tensorflow_datasets.proto import tf_example_pb2

    where = f"{shard}: the record at byte {offset}"
    try:
        payloads = bytes_offsets(data)
        feature = tf_example_pb2.Example.FromString(data).features.feature
    except Exception as error:  # protobuf's DecodeError comes from a private module in some of its builds
        raise ValueError(f"{where} is not a tf.train.Example ({error}); expected PathFLIP records") from None
    missing = sorted(KEYS - set(feature)) + sorted({"features", "coords"} & set(feature) - set(payloads))
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}, which every PathFLIP record has")
    try:
        texts = {key: b"".join(feature[key].bytes_list.value).decode() for key in
                 ("slide_id", "case_id", "encoder", "feature_dtype")}  # fmt: skip
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} has texts that are not UTF-8 ({error}); write it again") from None
    names = ("feature_dim", "num_patches", "patch_size", "width", "height")
    numbers = {key: (list(feature[key].int64_list.value) or [0])[0] for key in names}
    arrays = {key: np.array(feature[key].int64_list.value, np.int64).astype(ARRAYS[key]) for key in ARRAYS}
    grid = arrays["region_grid"]
    arrays["region_grid"] = np.zeros((0, 2), grid.dtype) if len(grid) % 2 else grid.reshape(-1, 2)
    start, length = payloads["coords"]
    info = SlideInfo(
        **texts,
        **numbers,
        **arrays,
        mpp=(list(feature["mpp"].float_list.value) or [0.0])[0],
        features_offset=offset + payloads["features"][0],
        coords_offset=offset + start,
        coords_bytes=length,
        coords_crc32c=crc32c(np.frombuffer(data, np.uint8, length, start)),
        shard=shard,
    )
    try:
        check_info(info, payloads["features"][1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {REWRITE}") from None
    return info


def check_region(info: SlideInfo, region: int, crc: int) -> None:
    """Raise ValueError, naming shard, slide and region, for a checksum mismatch of a region."""
    if crc != info.region_crc32c[region]:
        found = f"CRC32C {crc:08x}, recorded {int(info.region_crc32c[region]):08x}"
        raise ValueError(f"{info.shard}: slide {info.slide_id}, region {region}: a byte flipped ({found}); {REWRITE}")


def build_index(shard: Place | str) -> Index:
    """Build the index of a shard, written by this library or by TensorFlow, TFDS or Beam, from the shard alone.

    Reads the whole shard and checks every CRC. Raises ValueError for a damaged or foreign shard, OSError for a
    truncated one.
    """
    shard = as_path(shard)
    infos, end, crc = [], 0, 0
    for offset, data in read_frames(shard):
        info = slide_info(data, offset, shard)
        payload, start = np.frombuffer(data, np.uint8), info.features_offset - offset
        features = payload[start : start + info.num_patches * info.row_bytes]
        start = info.coords_offset - offset
        coords = payload[start : start + info.coords_bytes]
        for region in range(info.num_regions):
            a, b = info.region_rows[region : region + 2]
            found = crc32c(features[a * info.row_bytes : b * info.row_bytes], coords[8 * a : 8 * b])
            check_region(info, region, found)
        infos.append(info)
        head, tail = frame(data)
        end, crc = offset + len(data) + len(tail), crc32c(head, data, tail, start=crc)
    if [end] != file_sizes([shard]):
        raise OSError(f"{shard}: changed while it was read; try again once its writer is done")
    return Index(end, crc, Slides.of(shard, infos))


def save_index(shard: Place, index: Index) -> None:
    """Write an index next to its shard, atomically."""
    with atomic_file(index_path(shard)) as out:
        out.write(encode_index(index))


def read_index(shard: Place | str) -> Index:
    """Load the index of a shard, as `read_indexes` does."""
    shards = [as_path(shard)]
    return next(read_indexes(shards, file_sizes(shards), index_bytes(shards)))


def index_bytes(shards: Sequence[Place], *before: Place) -> Iterator[bytes | None]:
    """Bytes of the files `before` and of the shards' indexes, None for missing ones, a few at a time."""
    return read_in_turn([*before, *map(index_path, shards)])


def read_indexes(
    shards: Sequence[Place], sizes: Sequence[int | None], contents: Iterator[bytes | None]
) -> Iterator[Index]:
    """Indexes of shards of these sizes from their bytes, in order; missing ones are built.

    Raises ValueError for an index that is damaged, of another version, or older than its shard; FileNotFoundError for
    a missing shard.
    """
    for shard, size in zip(shards, sizes, strict=True):
        if size is None:
            raise FileNotFoundError(f"{shard}: no such shard; restore it, or write it again")
    names: dict[str, str] = {}  # interns texts shared by slides
    for shard, size, data in zip(shards, sizes, contents, strict=True):
        if data is None:
            yield _built(shard)
        else:
            yield _parsed(shard, size, data, names)


def _built(shard: Place) -> Index:
    index = build_index(shard)
    try:
        save_index(shard, index)
    except OSError as error:  # records are often on read-only storage
        if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
            raise
    return index


def _parsed(shard: Place, size: int, data: bytes, names: dict[str, str]) -> Index:
    """Index from its stored bytes, for a shard of that size."""
    try:
        return decode_index(data, shard, size, names)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        found = str(error) if type(error) is ValueError else f"not an index ({error!r:.200})"
        raise ValueError(f"{index_path(shard)}: {found}; if the shard is whole, {REBUILD}; else {REWRITE}") from None
