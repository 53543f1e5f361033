"""Files parsed in a process of their own: what a broken one does to a C library is that file's error, nothing more.

HDF5, OpenSlide and PyTorch parse what users bring, and mutated files crash and stall them. So a worker process
(`runtime/workers.py`) does it for this one, with limits on its memory and on its time. Arrays come back as shared
memory, uncopied. It is no sandbox: it contains accidents and exhaustion, not an exploit of those libraries.
"""

import atexit
import contextlib
import importlib
import itertools
import json
import math
import mmap
import os
import resource
import socket
import struct
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.data.storage import blocks
from pathflip_jax.runtime import workers

MEGABYTE = 2**20
# What parsing itself may take beyond the arrays that it makes (those are checked against the size of their file).
MEMORY = 512 * MEGABYTE
SLIDE_MEMORY = 1536 * MEGABYTE  # of an OpenSlide that reads a level in strips
# Seconds of computing, and seconds until the answer; a slow disk spends the second, a stalled library the first.
COMPUTING, WAITING = 10, 60
SLOWEST_PARSE, SLOWEST_DISK = 10 * MEGABYTE, 4 * MEGABYTE  # bytes of the file a second
# An array of a sound file is at most this many times the file's size and this many bytes more: compressed features
# shrink to a third, a bomb to a thousandth.
LARGEST_EXPANSION, LARGEST_SMALL = 16, 64 * MEGABYTE
NUMBER = struct.Struct("<Q")  # of a request
MOST_ARRAYS = 64  # of one file
STARTING = 60  # seconds that a process may take until it begins
LONGEST_MESSAGE = 1000  # characters of an error

Parsed = tuple[dict[str, Any], dict[str, np.ndarray]]


class Reader:
    """A worker process that parses files, one at a time: several of them read side by side.

    It keeps what its functions keep, such as an open slide, until it ends; it starts with the first file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None
        _readers.add(self)

    def parse(self, function: str, path: Path | str, *arguments: Any, memory: int = MEMORY) -> Parsed:
        """Call `function`, given as "module:name", in the worker with a file's path and arguments that JSON can hold.

        It returns what it returns: facts that JSON can hold, and arrays. What it raises comes as ValueError, OSError
        or ImportError with the file's name in front; so does the end of the worker by a crash, or because the file
        took more than `memory` bytes or too long.
        """
        size = os.path.getsize(path)
        request = {
            "function": function,
            "path": os.path.abspath(path),
            "arguments": arguments,
            "memory": memory + size,
            "computing": math.ceil(COMPUTING + size / SLOWEST_PARSE),
        }
        try:
            with self._lock:
                return self._ask(request, WAITING + size / SLOWEST_DISK)
        except _Fault as fault:
            raise fault.kind(f"{path}: {fault}") from None

    def _ask(self, request: dict, seconds: float) -> Parsed:
        """An answer from the worker, or from a fresh one: a crash may be owed to a file that it read before."""
        used = self._process is not None
        process = self._process = self._process or _Process()
        try:
            return process.ask(request, seconds)
        except _Refusal:
            raise
        except BaseException as error:  # a library that met a broken file is not asked again
            self.stop()
            if used and isinstance(error, _Died):
                return self._ask(request, seconds)
            raise

    def stop(self) -> None:
        """End the worker, whatever it is doing; the next file starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def forget(self) -> None:
        """After a fork the worker is the parent's: the child starts its own."""
        self._lock = threading.Lock()
        _inherited.append(self._process)
        self._process = None


def parse(function: str, path: Path | str, *arguments: Any, memory: int = MEMORY) -> Parsed:
    """Parse a file in the worker that all of this process share; `Reader.parse` says how."""
    return _shared_reader.parse(function, path, *arguments, memory=memory)


