"""Standard streams that survive the loss of their reader.

A run that takes days is often watched through a terminal that is later closed, or through `| head`. Losing the reader
neither stops the run nor changes its exit code; output lost to a full disk is an error.
"""

import errno
import io
import os
import sys

STDOUT, STDERR = 1, 2
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO}  # the reader or the terminal is gone


class _Unbreakable(io.FileIO):
    """A file descriptor that discards output once its reader is gone."""

    def write(self, data) -> int:
        """Write, or discard output without a reader. Raises OSError for standard output on a full disk."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE and self.fileno() == STDERR:  # a full disk: a lost log must not end the run
                return len(data)
            _redirect_to_devnull(self.fileno())
            if error.errno not in _GONE:
                raise OSError(error.errno, f"{error.strerror}; write it elsewhere", "standard output") from None
            return len(data)


def keep_open() -> None:
    """Keep the three streams usable after their reader is gone, for libraries and child processes too.

    Streams replaced by others (pytest, notebooks) are left alone. Characters missing from the terminal's encoding are
    escaped.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next opened file would get its descriptor, and its output
            _redirect_to_devnull(descriptor)
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False))
            setattr(sys, f"__{name}__", getattr(sys, name))
    for descriptor, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(getattr(stream.buffer, "raw", None), _Unbreakable):
            continue
        stream.flush()
        raw = _Unbreakable(descriptor, "w", closefd=False)
        buffer = raw if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(raw)  # raw under python -u
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        unbreakable = io.TextIOWrapper(buffer, stream.encoding, errors, **how)
        setattr(sys, name, unbreakable)
        setattr(sys, f"__{name}__", unbreakable)


def flush() -> None:
    """Flush both output streams. Raises OSError if standard output is lost."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _redirect_to_devnull(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
