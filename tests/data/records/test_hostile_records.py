"""Shards and indexes whose checksums hold and whose content is hostile: refused by name, before anything is read."""

import json
import struct

import numpy as np
import pytest

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.index import index_path
from pathflip_jax.data.records.index_file import HEAD
from pathflip_jax.data.records.records import Records, iter_examples, write_shard
from pathflip_jax.data.records.verify import verify
from pathflip_jax.data.storage.framing import crc32c, frame, mask


@pytest.fixture
def shard(tmp_path):
    features, coords = np.ones((4, 3), np.float16), np.arange(8).reshape(4, 2) * 256
    path = tmp_path / "pathflip-00000.tfrecord"
    write_shard(path, [SlideFeatures("S1", "P1", features, coords, 256, 0.5)])
    return path


def rewrite(shard, change) -> None:
    """The shard's record changed, with sound checksums and no index."""
    (example,) = iter_examples(shard)
    change(example.features.feature)
    data = example.SerializeToString()
    head, tail = frame(data)
    shard.write_bytes(head + data + tail)
    index_path(shard).unlink()


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("slide_id", [b"../../x"], "expected a plain file name"),
        ("slide_id", [b"/tmp/x"], "expected a plain file name"),
        ("slide_id", [b"\xff"], "not UTF-8"),
        ("feature_dtype", [b"O"], "features of 'O'"),
        ("num_patches", [2**62], "has 4611686018427387904 patches"),
        ("num_patches", [-4], "has -4 patches"),
        ("feature_dim", [0], "0 wide"),
        ("patch_size", [-1], "patches of -1 px"),
        ("mpp", [float("nan")], "mpp nan"),
        ("region_rows", [], "regions that do not cover"),
        ("region_grid", [0, 0, 0], "regions that do not cover"),
        ("features", [], "has no features"),
    ],
)
def test_a_record_that_contradicts_itself(shard, key, values, message):
    kind = {"mpp": "float_list", "region_rows": "int64_list", "region_grid": "int64_list"}.get(key)
    kind = kind or ("bytes_list" if not values or isinstance(values[0], bytes) else "int64_list")

    def change(feature):
        getattr(feature[key], kind).value[:] = values

    rewrite(shard, change)
    with pytest.raises(ValueError, match=message) as error:
        Records([shard])
    assert str(shard) in str(error.value)


def test_features_that_are_not_finite_are_told_with_their_shard(shard):
    def change(feature):
        payload = np.full((4, 3), np.nan, np.float16).tobytes()
        feature["features"].bytes_list.value[:] = [payload]
        coords = np.frombuffer(feature["coords"].bytes_list.value[0], np.uint8).reshape(4, 8)
        rows = feature["region_rows"].int64_list.value
        blocks = [(payload[6 * a : 6 * b], coords[a:b]) for a, b in zip(rows[:-1], rows[1:], strict=True)]
        feature["region_crc32c"].int64_list.value[:] = [crc32c(x, np.ascontiguousarray(c)) for x, c in blocks]

    rewrite(shard, change)
    with pytest.raises(ValueError, match=r"00000\.tfrecord: slide S1: 4 of 4 patches hold NaN"):
        Records([shard]).read(0)


def reindex(shard, change) -> None:
    """The index's JSON changed, its checksum sound."""
    data = index_path(shard).read_bytes()
    magic, version, length = HEAD.unpack_from(data)
    arrays = data[HEAD.size + length : -4]
    head = change(json.loads(data[HEAD.size : HEAD.size + length]))
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    data = HEAD.pack(magic, version, len(head)) + head + arrays
    index_path(shard).write_bytes(data + struct.pack("<I", crc32c(data)))


def slide(**changes):
    return lambda head: head | {"slides": [head["slides"][0] | changes]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (slide(features_offset=2**40), "extends beyond pathflip-00000.tfrecord"),
        (slide(coords_offset=10**6), "extends beyond pathflip-00000.tfrecord"),
        (slide(num_patches=2**30), "6442450944 bytes of features and 32 of coords"),
        (slide(regions=2**40), "not an index|buffer"),
        (slide(regions=-1), "regions is -1"),
        (slide(slide_id="../x"), "expected a plain file name"),
        (slide(slide_id=7), "slide_id is 7"),
        (slide(feature_dim=True, mpp="0.5"), "mpp is '0.5'"),
        (slide(more=1), "more"),
        (lambda head: [], "not an index"),
        (lambda head: head | {"slides": 3}, "not an index"),
        (lambda head: {"slides": []}, "KeyError"),
        (lambda head: b"[" * 100_000, "nested too deeply"),
        (lambda head: b"\xff", "not an index"),
    ],
)
def test_an_index_that_points_elsewhere(shard, change, message):
    reindex(shard, change)
    with pytest.raises(ValueError, match=message) as error:
        Records([shard])
    assert str(index_path(shard)) in str(error.value)


def test_a_record_that_claims_four_exabytes(shard):
    length = struct.pack("<Q", 2**62)
    shard.write_bytes(length + struct.pack("<I", mask(crc32c(length))) + shard.read_bytes()[12:])
    index_path(shard).unlink()
    with pytest.raises(OSError, match=r"00000\.tfrecord: cut short in record 0, 4611686018427"):
        Records([shard])


MANIFESTS = ["[" * 100_000, "[]", '{"shards": {"name": 1}}', '{"shards": [{"name": "x"}]}', "\udcff"]


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_manifest_of_something_else(shard, content):
    path = shard.with_name("manifest.json")
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert any(f"{path}: not a manifest" in fault for fault in verify(shard.parent))
