"""Parsing of files in a worker process, which confines a crash of a C library to an error of that file.

HDF5, OpenSlide and PyTorch parse user-supplied files, and corrupted ones make them crash and hang. So a worker process
(`runtime/workers.py`) parses them, with limits on memory and time. Arrays come back in shared memory, without a copy.
It is not a sandbox: it contains accidents and exhaustion, not an exploit of those libraries.
"""

import atexit
import contextlib
import importlib
import itertools
import json
import math
import mmap
import multiprocessing
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
# Memory for parsing, beyond the resulting arrays (which are checked against the size of their file).
MEMORY = 512 * MEGABYTE
SLIDE_MEMORY = 1536 * MEGABYTE  # for OpenSlide reading a level in strips
# CPU seconds, and seconds until the answer; a slow disk uses up the latter, a hanging library the former.
COMPUTING, WAITING = 10, 60
SLOWEST_PARSE, SLOWEST_DISK = 10 * MEGABYTE, 4 * MEGABYTE  # bytes of the file per second
# An array of an intact file is at most this many times the file's size plus this many bytes: compressed features shrink
# to a third, a decompression bomb to a thousandth.
LARGEST_EXPANSION, LARGEST_SMALL = 16, 64 * MEGABYTE
NUMBER = struct.Struct("<Q")  # request number
MOST_ARRAYS = 64  # per file
STARTING = 60  # seconds that a process may take to start
LONGEST_MESSAGE = 1000  # characters of an error message

Parsed = tuple[dict[str, Any], dict[str, np.ndarray]]


class Reader:
    """A worker process that parses one file at a time; several readers work in parallel.

    State of its functions, such as an open slide, persists until it ends; it starts with the first file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None
        _readers.add(self)

    def parse(self, function: str, path: Path | str, *arguments: Any, memory: int = MEMORY) -> Parsed:
        """Call `function`, given as "module:name", in the worker with a file's path and JSON-serialisable arguments.

        Returns the function's result: JSON-serialisable facts, and arrays. Its exceptions are raised as ValueError,
        OSError or ImportError prefixed with the file's name; so is the end of the worker by a crash, or because the
        file took more than `memory` bytes or too long.
        """
        size = size_of(path)
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

    def start(self, module: str) -> None:
        """Start the worker before the first file, and let it import the module of the function that will read it."""
        with self._lock:
            self._process = self._process or _Process()
            self._process.load(module)

    def _ask(self, request: dict, seconds: float) -> Parsed:
        """Answer of the worker, retried in a new one, as a crash may be due to a file that it read before."""
        used = self._process is not None
        process = self._process = self._process or _Process()
        try:
            return process.ask(request, seconds)
        except _Refusal:
            raise
        except BaseException as error:  # a library is not reused after a broken file
            self.stop()
            if used and isinstance(error, _Died):
                return self._ask(request, seconds)
            raise

    def stop(self) -> None:
        """Terminate the worker immediately; the next file starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def forget(self) -> None:
        """Detach the worker after a fork: it belongs to the parent, and the child starts another."""
        self._lock = threading.Lock()
        _inherited.append(self._process)
        self._process = None


def parse(function: str, path: Path | str, *arguments: Any, memory: int = MEMORY) -> Parsed:
    """Parse a file in the worker shared by this process, as `Reader.parse`."""
    return _shared_reader.parse(function, path, *arguments, memory=memory)


def start(module: str) -> None:
    """Start the worker shared by this process, as `Reader.start`."""
    _shared_reader.start(module)


def size_of(path: Path | str) -> int:
    """Bytes of a file, or of all files in a folder (a Zarr store)."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(path) for name in names)


def check_size(shape: tuple[int, ...], dtype: np.dtype, file_size: int, what: str) -> None:
    """Raise Refused for an array larger than a file of `file_size` bytes can plausibly hold."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    most = LARGEST_SMALL + LARGEST_EXPANSION * file_size
    if size > most:
        raise Refused(
            f"{what} of shape {tuple(shape)} ({size / 1e9:.4g} GB) in a file of {file_size / 1e6:.4g} MB, expected at "
            f"most {most / 1e9:.2g} GB: a damaged file, or one made to fill memory; extract it again"
        )


