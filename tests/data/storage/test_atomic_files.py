"""Atomic writing of files."""

import os

import numpy as np
import pytest

from pathflip_jax.data.storage import atomic_files
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.framing import crc32c


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
def test_the_disk_begins_while_the_file_is_written(tmp_path, monkeypatch):
    told, advise = [], os.posix_fadvise

    def noted(fd, offset, size, advice):
        told.append((offset, size))
        advise(fd, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    monkeypatch.setattr(atomic_files, "WRITE_BACK", 100)
    parts = [np.random.default_rng(size).bytes(size) for size in (30, 250, 0, 90, 7)]
    with atomic_file(tmp_path / "x") as out:
        for part in parts:
            out.write(part)
    whole = b"".join(parts)
    assert (tmp_path / "x").read_bytes() == whole and out.bytes == len(whole) and out.crc32c == crc32c(whole)
    assert told == [(0, 100), (100, 100), (200, 100)]


def test_advice_that_a_file_system_does_not_take(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(atomic_files, "WRITE_BACK", 4)
    with atomic_file(tmp_path / "x") as out:
        out.write(b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.parametrize("sync_folder", [True, False])
def test_a_folder_is_synced_unless_the_next_file_does_it(tmp_path, monkeypatch, sync_folder):
    synced, sync = [], atomic_files.sync

    def noted(file):
        synced.append(file)
        sync(file)

    monkeypatch.setattr(atomic_files, "sync", noted)
    with atomic_file(tmp_path / "x", sync_folder=sync_folder) as out:
        out.write(b"x")
    assert (tmp_path in synced) == sync_folder and len(synced) == 1 + sync_folder
