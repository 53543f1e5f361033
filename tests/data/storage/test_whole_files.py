"""Files and folders that appear whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax.data.storage import whole_files
from pathflip_jax.data.storage.framing import crc32c
from pathflip_jax.data.storage.whole_files import whole_file, whole_folder


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
def test_the_disk_begins_while_the_file_is_written(tmp_path, monkeypatch):
    told, advise = [], os.posix_fadvise

    def noted(fd, offset, size, advice):
        told.append((offset, size))
        advise(fd, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    monkeypatch.setattr(whole_files, "BEHIND", 100)
    parts = [np.random.default_rng(size).bytes(size) for size in (30, 250, 0, 90, 7)]
    with whole_file(tmp_path / "x") as out:
        for part in parts:
            out.write(part)
    whole = b"".join(parts)
    assert (tmp_path / "x").read_bytes() == whole and out.bytes == len(whole) and out.crc32c == crc32c(whole)
    assert told == [(0, 100), (100, 100), (200, 100)]


def test_advice_that_a_file_system_does_not_take(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(whole_files, "BEHIND", 4)
    with whole_file(tmp_path / "x") as out:
        out.write(b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.parametrize("sync_folder", [True, False])
def test_a_folder_is_synced_unless_the_next_file_does_it(tmp_path, monkeypatch, sync_folder):
    synced, sync = [], whole_files.sync

    def noted(file):
        synced.append(file)
        sync(file)

    monkeypatch.setattr(whole_files, "sync", noted)
    with whole_file(tmp_path / "x", sync_folder=sync_folder) as out:
        out.write(b"x")
    assert (tmp_path in synced) == sync_folder and len(synced) == 1 + sync_folder


def test_a_folder_takes_its_name_once_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "b") as part:
        (part / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists() and part.parent == tmp_path / "a"
    assert (tmp_path / "a" / "b" / "x").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as part:
        (part / "x").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_folder_with_content_is_not_written_over(tmp_path, there):
    place = tmp_path / "a"
    (place / "old").mkdir(parents=True) if there == "folder" else place.write_text("old")
    with (
        pytest.raises(FileExistsError, match="a: exists and is not empty; write to another folder"),
        whole_folder(place),
    ):
        raise AssertionError("nothing is begun")
    place.rename(tmp_path / "b")
    place.mkdir()
    with whole_folder(place):
        pass
    assert not list(place.iterdir())


def test_a_url_is_no_folder_to_write():
    with pytest.raises(ValueError, match="gs://b/out: .*local disk"), whole_folder("gs://b/out"):
        raise AssertionError("nothing is begun")
    assert not Path("gs:").exists()
