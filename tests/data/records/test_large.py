"""Large slides: written, opened and read in blocks, byte-identical to a single read."""

import errno
import mmap
import os
import tempfile

import h5py
import numpy as np
import pytest

from pathflip_jax.data.readers.features import SlideFeatures, all_finite, read_features
from pathflip_jax.data.records import reading
from pathflip_jax.data.records.large import StoredFeatures, open_slide
from pathflip_jax.data.records.records import Records, write_shard
from pathflip_jax.data.storage import blocks
from pathflip_jax.data.storage.files import LocalFile


@pytest.fixture
def small(monkeypatch):
    """Slides of a hundred bytes are large, and worked through in blocks of 64."""
    monkeypatch.setattr(blocks, "LARGE", 100)
    monkeypatch.setattr(blocks, "BLOCK", 64)


def slide_of(patches: int = 60, dtype=np.float32) -> SlideFeatures:
    rng = np.random.default_rng(patches)
    coords = rng.permutation(np.stack(np.divmod(np.arange(patches), 9), -1)).astype(np.int32) * 256
    features = rng.normal(size=(patches, 5)).astype(dtype)
    return SlideFeatures("S", "P", features, coords, 256, 0.5, encoder="e")


def write(path, slide) -> Records:
    write_shard(path, [slide], edge_um=512.0)
    return Records([path])


def test_a_large_slide_is_written_byte_for_byte_as_a_small_one(tmp_path, monkeypatch):
    slide = slide_of()
    write(tmp_path / "a.tfrecord", slide)
    monkeypatch.setattr(blocks, "LARGE", 100)
    monkeypatch.setattr(blocks, "BLOCK", 64)
    archive = write(tmp_path / "b.tfrecord", slide)
    copied = write(tmp_path / "c.tfrecord", open_slide(archive, 0))  # as shards are put together from parts
    for path in (tmp_path / "b.tfrecord", *copied.shards):
        assert path.read_bytes() == (tmp_path / "a.tfrecord").read_bytes()


def test_features_on_disk_answer_as_an_array_does(tmp_path, small):
    archive = write(tmp_path / "a.tfrecord", slide_of())
    whole, slide = archive.read(0), open_slide(archive, 0)
    found, expected = slide.features, whole.features
    assert isinstance(found, StoredFeatures) and (slide.coords == whole.coords).all() and slide.mpp == whole.mpp
    assert found.shape == expected.shape and found.dtype == expected.dtype and len(found) == len(expected)
    assert found.nbytes == expected.nbytes and found.size == expected.size
    rng = np.random.default_rng(0)
    for rows in (
        7, -1, np.int64(3), slice(None), slice(10, 41, 3), slice(50, 200), rng.integers(-60, 60, 40), [3, 3, 1],
        rng.integers(60, size=(4, 3)), rng.random(60) < 0.3, np.zeros(0, int),
    ):  # fmt: skip
        assert np.array_equal(found[rows], expected[rows]), rows
    assert np.array_equal(np.asarray(found, np.float32), expected.astype(np.float32))
    with pytest.raises(IndexError):
        found[60]


def test_a_region_is_read_once_and_no_other(tmp_path, small, monkeypatch):
    archive = write(tmp_path / "a.tfrecord", slide_of())
    features, read, asked = StoredFeatures(archive, 0), Records.read_regions, []
    monkeypatch.setattr(Records, "read_regions", lambda s, i, r: asked.extend(r.tolist()) or read(s, i, r))
    starts = archive.slides[0].region_rows
    features[[starts[2], starts[0], starts[2] + 1, starts[3] - 1]]
    assert asked == [0, 2]


def test_a_flipped_byte_of_a_large_slide_is_told_when_it_is_opened(tmp_path, small):
    archive = write(tmp_path / "a.tfrecord", slide_of())
    data = bytearray((tmp_path / "a.tfrecord").read_bytes())
    data[archive.slides[0].features_offset + 77] ^= 4
    (tmp_path / "a.tfrecord").write_bytes(data)
    with pytest.raises(ValueError, match="slide S, region .*a byte flipped"):
        open_slide(Records([tmp_path / "a.tfrecord"]), 0)


@pytest.mark.parametrize("chunks", [None, (7, 5)])
def test_large_feature_files_are_mapped_and_not_read(tmp_path, small, chunks):
    slide = slide_of()
    with h5py.File(tmp_path / "S.h5", "w") as file:
        file.create_dataset("features", data=slide.features, chunks=chunks)
        file["coords"] = slide.coords
    found = read_features(tmp_path / "S.h5", patch_size=256, mpp=0.5)
    assert np.array_equal(found.features, slide.features) and np.array_equal(found.coords, slide.coords)
    if chunks is None:
        base = found.features
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)
    archives = [write(tmp_path / f"{number}.tfrecord", one) for number, one in enumerate([slide, found])]
    sums = [archive.slides[0].region_crc32c for archive in archives]
    assert (sums[0] == sums[1]).all()


def test_what_is_not_finite_is_told_wherever_it_stands(small):
    features = slide_of().features.copy()
    assert all_finite(features) and all_finite(features.astype(np.float16))
    features[59, 4] = np.nan
    assert not all_finite(features) and not all_finite(features.astype(np.float16))
    with pytest.raises(ValueError, match="1 of 60 patches hold NaN or infinity .the first is patch 59"):
        SlideFeatures("S", "", features)


def test_a_mapped_file_keeps_what_was_written_when_its_pages_go(small):
    found = blocks.scratch((50, 3), np.float16)
    for rows, block in blocks.row_blocks(found):
        found[rows] = np.arange(rows.start, rows.stop)[:, None]
        assert len(block) <= 10
    assert (found == np.arange(50)[:, None]).all()


def test_of_regions_far_apart_no_coordinates_between_are_read(tmp_path, monkeypatch):
    record = write(tmp_path / "a.tfrecord", slide_of())
    info, read, asked = record.slides[0], LocalFile.read, []

    def noted(file, extents):
        asked.extend((offset - info.coords_offset, sum(a.nbytes for a in arrays)) for offset, arrays in extents)
        return read(file, extents)

    monkeypatch.setattr(LocalFile, "read", noted)
    wanted = [info.num_regions - 1, 0, 1, 0]
    near = record.read_regions(0, wanted)
    places = [extent for extent in asked if 0 <= extent[0] < info.coords_bytes]
    assert len(places) == 1
    monkeypatch.setattr(reading, "COORDS_AT_ONCE", 0)
    asked.clear()
    far, rows = record.read_regions(0, wanted), info.region_rows
    assert all(np.array_equal(a, b) for a, b in zip(near, far, strict=True))
    places = [extent for extent in asked if 0 <= extent[0] < info.coords_bytes]
    assert places == [(0, 8 * rows[2]), (8 * rows[-2], 8 * (rows[-1] - rows[-2]))]


def test_a_full_folder_for_temporary_files_is_named_with_the_cure(small, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left .* takes 0.0 GB there .* TMPDIR.*" + tempfile.gettempdir()):
        blocks.scratch((50, 3), np.float16)


def test_the_mean_of_rows_is_that_of_the_whole(monkeypatch):
    features = slide_of().features.astype(np.float16)
    expected = np.asarray(features, np.float32).mean(0)
    assert (blocks.row_mean(features) == expected).all()
    monkeypatch.setattr(blocks, "LARGE", 70)
    assert blocks.row_mean(features) == pytest.approx(expected, abs=1e-6)
