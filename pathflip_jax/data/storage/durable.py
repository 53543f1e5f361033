"""Durable writes: fsync of files and folders where supported, so that writes survive a power loss."""

import errno
import os
from pathlib import Path

# Errors of file systems without fsync (FUSE, network shares, and for folders many more), or where this user may not
# open a folder. The data are written nevertheless.
_UNSUPPORTED = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR,
    errno.ENOTTY,
}  # fmt: skip


def sync(file: int | Path) -> None:
    """Flush an open file, or a folder given by its path, to the disk; a no-op if the file system lacks support.

    Raises OSError if the disk is full or fails.
    """
    try:
        if not isinstance(file, Path):
            os.fsync(file)
            return
        folder = os.open(file, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