class Refused(ValueError):
    """A reader's objection to a file, as opposed to an error of its library: the worker stays in use."""


class _Fault(Exception):
    """An error of a file, without its name, and the exception type to raise."""

    def __init__(self, message: str, kind: type[Exception] = ValueError) -> None:
        super().__init__(message)
        self.kind = kind


class _Refusal(_Fault):
    """A `Refused` raised in the worker, as received."""


class _Died(_Fault):
    """The worker ended before it answered."""


# ---- in the calling process ----

_readers: weakref.WeakSet[Reader] = weakref.WeakSet()
_shared_reader = Reader()
_inherited: list["_Process | None"] = []  # kept alive, as their finalizers would end the parent's workers


def _stop() -> None:
    for reader in list(_readers):
        reader.stop()


def _forget() -> None:
    for reader in list(_readers):
        reader.forget()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)


class _Process:
    """A worker, and the socket that its arrays are sent through."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._worker = workers.Worker(begin=_begin, arguments=[self._theirs])
        self._numbers = itertools.count()
        # For a worker that is dropped without `stop`; at exit `_stop` ends all of them.
        self._finalizer = weakref.finalize(self, _end_in_thread, self._worker, self._ours, self._theirs)
        self._finalizer.atexit = False

    def load(self, module: str) -> None:
        """Let the worker import a module; it need not be awaited."""
        self._worker.submit(importlib.import_module, module)

    def ask(self, request: dict, seconds: float) -> Parsed:
        """Send a request and wait for its answer. Raises _Fault, or _Died for a worker that ends without one."""
        number = next(self._numbers)
        try:
            future = self._worker.submit(_answer, number, json.dumps(request), seconds=seconds)
            answer = json.loads(future.result(seconds + STARTING))
        except workers.DEATHS as death:
            raise _death(workers.exit_name(death), request) from None
        except TimeoutError:
            raise _Fault(f"its reader did not answer within {seconds:.0f} s; {_CURE}") from None
        if "error" in answer:
            if answer["kind"] in ("Refused", "ImportError"):
                raise _Refusal(answer["error"], ImportError if answer["kind"] == "ImportError" else ValueError)
            raise _Fault(answer["error"], OSError if answer["kind"] == "OSError" else ValueError)
        return answer["facts"], self._arrays(number, answer["arrays"])

    def _arrays(self, number: int, listed: list) -> dict[str, np.ndarray]:
        """Arrays of an answer."""
        files = iter(self._files(number) if any(math.prod(shape) for _, shape, _ in listed) else ())
        arrays = {}
        for name, shape, dtype in listed:
            full = math.prod(shape) > 0
            arrays[name] = _map(next(files), shape, np.dtype(dtype)) if full else np.empty(shape, np.dtype(dtype))
        return arrays

    def _files(self, number: int) -> list[int]:
        """File descriptors received with an answer; those of abandoned requests are closed."""
        while True:
            head, files, *_ = socket.recv_fds(self._ours, NUMBER.size, MOST_ARRAYS)
            if NUMBER.unpack(head)[0] == number:
                return files
            for file in files:
                os.close(file)

    def stop(self) -> None:
        """Terminate the worker immediately."""
        self._finalizer.detach()
        _end(self._worker, self._ours, self._theirs)


def _end(worker: workers.Worker, *sockets: socket.socket) -> None:
    worker.stop()
    for ours in sockets:
        ours.close()


def _end_in_thread(*process: Any) -> None:
    """Terminate an unreferenced worker in a separate thread, as a finalizer may run at any point."""
    threading.Thread(target=_end, args=process, daemon=True).start()


def _death(how: str, request: dict) -> _Fault:
    if how == "SIGXCPU":
        return _Fault(f"its reader was still computing after {request['computing']} s; {_CURE}")
    return _Died(f"its reader crashed ({how or 'cause unknown'}), or memory ran out; {_CURE}")


_CURE = "the file is damaged: copy or extract it again"


def _map(file: int, shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Array mapped from a file, which is then closed: the mapping persists."""
    size = math.prod(shape) * dtype.itemsize
    try:
        return np.frombuffer(mmap.mmap(file, size, flags=_flags(size)), dtype).reshape(shape)
    finally:
        os.close(file)


