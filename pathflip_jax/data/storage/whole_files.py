"""Files that appear whole or not at all, on disks and behind URLs."""

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
from pathflip_jax.data.storage.framing import crc32c, frame, in_pieces

ABANDONED_AFTER = 3600.0  # seconds; a living writer touches its file all the time


class WholeFile:
    """The file that `whole_file` yields: counts what is written and sums it up."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self.path = path
        self.bytes = 0
        self.crc32c = 0

    def write(self, data: bytes | np.ndarray) -> None:
        """Write all of `data`. Raises OSError naming the file and the cure, such as on a full disk."""
        for piece in in_pieces(data):
            self._write(piece)

    def _write(self, data: bytes | np.ndarray) -> None:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self.failure(error) from None
        self.bytes += size
        self.crc32c = crc32c(data, start=self.crc32c)

    def write_record(self, *parts: bytes | np.ndarray) -> int:
        """Write one TFRecord of parts that stay uncopied; returns where its data starts."""
        head, tail = frame(*parts)
        self.write(head)
        offset = self.bytes
        for part in parts:
            self.write(part)
        self.write(tail)
        return offset

    def failure(self, error: OSError) -> OSError:
        """The error of the operating system, with what to do about it; it keeps its errno."""
        cure = "free space there or write elsewhere"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "check that the disk is there and may be written"
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"{reason} after {self.bytes / 1e6:.1f} MB; nothing of it is left behind, {cure}"
        return OSError(error.errno, message, str(self.path))


@contextmanager
def whole_file(path: Place) -> Iterator[WholeFile]:
    """Write a file that appears whole or not at all: a temporary beside it, fsync, rename.

    The temporary's name is unique, so two writers of one file never mix; what killed writers of it left more than an
    hour ago is removed once the file stands. What goes to a URL is made in the system's temporary folder and
    uploaded in one: buckets show an object once it is whole. Raises OSError when the disk is full or the folder cannot
    be written.
    """
    if not isinstance(path, Path):
        with tempfile.NamedTemporaryFile(prefix="pathflip-", buffering=0) as raw:
            yield WholeFile(raw, Path(raw.name))
            upload(Path(raw.name), path)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    out = WholeFile(None, path)
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
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - ABANDONED_AFTER:
                left.unlink()
    sync(path.parent)
