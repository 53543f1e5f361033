"""Slides of records as a sequence: each matches the writer's entry, whichever way it is accessed."""

import dataclasses
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax.data.records.cohort import check_cohort
from pathflip_jax.data.records.columns import ARRAYS, SCALARS, SlideInfo, Slides, column
from pathflip_jax.data.records.index_file import Index, decode_index, encode_index
from pathflip_jax.data.storage.framing import crc32c


def make_info(name, counts, grid=None, shard="a.tfrecord", **changes):
    patches = sum(counts)
    grid = np.arange(2 * len(counts)).reshape(-1, 2) if grid is None else grid
    values = {
        "slide_id": name, "case_id": f"P{name}", "encoder": "uni", "feature_dtype": "float16", "feature_dim": 4,
        "num_patches": patches, "patch_size": 256, "mpp": 0.5, "width": 512, "height": 0, "features_offset": 20,
        "coords_offset": 10, "coords_bytes": 8 * patches, "coords_crc32c": 2**32 - 1,
        "region_rows": np.cumsum([0, *counts]), "region_grid": np.asarray(grid, np.int32),
        "region_crc32c": np.arange(len(counts), dtype=np.uint32), "shard": Path(shard),
    }  # fmt: skip
    return SlideInfo(**(values | changes))


@pytest.fixture
def infos():
    return [
        make_info("S0", [3]),
        make_info("S1", [1, 300, 70_000], [[-40_000, 5], [0, 0], [9, 9]], case_id="S1"),
        make_info("S2", [2, 2], [[-1, -1], [-1, -1]], shard="b.tfrecord", encoder=""),
        make_info("S3", [1], [[-1, 0]], shard="b.tfrecord", feature_dtype="bfloat16"),
    ]


@pytest.fixture
def slides(infos):
    """Through the bytes of two indexes."""
    parts, names = [], {}
    for own in (infos[:2], infos[2:], []):
        shard = own[0].shard if own else infos[0].shard
        data = encode_index(Index(10**6, 7, Slides.of(shard, own)))
        parts.append(decode_index(data, shard, 10**6, names).slides)
    return Slides.joined(parts)


def test_each_slide_is_what_was_written(infos, slides):
    assert len(slides) == 4
    for info, view in zip(infos, slides, strict=True):
        for name in (*SCALARS, "shard", "cut", "num_regions", "row_bytes"):
            found = getattr(view, name)
            assert found == getattr(info, name) and type(found) is type(getattr(info, name)), name
        for name, dtype in ARRAYS.items():
            found = getattr(view, name)
            assert found.dtype == dtype and (found == getattr(info, name)).all(), name
    assert slides.largest_region == 70_000
    assert pickle.loads(pickle.dumps(slides[1])).slide_id == "S1"
    with pytest.raises(AttributeError, match="no 'patches'"):
        slides[0].patches  # noqa: B018


def test_slides_are_a_sequence(slides):
    assert [info.slide_id for info in slides[1:3]] == ["S1", "S2"] and slides[-1].slide_id == "S3"
    assert slides[np.int64(2)].slide_id == "S2"
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            slides[wrong]


def test_a_column_is_the_attribute_of_all(infos, slides):
    for name in (*SCALARS, "cut"):
        assert list(column(slides, name)) == column(infos, name), name
    assert slides.column("encoder")[0] is slides.column("encoder")[1]


@pytest.mark.parametrize("odd", [{}, {"encoder": "conch"}, {"patch_size": 512}, {"mpp": 0.0, "patch_size": 900},
                                 {"feature_dim": 5}, {"slide_id": "S1"}])  # fmt: skip
def test_a_cohort_of_columns_is_judged_as_one_of_entries(odd):
    infos = [make_info(f"S{i}", [2, 1]) for i in range(5)] + [make_info("S5", [2, 1])]
    infos[5] = dataclasses.replace(infos[5], **odd)
    said = []
    for sequence in (infos, Slides.of(infos[0].shard, infos)):
        try:
            check_cohort(sequence)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    assert said[0] == said[1] and bool(said[0]) == bool(odd)
    assert not odd or odd.get("slide_id", "S5") in said[0]


@pytest.mark.parametrize(
    ("rows", "patches"), [([0, 2, 2, 3], 3), ([1, 2, 3, 4], 4), ([0, 2, 3, 4], 5), ([0, 2**62, -(2**62), 3], 3)]
)
def test_rows_that_do_not_rise_from_0_to_all_patches(infos, rows, patches):
    """The last wraps around in 64 bits."""
    info = dataclasses.replace(make_info("S9", [1, 1, 1]), region_rows=np.array(rows), num_patches=patches)
    info = dataclasses.replace(info, coords_bytes=8 * patches)
    data = encode_index(Index(10**6, 7, [infos[0], info]))
    with pytest.raises(ValueError, match=f"slide S9 has regions that do not cover its {patches} patches"):
        decode_index(data, info.shard, 10**6, {})


def test_the_bytes_of_an_index_stay_what_they_are(infos):
    """As every release has written them: records are kept for years."""
    info = infos[1]
    head = (
        b'{"bytes": 1000000, "crc32c": 7, "slides": [{"slide_id": "S1", "case_id": "S1", "encoder": "uni", '
        b'"feature_dtype": "float16", "feature_dim": 4, "num_patches": 70301, "patch_size": 256, "mpp": 0.5, '
        b'"width": 512, "height": 0, "features_offset": 20, "coords_offset": 10, "coords_bytes": 562408, '
        b'"coords_crc32c": 4294967295, "regions": 3}]}'
    )
    arrays = np.array([0, 1, 301, 70301], "<i8").tobytes() + np.array([-40000, 5, 0, 0, 9, 9], "<i4").tobytes()
    data = struct.pack("<8sIQ", b"PATHFLIP", 1, len(head)) + head + arrays + np.arange(3, dtype="<u4").tobytes()
    data += struct.pack("<I", crc32c(data))
    assert encode_index(Index(10**6, 7, [info])) == data
    found = decode_index(data, info.shard, 10**6, {})
    assert encode_index(found) == data and (found.shard_bytes, found.shard_crc32c) == (10**6, 7)
