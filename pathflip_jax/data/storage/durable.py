"""Files and folders brought to the disk itself, so that a loss of power takes nothing back, where that is possible."""

import errno
import os
from pathlib import Path

# What file systems answer that have no such thing (FUSE, network shares, and folders on many more), or do not let this
# user open a folder. What was written stands all the same.
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
