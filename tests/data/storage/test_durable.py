"""Durable writes: a file system without sync is tolerated, a failing disk is an error."""

import errno
import os
import stat

import pytest

from pathflip_jax.data.storage.atomic_files import atomic_file


def write(path):
    with atomic_file(path) as file:
        file.write(b"whole")


@pytest.mark.parametrize("folders_only", [True, False])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_still_gets_whole_files(tmp_path, monkeypatch, number, folders_only):
    def fsync(descriptor):
        if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_may_not_be_listed_still_gets_whole_files(tmp_path, monkeypatch):
    def refused(path, flags, *more, before=os.open, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refused)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_failing_disk_is_told(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "file")
    assert not list(tmp_path.iterdir())