def _flags(size: int) -> int:
    """Flags for mapping arrays: prefaulted, except for large ones, which are processed in blocks."""
    return mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if size <= blocks.LARGE else 0)


# ---- in the worker ----

_connection: socket.socket | None = None
_shared: list[tuple[np.ndarray, int]] = []  # arrays of this request and their files


def _begin(connection: socket.socket) -> None:
    """Initialise a worker: without output of its libraries, and single-threaded, as thread pools reserve memory."""
    global _connection
    _connection = connection
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    # Semaphores that libraries create (numcodecs) are then unlinked at once, so that none outlives a stopped worker.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")})


def shared_empty(shape: tuple[int, ...], dtype: np.dtype, file_size: int, what: str) -> np.ndarray:
    """Shared-memory array for a worker to fill and return, which the calling process maps without a copy.

    Raises Refused for one that a file of `file_size` bytes cannot plausibly hold (`check_size`).
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
    _limit_memory(3 * size)  # the array, and twice as much again if it is a single chunk
    array = np.frombuffer(mmap.mmap(file, size, flags=_flags(size)), dtype).reshape(shape)
    _shared.append((array, file))
    return array


def _answer(number: int, request: str) -> str:
    """Answer a request; its arrays are sent through the socket under its number."""
    wanted = json.loads(request)
    try:
        module, _, name = wanted["function"].partition(":")
        function = getattr(importlib.import_module(module), name)  # before setting the limits, as libraries are large
        _limit_computing(wanted["computing"])
        _limit_memory(wanted["memory"], more=False)
        facts, arrays = function(wanted["path"], *wanted["arguments"])
        files = [_file_of(array) for array in arrays.values() if array.size]
        answer = json.dumps({"facts": facts, "arrays": [(key, x.shape, x.dtype.str) for key, x in arrays.items()]})
        if files:
            socket.send_fds(_connection, [NUMBER.pack(number)], files)
        return answer
    except MemoryError:
        return _error(f"its reader needs more than {wanted['memory'] / 1e6:.0f} MB; {_CURE}", ValueError)
    except (ValueError, OSError, ImportError) as error:
        kinds = (kind for kind in (Refused, OSError, ImportError) if isinstance(error, kind))
        return _error(str(error), next(kinds, ValueError))
    except Exception as error:  # any exception of a library on broken files
        return _error(f"its reader failed ({type(error).__name__}: {error}); {_CURE}", ValueError)
    finally:
        for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
            resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)
        for _, file in _shared:
            os.close(file)
        _shared.clear()


def _error(message: str, kind: type[Exception]) -> str:
    return json.dumps({"error": message[:LONGEST_MESSAGE], "kind": kind.__name__})


def _file_of(array: np.ndarray) -> int:
    """File that backs an array; other arrays are copied into a new one."""
    for shared, file in _shared:
        if shared is array:
            return file
    copy = shared_empty(array.shape, array.dtype, array.nbytes, "an array")
    copy[...] = array
    return _file_of(copy)


def _limit_computing(seconds: int) -> None:
    """Limit this process to so many more CPU seconds, after which the system ends it: no library can catch that."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    wanted = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard < 0 else min(wanted, hard), hard))


def _limit_memory(size: int, more: bool = True) -> None:
    """Make allocations fail beyond `size` bytes above the current mapping or, with `more`, above the current limit.

    If the system does not report the mapped size (macOS), there is no limit.
    """
    with contextlib.suppress(FileNotFoundError):
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        wanted = (soft if more else mapped) + size
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