def check_size(shape: tuple[int, ...], dtype: np.dtype, file_size: int, what: str) -> None:
    """Raise Refused for an array that is larger than a file of `file_size` bytes can sensibly hold."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    most = LARGEST_SMALL + LARGEST_EXPANSION * file_size
    if size > most:
        raise Refused(
            f"{what} of shape {tuple(shape)} ({size / 1e9:.4g} GB) in a file of {file_size / 1e6:.4g} MB, expected at "
            f"most {most / 1e9:.2g} GB: a damaged file, or one made to fill memory; extract it again"
        )


class Refused(ValueError):
    """A reader's own objection to a file, not an error of its library: the worker stays in use."""


class _Fault(Exception):
    """An error of a file, without its name, and the type of exception that it becomes."""

    def __init__(self, message: str, kind: type[Exception] = ValueError) -> None:
        super().__init__(message)
        self.kind = kind


class _Refusal(_Fault):
    """The reader refused the file: `Refused`, as it arrives."""


class _Died(_Fault):
    """The worker ended before its answer came."""


# ---- in the process that wants a file read ----

_readers: weakref.WeakSet[Reader] = weakref.WeakSet()
_shared_reader = Reader()
_inherited: list["_Process | None"] = []  # kept, as what their finalizers would end is the parent's


def _stop() -> None:
    for reader in list(_readers):
        reader.stop()


def _forget() -> None:
    for reader in list(_readers):
        reader.forget()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)


class _Process:
    """A worker, and the socket through which its arrays come."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._worker = workers.Worker(begin=_begin, arguments=[self._theirs])
        self._numbers = itertools.count()
        # For one that is dropped, not stopped; at exit `_stop` ends them all.
        self._let_go = weakref.finalize(self, _let_go, self._worker, self._ours, self._theirs)
        self._let_go.atexit = False

    def ask(self, request: dict, seconds: float) -> Parsed:
        """Send a request and wait for its answer. Raises _Fault, _Died for a worker that ends without one."""
        number = next(self._numbers)
        try:
            future = self._worker.submit(_answer, number, json.dumps(request), seconds=seconds)
            answer = json.loads(future.result(seconds + STARTING))
        except workers.DEATHS as death:
            raise _death(workers.exit_name(death), request) from None
        except TimeoutError:
            raise _Fault(f"no answer within {seconds:.0f} s of its reader; {_CURE}") from None
        if "error" in answer:
            if answer["kind"] in ("Refused", "ImportError"):
                raise _Refusal(answer["error"], ImportError if answer["kind"] == "ImportError" else ValueError)
            raise _Fault(answer["error"], OSError if answer["kind"] == "OSError" else ValueError)
        return answer["facts"], self._arrays(number, answer["arrays"])

    def _arrays(self, number: int, listed: list) -> dict[str, np.ndarray]:
        """The arrays of an answer."""
        files = iter(self._files(number) if any(math.prod(shape) for _, shape, _ in listed) else ())
        arrays = {}
        for name, shape, dtype in listed:
            full = math.prod(shape) > 0
            arrays[name] = _map(next(files), shape, np.dtype(dtype)) if full else np.empty(shape, np.dtype(dtype))
        return arrays

    def _files(self, number: int) -> list[int]:
        """The file descriptors that came with an answer; those of requests that were given up are closed."""
        while True:
            head, files, *_ = socket.recv_fds(self._ours, NUMBER.size, MOST_ARRAYS)
            if NUMBER.unpack(head)[0] == number:
                return files
            for file in files:
                os.close(file)

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        self._let_go.detach()
        _end(self._worker, self._ours, self._theirs)


def _end(worker: workers.Worker, *sockets: socket.socket) -> None:
    worker.stop()
    for ours in sockets:
        ours.close()


def _let_go(*process: Any) -> None:
    """End a worker that nobody waits for, in a thread of its own: this one may be in the midst of anything."""
    threading.Thread(target=_end, args=process, daemon=True).start()


def _death(how: str, request: dict) -> _Fault:
    if how == "SIGXCPU":
        return _Fault(f"its reader was still computing after {request['computing']} s; {_CURE}")
    return _Died(f"its reader crashed ({how or 'unseen'}), or memory ran out; {_CURE}")


_CURE = "the file is damaged: copy or extract it again"


def _map(file: int, shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array in a file, which is closed: the mapping stays."""
    size = math.prod(shape) * dtype.itemsize
    try:
        return np.frombuffer(mmap.mmap(file, size, flags=_flags(size)), dtype).reshape(shape)
    finally:
        os.close(file)


