"""Process limits of `ulimit` and containers, and the errors that they cause, with their cures.

A library that reaches such a limit reports that a file cannot be opened or that memory is exhausted, but rarely why:
disk and machine are fine, and the cure is one shell command.
"""

import contextlib
import errno
import re
import resource
from collections.abc import Callable
from typing import NamedTuple

OPEN_FILES = 1 << 16  # more than any command opens; low enough for programs that close every descriptor up to the limit
_UNLIMITED = resource.RLIM_INFINITY


def raise_open_files() -> None:
    """Raise the limit on open files to the hard limit: cohorts of many shards need more than the usual default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == _UNLIMITED else min(hard, OPEN_FILES)
    if soft != _UNLIMITED and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_files() -> int:
    """Limit on the open files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == _UNLIMITED else soft


def address_space() -> int | None:
    """Limit on the address space of this process in bytes (`ulimit -v`); None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == _UNLIMITED else soft


def explain(error: BaseException) -> str | None:
    """Message for an error caused by a process limit, with the limit and its cure; None for other errors."""
    numbers, texts, link = set(), [], error
    while link is not None and str(link) not in texts:
        if isinstance(link, OSError | MemoryError):
            numbers.add(getattr(link, "errno", errno.ENOMEM))
        texts.append(str(link))
        link = link.__cause__ or link.__context__
    for limit in _LIMITS:
        if numbers & limit.numbers or any(re.search(limit.words, text, re.IGNORECASE) for text in texts):
            if cure := limit.cure():
                return f"{str(error) or type(error).__name__}; {cure}"
    return None


class _Limit(NamedTuple):
    """Signature of a limit, an error number or a library's message, and its cure; None where there is none."""

    numbers: set[int]
    words: str
    cure: Callable[[], str | None]


def _open_files() -> str:
    return f"this process may open at most {open_files()} files: raise the limit with `ulimit -n {OPEN_FILES}`"


def _file_size() -> str | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == _UNLIMITED:
        return None
    return f"a file of this process may have at most {soft / 1e6:.4g} MB: remove the limit with `ulimit -f unlimited`"


def _memory() -> str | None:
    space = address_space()
    if space is None:
        return None
    return (
        f"this process may map at most {space / 2**30:.3g} GiB of memory: remove the limit with `ulimit -v unlimited`"
    )


def _shared_memory() -> str:
    return "give the container more shared memory: `docker run --shm-size=8g`, or a volume of medium Memory as /dev/shm"


def _threads() -> str:
    return _memory() or "the user or container has too many processes: raise `ulimit -u`, or the container's pids limit"


_LIMITS = (
    _Limit({errno.EMFILE, errno.ENFILE}, "too many open files", _open_files),
    _Limit({errno.EFBIG}, "file too large", _file_size),
    _Limit(set(), "/dev/shm|shared memory segment", _shared_memory),
    _Limit(set(), "can't start new thread|thread creation failed|pthread_create", _threads),
    _Limit({errno.ENOMEM}, "cannot allocate|unable to allocate|bad_alloc|out of memory|failed to map segment", _memory),
)
