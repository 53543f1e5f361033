"""Atomic file writes, on disks and to URLs."""

import errno
import glob
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pathflip_jax.data.storage.durable import sync
from pathflip_jax.data.storage.files import Place, upload
from pathflip_jax.data.storage.framing import Checksummed, Data, extended, frame, in_blocks

WRITE_BACK = 8 << 20  # bytes written before their write-back is started
ABANDONED_AFTER = 3600.0  # seconds; an active writer modifies its file continually


class AtomicFile:
    """File yielded by `atomic_file`, which tracks the size and checksum of the data written."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self.path = path
        self.bytes = self._advised = 0
        self.crc32c = 0

    def write(self, data: Data) -> None:
        """Write all of `data`. Raises OSError naming the file and the cure, as on a full disk."""
        for piece in in_blocks(data.data if isinstance(data, Checksummed) else data):
            self._write(piece)
        self.crc32c = extended(self.crc32c, data)

    def _write(self, data: bytes | np.ndarray) -> None:
        left = memoryview(data).cast("B")
        try:
            while left:
                count = self._file.write(left[: self._advised + WRITE_BACK - self.bytes])
                left = left[count:]
                self.bytes += count
                if self.bytes >= self._advised + WRITE_BACK:
                    self._begin_writing_back()
        except OSError as error:
            raise self.failure(error) from None

    def _begin_writing_back(self) -> None:
        """Start write-back of the data written since the last call, to shorten the final fsync.

        Linux does so for pages advised as not needed soon; dirty ones stay in the cache.
        """
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # only advice; disk errors are reported by fsync
                size = self.bytes - self._advised
                os.posix_fadvise(self._file.fileno(), self._advised, size, os.POSIX_FADV_DONTNEED)
        self._advised = self.bytes

    def write_record(self, *parts: Data) -> int:
        """Write one TFRecord from parts, without copying them; returns the offset of its data."""
        head, tail = frame(*parts)
        self.write(head)
        offset = self.bytes
        for part in parts:
            self.write(part)
        self.write(tail)
        return offset

    def failure(self, error: OSError) -> OSError:
        """Error of the operating system with the cure added and its errno kept."""
        cure = "free space there, or write elsewhere"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "check that the disk is mounted and writable"
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"{reason} after {self.bytes / 1e6:.1f} MB; no partial file is left; {cure}"
        return OSError(error.errno, message, str(self.path))


@contextmanager
def atomic_file(path: Place, *, sync_folder: bool = True) -> Iterator[AtomicFile]:
    """Write a file atomically: a temporary file next to it, fsync, rename.

    The temporary name is unique, so two writers of one file never mix; leftovers of killed writers older than an hour
    are removed once the file is in place. For a URL the file is made in the system's temporary folder and uploaded in
    one request: buckets show an object only once it is complete. Without `sync_folder` a power loss may undo the rename
    until the next atomic write to the folder. Raises OSError when the disk is full or the folder cannot be written.
    """
    if not isinstance(path, Path):
        with tempfile.NamedTemporaryFile(prefix="pathflip-", buffering=0) as raw:
            yield AtomicFile(raw, Path(raw.name))
            upload(Path(raw.name), path)
        return
    temporary = _temporary(path)
    out = AtomicFile(None, path)
    try:
        try:
            raw = temporary.open("xb", buffering=0)
        except OSError as error:
            raise out.failure(error) from None
        with raw:
            out._file = raw
            yield out
            try:
                sync(raw.fileno())
            except OSError as error:
                raise out.failure(error) from None
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _remove_leftovers(path)
    if sync_folder:
        sync(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Path of a temporary file next to `path`, for libraries that open files themselves; renamed once it is whole.

    Raises OSError as the library does; then, and after any other error, no file is left.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _remove_leftovers(path)
    sync(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if leftover.stat().st_mtime < time.time() - ABANDONED_AFTER:
                leftover.unlink()
