"""Standard input, output and error that outlive whoever reads them.

A run of days is often watched through a terminal that is closed, or by `| head`. Nobody reading any more is no reason
to stop, nor to exit with another code; output that a full disk loses is an error.
"""

import errno
import io
import os
import sys

STDOUT, STDERR = 1, 2
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO}  # the reader, or the whole terminal


class _Lasting(io.FileIO):
    """A descriptor that leads nowhere once its reader has gone."""

    def write(self, data) -> int:
        """Write, or drop what nobody reads. Raises OSError for standard output on a disk that is full."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE and self.fileno() == STDERR:  # a full disk: a log that is lost ends nothing
                return len(data)
            _lead_nowhere(self.fileno())
            if error.errno not in _GONE:
                raise OSError(error.errno, f"{error.strerror}; write it elsewhere", "standard output") from None
            return len(data)


def keep_open() -> None:
    """Make the three streams last, those of libraries and of processes that this one starts too.

    Streams that somebody else has put there (pytest, notebooks) stay. What the encoding of the terminal lacks is
    written as an escape.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file to be opened would take its place, and get its text
            _lead_nowhere(descriptor)
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False))
            setattr(sys, f"__{name}__", getattr(sys, name))
    for descriptor, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(getattr(stream.buffer, "raw", None), _Lasting):
            continue
        stream.flush()
        raw = _Lasting(descriptor, "w", closefd=False)
        buffer = raw if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(raw)  # the first: python -u
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        lasting = io.TextIOWrapper(buffer, stream.encoding, errors, **how)
        setattr(sys, name, lasting)
        setattr(sys, f"__{name}__", lasting)


def flush() -> None:
    """Write what is buffered. Raises OSError where standard output is lost."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
