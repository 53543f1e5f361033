"""Errors that come of a limit of this process name it, and how it is lifted."""

import errno
import os
import re
import resource

import pytest

from pathflip_jax.runtime import ulimits


@pytest.fixture
def limited(monkeypatch):
    """Sets what the system says of a limit; what is asked of it is put there too."""
    limits = {}
    before = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda name: limits[name] if name in limits else before(name))
    monkeypatch.setattr(resource, "setrlimit", lambda name, pair: limits.update({name: pair}))
    return limits


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), (ulimits.OPEN_FILES, resource.RLIM_INFINITY)),
        ((256, 256), (256, 256)),
        ((1 << 20, 1 << 20), (1 << 20, 1 << 20)),
    ],
)
def test_as_many_files_may_be_open_as_the_user_is_allowed(limited, given, expected):
    limited[resource.RLIMIT_NOFILE] = given
    ulimits.raise_open_files()
    assert limited[resource.RLIMIT_NOFILE] == expected


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.EMFILE, os.strerror(errno.EMFILE), "shard"),
            "'shard'; this process may open at most 64 files: .*`ulimit -n 65536`",
        ),
        (RuntimeError("Open: Too many open files [path=x]"), "ulimit -n"),
        (caused(ValueError("no checkpoint"), OSError(errno.EMFILE, "")), "no checkpoint; .*ulimit -n"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "x"), "may have at most 1 MB: .*`ulimit -f unlimited`"),
        (MemoryError(), "MemoryError; this process may map at most 4 GiB of memory: .*`ulimit -v unlimited`"),
        (RuntimeError("std::bad_alloc"), "ulimit -v"),
        (RuntimeError("NCCL: error while creating shared memory segment /dev/shm/nccl-1"), "--shm-size"),
        (RuntimeError("can't start new thread"), "ulimit -v"),
    ],
    ids=str,
)
def test_an_error_at_a_limit_names_the_limit(limited, error, expected):
    limited[resource.RLIMIT_NOFILE] = (64, 64)
    limited[resource.RLIMIT_FSIZE] = (10**6, 10**6)
    limited[resource.RLIMIT_AS] = (4 * 2**30, resource.RLIM_INFINITY)
    told = ulimits.explain(error)
    assert told and re.search(expected, told), told


@pytest.mark.parametrize(
    "error", [ValueError("x: no such slide"), MemoryError("too large"), AssertionError(), OSError()]
)
def test_other_errors_are_none_of_it(limited, error):
    limited[resource.RLIMIT_AS] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert ulimits.explain(error) is None
