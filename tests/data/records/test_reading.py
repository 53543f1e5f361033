"""Whole slides, read and checked piecewise: the same slide and the same errors as in a single read."""

import os

import ml_dtypes
import numpy as np
import pytest

from pathflip_jax.data.readers.features import SlideFeatures, all_finite
from pathflip_jax.data.records import reading
from pathflip_jax.data.records.index import index_path
from pathflip_jax.data.records.records import Records, iter_examples, write_shard
from pathflip_jax.data.storage import files
from pathflip_jax.data.storage.framing import crc32c, frame


@pytest.fixture(params=[1, 200, 1 << 19])
def pieces(request, monkeypatch):
    """Pieces of a region, of a few, and of the whole slide; each slide is long enough for reading ahead."""
    monkeypatch.setattr(reading, "PIECE", request.param)
    monkeypatch.setattr(files, "STREAM", 100)


def slide_of(patches: int = 90, coords: bool = True) -> SlideFeatures:
    rng = np.random.default_rng(patches)
    places = rng.permutation(np.stack(np.divmod(np.arange(patches), 9), -1)).astype(np.int32) * 256
    features = rng.normal(size=(patches, 5)).astype(np.float16)
    return SlideFeatures("S", "P", features, places if coords else None, 256, 0.5)


def write(folder, *, coords: bool = True):
    path = folder / "a.tfrecord"
    write_shard(path, [slide_of(coords=coords)], edge_um=512.0, cut="grid" if coords else "scan")
    return path


def rewritten(path, change):
    """The record changed by another program, with sound checksums and no index."""
    (example,) = iter_examples(path)
    feature = example.features.feature
    features = np.frombuffer(feature["features"].bytes_list.value[0], np.float16).reshape(-1, 5).copy()
    coords = np.frombuffer(feature["coords"].bytes_list.value[0], np.int32).reshape(-1, 2).copy()
    rows = list(feature["region_rows"].int64_list.value)
    change(features, coords)
    feature["features"].bytes_list.value[:] = [features.tobytes()]
    feature["coords"].bytes_list.value[:] = [coords.tobytes()]
    sums = [crc32c(features[a:b], coords[a:b]) for a, b in zip(rows, rows[1:], strict=False)]
    feature["region_crc32c"].int64_list.value[:] = sums
    data = example.SerializeToString()
    head, tail = frame(data)
    path.write_bytes(head + data + tail)
    index_path(path).unlink()
    return Records([path])


@pytest.mark.parametrize("coords", [True, False])
def test_a_slide_in_pieces_is_the_slide(tmp_path, pieces, coords):
    records = Records([write(tmp_path, coords=coords)])
    info, found = records.slides[0], records.read(0)
    regions = records.read_regions(0, range(info.num_regions))
    assert np.array_equal(found.features, np.concatenate(regions))
    assert found.coords is None if not coords else np.array_equal(found.coords, records.coords(0))


def test_a_flipped_byte_is_told_wherever_it_lies(tmp_path, pieces):
    path = write(tmp_path)
    records, data = Records([path]), path.read_bytes()
    info = records.slides[0]
    for region in (0, info.num_regions // 2, info.num_regions - 1):
        at = info.features_offset + int(info.region_rows[region]) * info.row_bytes
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=rf"a\.tfrecord: slide S, region {region}: a byte flipped"):
            records.read(0)


def test_a_shard_cut_short_while_it_is_open(tmp_path, pieces):
    path = write(tmp_path)
    records = Records([path])
    os.truncate(path, records.slides[0].features_offset + 700)
    with pytest.raises(OSError, match=r"a\.tfrecord: the file ends at byte \d+, \d+ bytes too early"):
        records.read(0)


@pytest.mark.parametrize(("row", "value"), [(0, np.nan), (45, -np.inf), (89, np.inf)])
def test_what_is_not_finite_is_refused_wherever_it_stands(tmp_path, pieces, row, value):
    def change(features, coords):
        features[row, 3] = value

    with pytest.raises(ValueError, match=rf"a\.tfrecord: slide S: 1 of 90 patches hold NaN.*patch {row}\)"):
        rewritten(write(tmp_path), change).read(0)


@pytest.mark.parametrize("equal", [True, False])
def test_places_that_are_there_twice_are_told_with_what_the_features_say(tmp_path, pieces, equal):
    def change(features, coords):
        coords[89] = coords[88]
        if equal:
            features[89] = features[88]

    found = "with equal features" if equal else "with different features"
    with pytest.raises(ValueError, match=rf"a\.tfrecord: slide S: 1 of 89 coordinates occur more than once.*{found}"):
        rewritten(write(tmp_path), change).read(0)


@pytest.mark.parametrize("gone", [True, False])
def test_a_shard_replaced_while_it_is_open_is_read_to_its_end_as_it_was(tmp_path, pieces, gone):
    path = write(tmp_path)
    records, expected = Records([path]), slide_of()
    records.read_regions(0, [0])  # opens it
    path.unlink()
    if not gone:
        path.write_bytes(b"another shard")
    assert np.array_equal(np.sort(records.read(0).features, axis=0), np.sort(expected.features, axis=0))


def test_descriptors_are_given_back_also_where_a_read_is_left(tmp_path, pieces):
    file = files.LocalFile(write(tmp_path))
    before = len(os.listdir("/dev/fd"))
    arrays = [np.empty(100, np.uint8) for _ in range(3)]
    for _ in range(2):
        read = file.read([(100 * i, [array]) for i, array in enumerate(arrays)])
        next(read)
        assert len(os.listdir("/dev/fd")) == before + 1
        read.close()
        assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_every_number_of_two_bytes_is_finite_or_not(dtype):

    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(numbers.astype(np.float32))
    assert all_finite(numbers[finite].reshape(1, -1))
    assert not any(all_finite(number.reshape(1, 1)) for number in numbers[~finite])
