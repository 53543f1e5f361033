"""Records at URLs: the same slides and errors as on a disk, and no unrequested byte read.

The bucket is fsspec's memory file system, extended to count requests and to fail on demand.
"""

import gc
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.index import index_path
from pathflip_jax.data.records.records import Records, finish_folder, manifest_hash, shard_name, write_shard
from pathflip_jax.data.records.verify import verify
from pathflip_jax.data.storage import files
from pathflip_jax.data.storage.files import as_path
from pathflip_jax.data.texts.tables import read_rows

URL = "memory://bucket/records"


def make_bucket():
    """A file system of its own: a list of what was asked for (what, name, bytes), a list of errors still to come."""

    class Bucket(MemoryFileSystem):
        store, pseudo_dirs, asked, troubles = {}, [""], [], []

        def _ask(self, what, path, size=0):
            if self.troubles:
                raise self.troubles.pop()
            self.asked.append((what, str(path).rpartition("/")[2], size))

        def cat_file(self, path, start=None, end=None, **more):
            data = super().cat_file(path, start, end, **more)
            self._ask("read", path, len(data))
            return data

        def ls(self, path, detail=True, **more):
            self._ask("list", path)
            return super().ls(path, detail, **more)

        def put_file(self, lpath, rpath, **more):
            self._ask("write", rpath)
            return super().put_file(lpath, rpath, **more)

    return Bucket