def _flags(size: int) -> int:
    """Flags for mapping arrays: at once, but for large ones, which are worked through in blocks."""
    return mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if size <= blocks.LARGE else 0)


# ---- in the worker ----

_connection: socket.socket | None = None
_shared: list[tuple[np.ndarray, int]] = []  # arrays of this request and the files that they lie in


def _begin(connection: socket.socket) -> None:
    """Begin a worker: silent, whatever a library has to say of a file, and with one thread, as pools reserve memory."""
    global _connection
    _connection = connection
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")})


def shared_empty(shape: tuple[int, ...], dtype: np.dtype, file_size: int, what: str) -> np.ndarray:
    """In the worker: an array to fill and return, which the other process takes over uncopied.

    Raises Refused for one that a file of `file_size` bytes cannot sensibly hold (`check_size`).
    """
    check_size(shape, dtype, file_size, what)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    if hasattr(os, "memfd_create") and size <= blocks.LARGE:
        file = os.memfd_create("pathflip")
        os.ftruncate(file, size)
    else:  # on a disk
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
        blocks.reserve(file, size)
    _limit_memory(3 * size)  # itself, and as much again twice for a chunk that is all of it
    array = np.frombuffer(mmap.mmap(file, size, flags=_flags(size)), dtype).reshape(shape)
    _shared.append((array, file))
    return array


def _answer(number: int, request: str) -> str:
    """Answer a request; the arrays go through the socket, under its number."""
    wanted = json.loads(request)
    try:
        module, _, name = wanted["function"].partition(":")
        function = getattr(importlib.import_module(module), name)  # before the limits: libraries are large
        _limit_computing(wanted["computing"])
        _limit_memory(wanted["memory"], more=False)
        facts, arrays = function(wanted["path"], *wanted["arguments"])
        files = [_file_of(array) for array in arrays.values() if array.size]
        answer = json.dumps({"facts": facts, "arrays": [(key, x.shape, x.dtype.str) for key, x in arrays.items()]})
        if files:
            socket.send_fds(_connection, [NUMBER.pack(number)], files)
        return answer
    except MemoryError:
        return _error(f"its reader wants more than {wanted['memory'] / 1e6:.0f} MB; {_CURE}", ValueError)
    except (ValueError, OSError, ImportError) as error:
        kinds = (kind for kind in (Refused, OSError, ImportError) if isinstance(error, kind))
        return _error(str(error), next(kinds, ValueError))
    except Exception as error:  # whatever a library raises on broken files
        return _error(f"its reader fails ({type(error).__name__}: {error}); {_CURE}", ValueError)
    finally:
        for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
            resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)
        for _, file in _shared:
            os.close(file)
        _shared.clear()


def _error(message: str, kind: type[Exception]) -> str:
    return json.dumps({"error": message[:LONGEST_MESSAGE], "kind": kind.__name__})


def _file_of(array: np.ndarray) -> int:
    """The file that an array lies in; one that lies elsewhere is copied into one."""
    for shared, file in _shared:
        if shared is array:
            return file
    copy = shared_empty(array.shape, array.dtype, array.nbytes, "an array")
    copy[...] = array
    return _file_of(copy)


def _limit_computing(seconds: int) -> None:
    """Let the system end this process after so many more seconds of computing: no library can catch that."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    wanted = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard < 0 else min(wanted, hard), hard))


def _limit_memory(size: int, more: bool = True) -> None:
    """Let allocations fail beyond `size` bytes from what is mapped now; with `more`, from the limit that there is.

    Where the system does not say what is mapped (macOS), there is no limit.
    """
    with contextlib.suppress(FileNotFoundError):
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        wanted = (soft if more else mapped) + size
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
