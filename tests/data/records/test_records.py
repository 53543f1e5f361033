"""Records: round trips, by this library and by plain readers; damaged, mixed or incomplete files are refused."""

import errno
import json
import os
import resource
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from pathflip_jax.data.readers.features import SlideFeatures, read_features
from pathflip_jax.data.records.index import KEYS, index_path
from pathflip_jax.data.records.records import (  # fmt: skip
    Records,
    finish_folder,
    iter_examples,
    manifest_hash,
    shard_name,
    write_index,
    write_shard,
)
from pathflip_jax.data.records.regions import cut_regions
from pathflip_jax.data.records.verify import verify
from pathflip_jax.data.storage.atomic_files import AtomicFile

REAL = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")) / "formats"


def make_slide(name="S0", patches=40, width=6, seed=0, **changes):
    """Patches of 64 px at 0.5 um in no order; with an edge of 64 um, regions of 2 x 2."""
    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(np.arange(9), np.arange(-(-patches // 6))), -1).reshape(-1, 2)
    coords = (rng.permutation(cells)[:patches] * 64).astype(np.int32)
    values = {
        "slide_id": name, "case_id": "P" + name, "features": rng.normal(size=(patches, width)).astype(np.float32),
        "coords": coords, "patch_size": 64, "mpp": 0.5, "width": 576, "height": 24000, "encoder": "enc",
    }  # fmt: skip
    return SlideFeatures(**(values | changes))


def write(folder, slides, number=0, **how):
    write_shard(folder / shard_name(number), slides, **({"edge_um": 64.0} | how))
    return folder / shard_name(number)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, [make_slide("S0"), make_slide("S1", 7, seed=1)])
    write(tmp_path, [make_slide("S2", 25, seed=2)], 1)
    finish_folder(tmp_path, edge_um=64.0)
    return tmp_path


def crc32c_bitwise(data: bytes) -> int:
    """CRC32C by its definition (RFC 3720): reflected polynomial 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c_bitwise(data)
    return ((crc >> 15 | crc << 17) % 2**32 + 0xA282EAD8) % 2**32


def test_crc_of_the_standard():
    assert crc32c_bitwise(b"123456789") == 0xE3069283


def test_plain_readers_read_the_shards(tmp_path):
    """grain's reader and TFDS's proto, framing and CRCs by their definitions: none of it is our code."""
    from grain.experimental import TFRecordIterDataset

    slides = [make_slide("S0", 5), make_slide("S1", 3, seed=1, mpp=0.499, height=0)]
    shard = write(tmp_path, slides)
    raw, start = shard.read_bytes(), 0
    for data, slide in zip(TFRecordIterDataset(str(shard)), slides, strict=True):
        length, crc = struct.unpack("<QI", raw[start : start + 12])
        assert length == len(data) and crc == masked(raw[start : start + 8])
        assert raw[start + 12 : start + 12 + length] == data
        assert struct.unpack("<I", raw[start + 12 + length :][:4])[0] == masked(data)
        start += length + 16
        feature = tf_example_pb2.Example.FromString(data).features.feature
        assert set(feature) == KEYS
        texts = {key: feature[key].bytes_list.value[0].decode() for key in ("slide_id", "case_id", "encoder")}
        assert texts == {"slide_id": slide.slide_id, "case_id": slide.case_id, "encoder": "enc"}
        assert feature["feature_dtype"].bytes_list.value == [b"float16"]
        for key, value in (("patch_size", 64), ("width", 576), ("height", slide.height), ("feature_dim", 6)):
            assert feature[key].int64_list.value == [value]
        assert feature["mpp"].float_list.value[0] == np.float32(slide.mpp)
        features = np.frombuffer(feature["features"].bytes_list.value[0], "<f2").reshape(-1, 6)
        coords = np.frombuffer(feature["coords"].bytes_list.value[0], "<i4").reshape(-1, 2)
        order, rows, grid = cut_regions(slide, edge_um=64.0)
        assert (features == slide.features[order].astype(np.float16)).all() and (coords == slide.coords[order]).all()
        assert feature["num_patches"].int64_list.value == [len(features)]
        assert feature["region_rows"].int64_list.value == rows.tolist()
        assert feature["region_grid"].int64_list.value == grid.ravel().tolist()
        crcs = [
            crc32c_bitwise(features[a:b].tobytes() + coords[a:b].tobytes())
            for a, b in zip(rows[:-1], rows[1:], strict=True)
        ]
        assert feature["region_crc32c"].int64_list.value == crcs
    assert start == len(raw)


@pytest.mark.filterwarnings("ignore:label\\(\\) is deprecated:DeprecationWarning")  # newer protobuf, of TFDS's own use
def test_tfds_knows_the_folder(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].shard_lengths == [2, 1]
    assert builder.info.splits["train"].filenames == [shard_name(0), shard_name(1)]
    assert set(builder.info.features) == KEYS
    assert builder.info.features["features"].shape == (None, 6)
    assert builder.info.features["features"].np_dtype == np.float16


@settings(max_examples=60, deadline=None)
@given(
    patches=st.integers(1, 90), width=st.integers(1, 9), seed=st.integers(0, 99),
    dtype=st.sampled_from(["float16", "bfloat16"]), cut=st.sampled_from(["grid", "scan"]),
    source=st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]), placed=st.booleans(), data=st.data(),
)  # fmt: skip
def test_what_is_written_is_read(patches, width, seed, dtype, cut, source, placed, data):
    slide = make_slide(patches=patches, width=width, seed=seed)
    slide = replace(slide, features=slide.features.astype(source))
    if cut == "scan" and not placed:
        slide = replace(slide, coords=None, patch_size=0, mpp=0.0)
    regions = cut_regions(slide, cut, 64.0)
    features = slide.features[regions.order].astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), [slide], cut=cut, dtype=dtype)
        records = Records(folder)
        found, info = records.read(0), records.slides[0]
        asked = data.draw(st.lists(st.integers(0, len(regions.grid) - 1), max_size=9))
        parts = records.read_regions(0, asked)
        sizes = np.diff(regions.rows)[asked]
        block = np.zeros((sum(sizes), width), features.dtype)
        places = np.split(block, np.cumsum(sizes)[:-1]) if asked else []
        into = records.read_regions(0, asked, [place if i % 3 else None for i, place in enumerate(places)])
        coords = records.coords(0)
    assert found.features.dtype == features.dtype and (found.features == features).all()
    for name in ("slide_id", "case_id", "patch_size", "mpp", "width", "height", "encoder"):
        assert getattr(found, name) == getattr(slide, name)
    if slide.coords is None:
        assert found.coords is None and coords is None
    else:
        assert (found.coords == slide.coords[regions.order]).all() and (coords == found.coords).all()
    assert (info.region_rows == regions.rows).all() and (info.region_grid == regions.grid).all()
    assert info.num_patches == patches and records.feature_dim == width and records.encoder == "enc"
    assert records.cut == cut and records.patch_slots == np.diff(regions.rows).max()
    assert len(parts) == len(asked) == len(into)
    for i, (part, placed, region) in enumerate(zip(parts, into, asked, strict=True)):
        expected = features[regions.rows[region] : regions.rows[region + 1]]
        assert (part == expected).all() and (placed == expected).all()
        assert placed is places[i] if i % 3 else placed is not places[i]


def test_only_the_regions_asked_for_are_read(folder, monkeypatch):
    records, preadv, sizes = Records(folder), os.preadv, []

    def counted(fd, buffers, offset):
        sizes.append(count := preadv(fd, buffers, offset))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    info = records.slides[0]
    records.read_regions(0, [3, 1, 2])
    rows = int(info.region_rows[4] - info.region_rows[1])
    assert sorted(sizes) == sorted([rows * 12, rows * 8]), "neighbours in one go, and their coordinates"


def test_a_system_that_reads_less_than_was_asked_for(folder, monkeypatch):
    records, preadv = Records(folder), os.preadv
    whole = records.read_regions(0, [0, 1, 2, 3])

    def some(fd, buffers, offset):
        first = memoryview(buffers[0])
        return preadv(fd, [first[: min(7, len(first))]], offset)

    monkeypatch.setattr(os, "preadv", some)
    for found, expected in zip(records.read_regions(0, [0, 1, 2, 3]), whole, strict=True):
        assert (found == expected).all()


def test_an_array_that_a_region_does_not_fit_in(folder):
    records = Records(folder)
    rows = int(np.diff(records.slides[0].region_rows)[1])
    for wrong in (
        np.zeros((rows + 1, 6), np.float16),
        np.zeros((rows, 6), np.float32),
        np.zeros((rows, 12), np.float16)[:, ::2],
    ):
        with pytest.raises(ValueError, match=f"slide S0, region 1: an array .*expected \\({rows}, 6\\) of float16"):
            records.read_regions(0, [1], [wrong])


def test_a_region_that_is_not_there(folder):
    records = Records(folder)
    for region in (-1, records.slides[0].num_regions):
        with pytest.raises(IndexError, match=f"slide S0.*regions {region}"):
            records.read_regions(0, [0, region][-1:])


def test_positions(folder):
    records = Records(folder)
    assert [records.position(f"S{i}") for i in range(3)] == [0, 1, 2] and len(records) == 3
    with pytest.raises(ValueError, match="no slide 'S9' among its 3 slides, such as S0"):
        records.position("S9")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_flipped_byte_anywhere_in_a_shard_is_found(tmp_path, indexed):
    """Reading may fail or give the true values, never others; and verify names the shard."""
    shard = write(tmp_path, [make_slide("S0", 6, 2), make_slide("S1", 3, 2, seed=1)])
    finish_folder(tmp_path, edge_um=64.0)
    whole, true = shard.read_bytes(), [Records(tmp_path).read(i) for i in range(2)]
    noticed = 0
    for at in range(0, len(whole), 1 if indexed else 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        shard.write_bytes(damaged)
        if not indexed:
            index_path(shard).unlink(missing_ok=True)
        try:
            records = Records(tmp_path)
            for i in range(2):
                found = records.read(i)
                assert (found.features == true[i].features).all() and (found.coords == true[i].coords).all()
        except (ValueError, OSError) as error:
            assert str(shard) in str(error)
            noticed += 1
        if indexed:
            assert any(str(shard) in fault for fault in verify(tmp_path)), f"byte {at}"
    payload = sum(s.features.nbytes + s.coords.nbytes for s in true)
    assert noticed == len(range(0, len(whole), 3)) if not indexed else noticed >= payload


def test_a_flipped_byte_names_shard_slide_and_region(folder):
    shard = folder / shard_name(0)
    info = Records(folder).slides[1]
    data = bytearray(shard.read_bytes())
    data[info.features_offset + int(info.region_rows[2]) * info.row_bytes] ^= 4
    shard.write_bytes(data)
    records = Records(folder)
    records.read(0)
    records.read_regions(1, [0, 1])
    with pytest.raises(ValueError, match=f"{shard_name(0)}: slide S1, region 2: a byte flipped.*prepare"):
        records.read_regions(1, [2])
    data[info.coords_offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="slide S1: a byte flipped in its coordinates"):
        Records(folder).coords(1)


def test_a_flipped_byte_in_an_index_is_found(folder):
    path = index_path(folder / shard_name(0))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"00000\.tfrecord\.idx: .*delete it"):
            Records(folder)
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or cut short"):
            Records(folder)


def test_a_shard_cut_short(folder):
    shard = folder / shard_name(1)
    whole = shard.read_bytes()
    for size in range(1, len(whole), 41):
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"cut short: {size} bytes, expected {len(whole)}"):
            Records(folder)
        with pytest.raises(ValueError, match=f"idx: belongs to a shard of {len(whole)} bytes, .* has {size}"):
            Records([shard])
        with pytest.raises(OSError, match=r"00001\.tfrecord"):
            write_index(shard)
        assert any(shard.name in fault for fault in verify(folder))


def test_a_shard_cut_short_while_it_is_open(folder):
    records = Records(folder)
    os.truncate(folder / shard_name(1), 100)
    with pytest.raises(OSError, match=r"00001\.tfrecord: the file ends at byte"):
        records.read(2)


def test_an_index_is_rebuilt_as_it_was(folder):
    for shard in (folder / shard_name(0), folder / shard_name(1)):
        written = index_path(shard).read_bytes()
        index_path(shard).unlink()
        Records(folder)
        assert index_path(shard).read_bytes() == written
        write_index(shard)
        assert index_path(shard).read_bytes() == written


def test_shards_of_other_writers(folder, tmp_path_factory):
    """Keys in any order, packed or not, in several messages: any protobuf writer may do so, TensorFlow among them."""
    other = tmp_path_factory.mktemp("other") / "cohort-train.tfrecord-00000-of-00001"
    rng = np.random.default_rng(0)
    with other.open("wb") as file:
        for example in iter_examples(folder / shard_name(0)):
            parts = []
            for key in rng.permutation(sorted(example.features.feature)):
                part = tf_example_pb2.Example()
                part.features.feature[key].CopyFrom(example.features.feature[key])
                parts.append(part.SerializeToString())
            data = b"".join(parts)  # concatenated messages are merged
            length = struct.pack("<Q", len(data))
            file.write(length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data)))
    records, ours = Records(other.parent), Records(folder)
    for i in range(2):
        assert (records.read(i).features == ours.read(i).features).all()
        assert (records.read_regions(i, [1])[0] == ours.read_regions(i, [1])[0]).all()


def test_foreign_records_are_refused(tmp_path):
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(b"png")
    for data, message in ((example.SerializeToString(), "has no case_id, coords"), (b"\xff" * 20, "not a tf.train.Ex")):
        length = struct.pack("<Q", len(data))
        path = tmp_path / "x.tfrecord"
        path.write_bytes(length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data)))
        with pytest.raises(ValueError, match=rf"x\.tfrecord.*{message}"):
            Records(tmp_path)
    (tmp_path / "x.tfrecord").write_bytes(b"hello, not a TFRecord at all")
    with pytest.raises(ValueError, match="is not a TFRecord"):
        Records(tmp_path)


MIXTURES = {
    "encoder": ({"encoder": "uni"}, r"1 with encoder 'enc' \(S0\); 1 with encoder 'uni' \(S1\)"),
    "feature_dim": ({"features": np.ones((40, 7), "f2")}, r"1 with feature_dim 6 \(S0\); 1 with feature_dim 7 \(S1\)"),
    "patch size": ({"patch_size": 128}, r"1 with patch size in um 32 \(S0\); 1 with patch size in um 64 \(S1\)"),
    "mpp": ({"mpp": 0.25}, r"1 with patch size in um 32 \(S0\); 1 with patch size in um 16 \(S1\)"),
    "unknown mpp": ({"mpp": 0.0, "patch_size": 128}, "S1 has patches of 128 px, .* have 64 px .*mpp is not known"),
    "twice": ({"slide_id": "S0"}, "slide S0 occurs twice"),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_refused_by_name(tmp_path, name, apart):
    changes, message = MIXTURES[name]
    second = make_slide(**({"name": "S1"} | {"seed": 1}))
    second = replace(second, **changes)
    if apart:
        write(tmp_path, [make_slide()])
        write(tmp_path, [second], 1)
    with pytest.raises(ValueError, match=message):
        Records(tmp_path) if apart else write(tmp_path, [make_slide(), second])
    assert apart or not list(tmp_path.iterdir())


@pytest.mark.parametrize(("how", "name"), [({"cut": "scan"}, "cut"), ({"dtype": "bfloat16"}, "feature_dtype")])
def test_mixed_cuts_and_dtypes_are_refused(tmp_path, how, name):
    write(tmp_path, [make_slide()])
    write(tmp_path, [make_slide("S1")], 1, **how)
    with pytest.raises(ValueError, match=rf"1 with {name} .* \(S0\); 1 with {name} .* \(S1\)"):
        Records(tmp_path)


def test_nominal_and_measured_mpp_go_together(tmp_path):
    write(tmp_path, [make_slide(), make_slide("S1", mpp=0.4605), make_slide("S2", mpp=0.25, patch_size=128)])
    assert len(Records(tmp_path)) == 3


def test_mixed_edges_are_refused(tmp_path):
    write(tmp_path, [make_slide()])
    write(tmp_path, [make_slide("S1")], 1, edge_um=128.0)
    with pytest.raises(ValueError, match="slide S1 was not cut into squares of 128 px"):
        finish_folder(tmp_path, edge_um=64.0)
    assert not (tmp_path / "manifest.json").exists()


def test_float16_overflow_is_refused(tmp_path):
    slide = make_slide(features=np.full((40, 6), 7e4, np.float32))
    with pytest.raises(ValueError, match="slide S0: .*7e\\+04 overflow float16; .*bfloat16"):
        write(tmp_path, [slide])
    assert not list(tmp_path.iterdir())
    write(tmp_path, [slide], dtype="bfloat16")


def test_features_too_small_for_float16_are_refused(tmp_path):
    """They would be zeros in the records; small ones beside large ones are nothing lost."""
    features = np.ones((40, 6), np.float32)
    features[:, 3] = 1e-9
    write(tmp_path, [make_slide(features=features)])
    features[7:9] = 1e-9
    with pytest.raises(
        ValueError, match=r"slide S0: features of 2 of 40 patches .* too small for float16.*--dtype bfloat16"
    ):
        write(tmp_path, [make_slide(features=features)])
    write(tmp_path, [make_slide(features=features)], dtype="bfloat16")


def test_verify_finds_patches_where_none_can_be(tmp_path, monkeypatch):
    """In records that were written before slides were checked for it."""
    sound = make_slide()
    swapped = sound.coords[:, ::-1] + np.array([5000, 0])
    monkeypatch.setattr(SlideFeatures, "_place_fault", lambda slide: "")
    slides = [
        make_slide("S0", coords=swapped), make_slide("S1", coords=sound.coords[[0, *range(39)]]),
        make_slide("S2", patch_size=3, mpp=32 / 3), make_slide("S3"),
    ]  # fmt: skip
    write(tmp_path, slides, edge_px=128)
    faults = verify(tmp_path)
    assert [fault.split("slide ")[1][:2] for fault in faults if "slide S" in fault] == ["S0", "S1", "S2"]
    shard = str(tmp_path / shard_name(0))
    assert all(fault.startswith(shard) for fault in faults[:3])
    assert "beyond the slide, which is 576 x 24000" in faults[0] and "x and y exchanged" in faults[0]
    assert "1 of 39 coordinates occur more than once" in faults[1] and "an impossible patch size of 3 px" in faults[2]


def test_a_slide_beyond_protobuf_is_refused(tmp_path):
    features = np.broadcast_to(np.float16(1), (2**20, 1100))
    slide = make_slide(patches=1)
    object.__setattr__(slide, "features", features)
    with pytest.raises(ValueError, match="1048576 patches x 1100 make 2.3 GB"):
        write(tmp_path, [slide])


def test_a_bad_slide_in_the_middle_leaves_nothing(tmp_path):
    def slides():
        yield make_slide()
        raise OSError("x.h5: not a valid HDF5 file")

    with pytest.raises(OSError, match="x.h5"):
        write(tmp_path, slides())
    assert not list(tmp_path.iterdir())


def test_what_stood_stays_when_a_rewrite_fails(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="twice"):
        write(folder, [make_slide("S7"), make_slide("S7")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    """A real limit of the operating system, met in mid-write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large after .*no partial file is left.*free space") as error:
            write(tmp_path, (make_slide(f"S{i}", 2000, 64) for i in range(3)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and str(tmp_path / shard_name(0)) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_left_keeps_its_errno():
    with open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError, match=r"No space left.*x\.tfrecord") as error:
            AtomicFile(full, Path("x.tfrecord")).write(b"data")
    assert error.value.errno == errno.ENOSPC


def test_leftovers_of_killed_writers(folder):
    young, old = (folder / f"{shard_name(0)}.{pid}-00000000.tmp" for pid in (1, 2))
    young.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert len([fault for fault in verify(folder) if "killed" in fault]) == 2
    write(folder, [make_slide("S0"), make_slide("S1", 7, seed=1)])
    assert young.exists() and not old.exists(), "the young one may have a living writer"


def test_a_folder_that_may_only_be_read(folder, monkeypatch):
    """An index that cannot be kept is made in memory."""
    for shard in folder.glob("*.tfrecord"):
        index_path(shard).unlink()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(Path, "open", lambda self, mode="r", **k: refuse() if "x" in mode else open(self, mode, **k))
    assert len(Records(folder)) == 3 and not list(folder.glob("*.idx"))


def test_threads_share_few_files(tmp_path):
    for number in range(6):
        write(tmp_path, [make_slide(f"S{number}", 30, seed=number)], number)
    records, alone = Records(tmp_path, open_files=2), Records(tmp_path)
    expected = [alone.read(i).features for i in range(6)]
    del alone
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    def read(job):
        i = job % 6
        return (records.read(i).features == expected[i]).all() and len(records.read_regions(i, [0, 2])) == 2

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(300)))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_finished_folder(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["encoder"] == "enc" and manifest["cut"] == "grid" and manifest["edge_um"] == 64.0
    assert [shard["slides"] for shard in manifest["shards"]] == [["S0", "S1"], ["S2"]]
    assert (manifest["num_slides"], manifest["num_patches"]) == (3, 72)
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"] and f"{crc32c_bitwise(data):08x}" == shard["crc32c"]
    assert verify(folder) == [] and manifest["sha256"] == manifest_hash(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert finish_folder(folder, edge_um=64.0) == manifest
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_hash_follows_the_data(folder):
    before = manifest_hash(folder)
    write(folder, [make_slide("S2", 25, seed=3)], 1)
    assert manifest_hash(folder) != before
    assert any("not the shard that manifest.json describes" in fault for fault in verify(folder))


def test_verify_names_what_is_missing_or_extra(folder):
    write(folder, [make_slide("S3")], 2)
    assert [fault for fault in verify(folder) if "00002.tfrecord: not in manifest.json" in fault]
    (folder / shard_name(0)).unlink()
    assert [fault for fault in verify(folder) if "00000.tfrecord: listed in manifest.json but missing" in fault]
    with pytest.raises(ValueError, match=r"00000\.tfrecord is missing, .*\.tfrecord exists"):
        finish_folder(folder, edge_um=64.0)
    (folder / "manifest.json").write_text("{}")
    assert [fault for fault in verify(folder) if "not a manifest" in fault]


def test_verify_finds_an_index_of_another_shard(folder):
    shard, slide = folder / shard_name(1), make_slide("S2", 25, seed=2)
    stale, size = index_path(shard).read_bytes(), shard.stat().st_size
    for scale in range(2, 100):  # until other data make a shard of the same size: CRCs are numbers of 4 or 5 bytes
        write(folder, [replace(slide, features=slide.features * scale)], 1)
        if shard.stat().st_size == size:
            break
    index_path(folder / shard_name(1)).write_bytes(stale)
    assert [fault for fault in verify(folder) if "belongs to another shard" in fault]
    with pytest.raises(ValueError, match="slide S2, region 0"):
        Records(folder).read(2)


def test_a_shard_of_no_slides_fills_a_number(folder):
    write(folder, [], 2)
    manifest = finish_folder(folder, edge_um=64.0)
    assert manifest["shards"][2]["slides"] == [] and verify(folder) == [] and len(Records(folder)) == 3


def test_folders_without_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder.*prepare"):
        Records(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"no \*\.tfrecord"):
        Records(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such shard"):
        Records([tmp_path / "x.tfrecord"])
    write(tmp_path, [])
    with pytest.raises(ValueError, match="no slides in the records"):
        Records(tmp_path)


def test_reading_imports_neither_tensorflow_nor_jax(folder):
    import subprocess
    import sys

    code = (
        "import sys; from pathflip_jax.data.records import Records; "
        "r = Records(sys.argv[1]); r.read_regions(0, [0]);"
        "sys.exit(str([m for m in ('tensorflow', 'tensorflow_datasets', 'jax', 'torch') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real feature files in {REAL}: set PATHFLIP_TEST_DATA")
@pytest.mark.parametrize("tool", ["clam/h5_files", "trident/features_handcrafted512", "slidechat_csv"])
def test_real_files_round_trip(tmp_path, tool):
    (path,) = (path for path in (REAL / tool).iterdir() if path.stem == "cmu-1-small-region")
    slide = read_features(path)
    write_shard(tmp_path / shard_name(0), [slide], edge_um=512.0)
    finish_folder(tmp_path, edge_um=512.0)
    assert verify(tmp_path) == []
    found, order = Records(tmp_path).read(0), cut_regions(slide, edge_um=512.0).order
    assert (found.features == slide.features[order].astype(np.float16)).all()
    assert (found.coords == slide.coords[order]).all() and found.width == slide.width