@pytest.fixture
def bucket(monkeypatch):
    bucket = make_bucket()
    fsspec.register_implementation("memory", bucket, clobber=True)
    sleep, ours = time.sleep, threading.current_thread()

    def wait(seconds):  # threads of other tests, such as those that keep a worker, go on sleeping
        bucket.asked.append(("wait", "", seconds)) if threading.current_thread() is ours else sleep(seconds)

    monkeypatch.setattr(time, "sleep", wait)
    yield bucket
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def make_slide(name, patches=40, width=6, seed=0):
    """Patches of 64 px at 0.5 um; with an edge of 64 um, regions of 2 x 2."""
    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(np.arange(16), np.arange(-(-patches // 16))), -1).reshape(-1, 2)[:patches]
    features = rng.normal(size=(patches, width)).astype(np.float16)
    return SlideFeatures(name, "P" + name, features, (cells * 64).astype(np.int32), 64, 0.5, encoder="enc")


def write(folder, slides):
    """A finished folder of two slides a shard; the same slides anywhere give the same bytes."""
    folder = as_path(folder)
    for number in range(0, len(slides), 2):
        write_shard(folder / shard_name(number // 2), slides[number : number + 2], edge_um=64.0)
    finish_folder(folder, edge_um=64.0)
    return folder


SLIDES = [make_slide(f"S{i}", 20 + 9 * i, seed=i) for i in range(5)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5), width=st.integers(1, 9), seed=st.integers(0, 99),
    gap=st.sampled_from([0, 7, 100, 1 << 16]), piece=st.sampled_from([1, 13, 1000, 1 << 23]), data=st.data(),
)  # fmt: skip
def test_a_bucket_gives_what_the_disk_gives(bucket, monkeypatch, sizes, width, seed, gap, piece, data):
    monkeypatch.setattr(files, "GAP", gap)
    monkeypatch.setattr(files, "PIECE", piece)
    bucket.store.clear()
    slides = [make_slide(f"S{i}", n, width, seed + i) for i, n in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as local:
        write(local, slides), write(URL, slides)
        for path in Path(local).iterdir():
            assert bucket.store[f"/bucket/records/{path.name}"].getvalue() == path.read_bytes()
        disk, remote = Records(local), Records(URL)
        assert manifest_hash(local) == manifest_hash(URL) and verify(URL) == []
        for i in range(len(slides)):
            ours, theirs = remote.read(i), disk.read(i)
            assert (ours.features == theirs.features).all() and (ours.coords == theirs.coords).all()
            assert (remote.coords(i) == disk.coords(i)).all()
            asked = data.draw(st.lists(st.integers(0, disk.slides[i].num_regions - 1), max_size=6))
            for part, expected in zip(remote.read_regions(i, asked), disk.read_regions(i, asked), strict=True):
                assert (part == expected).all()


def test_a_step_reads_its_regions_alone(bucket):
    """Four scattered regions of a slide of 4,096 patches, straight into the arrays of the batch."""
    write(URL, [make_slide("S0", 4096, 64)])
    records = Records(URL)
    info = records.slides[0]
    bucket.asked.clear()
    chosen = [1000, 300, 500, 301]
    out = [np.zeros((4, 64), np.float16) for _ in chosen]
    assert all(a is b for a, b in zip(records.read_regions(0, chosen, out), out, strict=True))
    assert {what for what, _, _ in bucket.asked} == {"read"} and len(bucket.asked) == 4  # neighbours in one
    features, coords = 4 * 4 * info.row_bytes, 8 * int(info.region_rows[1001] - info.region_rows[300])
    assert sum(size for _, _, size in bucket.asked) == features + coords
    assert features + coords < 0.05 * info.num_patches * info.row_bytes


def test_near_ranges_are_fetched_as_one(bucket, monkeypatch):
    write(URL, [make_slide("S0", 4096, 64)])
    records = Records(URL)
    width = 4 * records.slides[0].row_bytes
    for gap, requests in ((0, 3), (width, 2), (1 << 20, 1)):
        monkeypatch.setattr(files, "GAP", gap)
        bucket.asked.clear()
        records.read_regions(0, [900, 902])
        assert len(bucket.asked) == requests


def test_opening_a_cohort_reads_its_indexes_alone(bucket):
    folder = write(URL, SLIDES)
    bucket.asked.clear()
    assert len(Records(URL)) == 5
    names = {"manifest.json", *(shard_name(number) + ".idx" for number in range(3))}
    read = [(name, size) for what, name, size in bucket.asked if what == "read"]
    assert {name for name, _ in read} == names and len(read) == 4
    assert dict(read) == {name: (folder / name).stat().st_size for name in names}
    assert sum(what == "list" for what, _, _ in bucket.asked) == 1


def test_an_index_that_is_missing_is_built_and_kept(bucket):
    folder = write(URL, SLIDES)
    before = {path: file.getvalue() for path, file in bucket.store.items()}
    index_path(folder / shard_name(1)).unlink()
    assert len(Records(URL)) == 5
    assert {path: file.getvalue() for path, file in bucket.store.items()} == before


def test_an_index_that_may_not_be_kept(bucket, monkeypatch):
    folder = write(URL, SLIDES)
    index_path(folder / shard_name(1)).unlink()

    def refuse(self, lpath, rpath, **more):
        raise OSError("Forbidden: bucket/records")  # as gcsfs says it

    monkeypatch.setattr(bucket, "put_file", refuse)
    assert len(Records(URL)) == 5 and not index_path(folder / shard_name(1)).exists()


def test_threads_read_one_bucket(bucket):
    write(URL, SLIDES)
    records = Records(URL, open_files=2)

    def read(job):
        return (records.read(job % 5).features == expected[job % 5]).all()

    expected = [records.read(i).features for i in range(5)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(100)))


def damage(bucket, name, at=None, size=None):
    file = bucket.store[f"/bucket/records/{name}"]
    data = bytearray(file.getvalue())
    if at is not None:
        data[at] ^= 4
    file.seek(0)
    file.truncate()
    file.write(bytes(data[:size]))


def test_a_flipped_byte_names_url_slide_and_region(bucket):
    write(URL, SLIDES)
    records = Records(URL)
    info = records.slides[1]
    damage(bucket, shard_name(0), info.features_offset + int(info.region_rows[2]) * info.row_bytes)
    records.read(0), records.read_regions(1, [0, 1])
    with pytest.raises(ValueError, match=f"{URL}/{shard_name(0)}: slide S1, region 2: a byte flipped"):
        records.read_regions(1, [2])
    damage(bucket, shard_name(0), info.coords_offset)
    with pytest.raises(ValueError, match=f"{URL}/{shard_name(0)}: slide S1: a byte flipped in its coordinates"):
        records.coords(1)
    assert any(f"{URL}/{shard_name(0)}: " in fault for fault in verify(URL))


def test_a_damaged_index_names_its_url(bucket):
    write(URL, SLIDES)
    damage(bucket, shard_name(1) + ".idx", 20)
    with pytest.raises(ValueError, match=f"{URL}/{shard_name(1)}.idx: damaged.*delete it"):
        Records(URL)


def test_an_object_cut_short_and_one_that_vanished(bucket):
    write(URL, SLIDES)
    records = Records(URL)
    damage(bucket, shard_name(1), size=300)
    with pytest.raises(OSError, match=f"{URL}/{shard_name(1)}: the file ends at byte .* too early"):
        records.read(2)
    with pytest.raises(ValueError, match=rf"{URL}/{shard_name(1)}: not the shard .* cut short: 300 bytes"):
        Records(URL)
    with pytest.raises(ValueError, match=rf"{URL}/{shard_name(1)}\.idx: belongs to a shard of .* has 300"):
        Records([f"{URL}/{shard_name(1)}"])
    del bucket.store[f"/bucket/records/{shard_name(1)}"]
    with pytest.raises(FileNotFoundError, match=f"{URL}/{shard_name(1)}: no such object"):
        records.read(2)
    with pytest.raises(FileNotFoundError, match="memory://bucket/elsewhere: no such folder"):
        Records("memory://bucket/elsewhere")


def test_what_fails_in_passing_is_asked_for_again(bucket):
    write(URL, SLIDES)
    records = Records(URL)
    expected = records.read(0).features
    bucket.asked.clear()
    bucket.troubles[:] = [TimeoutError("slow down"), ConnectionError("reset")]
    assert (records.read(0).features == expected).all()
    waits = [seconds for what, _, seconds in bucket.asked if what == "wait"]
    assert len(waits) == 2 and 0.25 <= waits[0] <= 0.75 and 0.5 <= waits[1] <= 1.5
    bucket.troubles[:] = [TimeoutError("slow down")] * 2
    assert len(Records(URL)) == 5 and not bucket.troubles, "listing and indexes too"


def test_only_what_failed_is_asked_for_again(bucket):
    write(URL, [make_slide("S0", 4096, 64)])
    records = Records(URL)
    bucket.asked.clear()
    bucket.troubles[:] = [TimeoutError("slow down")]
    records.read_regions(0, [300, 500, 1000])
    assert [what for what, _, _ in bucket.asked].count("read") == 4


@pytest.mark.parametrize("what", ["open", "read", "write"])
def test_a_bucket_that_stays_away(bucket, what):
    write(URL, SLIDES)
    records = Records(URL)
    before = set(bucket.store)
    bucket.troubles[:] = [ConnectionError("no route to host")] * 99
    with pytest.raises(OSError, match=f"{URL}.*: failed 4 times, the last time with: no route to host; check network"):
        if what == "open":
            Records(URL)
        elif what == "read":
            records.read(0)
        else:
            write_shard(f"{URL}/{shard_name(3)}", SLIDES, edge_um=64.0)
    assert set(bucket.store) == before


def test_a_bucket_that_refuses_is_asked_once(bucket):
    write(URL, SLIDES)
    for trouble in (PermissionError("Access Denied"), OSError("Forbidden: bucket/records")):
        bucket.troubles[:] = [trouble]
        with pytest.raises(PermissionError, match=f"{URL}: permission denied .*{trouble}.*credentials"):
            Records(URL)


def test_a_shard_appears_whole_or_not_at_all(bucket, monkeypatch):
    write(URL, SLIDES)
    before = {path: file.getvalue() for path, file in bucket.store.items()}

    def slides():
        yield SLIDES[0]
        raise OSError("x.h5: not a valid HDF5 file")

    with pytest.raises(OSError, match="x.h5"):
        write_shard(f"{URL}/{shard_name(0)}", slides(), edge_um=64.0)
    assert {path: file.getvalue() for path, file in bucket.store.items()} == before

    def lose_the_end(self, lpath, rpath, **more):
        self.pipe_file(rpath, Path(lpath).read_bytes()[:-1])

    monkeypatch.setattr(bucket, "put_file", lose_the_end)
    with pytest.raises(OSError, match=f"{URL}/{shard_name(3)}: failed 4 times.* bytes arrived"):
        write_shard(f"{URL}/{shard_name(3)}", SLIDES, edge_um=64.0)


def test_tables_behind_urls(bucket):
    table = as_path("memory://bucket/slides.csv")
    table.write_text("slide_id,split\nS0,train\n")
    (row,) = read_rows("memory://bucket/slides.csv")
    assert row.values == {"slide_id": "S0", "split": "train"} and row.place == "memory://bucket/slides.csv, line 2"
    with pytest.raises(FileNotFoundError, match="memory://bucket/none.csv: no such object"):
        read_rows("memory://bucket/none.csv")


def test_paths_and_urls(tmp_path):
    assert as_path("a/b") == Path("a/b") and as_path(tmp_path) is tmp_path
    assert as_path("file:///a/b") == Path("/a/b")
    path = as_path("memory://a/b")
    assert as_path(path) is path and str(path / "c.tfrecord") == "memory://a/b/c.tfrecord"
    with pytest.raises(ValueError, match="gs:/a/b: a URL that lost a slash"):
        as_path(Path("gs://a/b"))
    with pytest.raises(ValueError, match="nothing://a/b: .*expected a local path, gs://"):
        as_path("nothing://a/b")


@pytest.mark.parametrize(("url", "module", "extra"), [("gs://b/r", "gcsfs", "gcs"), ("s3://b/r", "s3fs", "s3")])
def test_a_missing_package_names_its_extra(monkeypatch, url, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(ImportError, match=rf"{url}: .*pip install pathflip-jax\[{extra}\]"):
        as_path(url)


def test_a_file_let_go_of_when_a_program_ends_is_closed_without_a_word(tmp_path, monkeypatch):
    """Python clears modules before what they hold: a reader that lives to the end finds no `os` any more."""
    path = tmp_path / "x"
    path.write_bytes(b"x")
    file = files.LocalFile(path)
    fd, fstat = file.fd, os.fstat
    monkeypatch.setattr(files, "os", None)
    del file  # an exception in here would be a warning, and warnings are errors
    gc.collect()
    with pytest.raises(OSError):
        fstat(fd)
