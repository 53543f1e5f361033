"""Files parsed in a process of their own: what a broken one does to a C library is that file's error, nothing more.

HDF5, OpenSlide and PyTorch parse what users bring, and mutated files crash and stall them. So one worker process does
it for this one, with limits on its memory and on its time. Arrays come back as shared memory, uncopied. It is no
sandbox: it contains accidents and exhaustion, not an exploit of those libraries.
"""

import atexit
import contextlib
import importlib
import json
import math
import mmap
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.data.storage import blocks

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
LENGTH = struct.Struct("<I")
LONGEST_MESSAGE = 1000  # characters of an error

Parsed = tuple[dict[str, Any], dict[str, np.ndarray]]


class Reader:
    """A worker process that parses files, one at a time: several of them read side by side.

    It keeps what its functions keep, such as an open slide, until it ends; it starts with the first file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
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
        used = self._worker is not None
        worker = self._worker = self._worker or _Worker()
        try:
            return worker.ask(request, seconds)
        except _Refusal:
            raise
        except BaseException as error:  # a library that met a broken file is not asked again
            self.stop()
            if used and isinstance(error, _Died):
                return self._ask(request, seconds)
            raise

    def stop(self) -> None:
        """End the worker, whatever it is doing; the next file starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def forget(self) -> None:
        """After a fork the worker is the parent's: the child starts its own."""
        self._lock = threading.Lock()
        if self._worker is not None:
            self._worker.connection.close()
            self._worker.process.returncode = 0  # not this process's to wait for
            self._worker = None


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
    """What a reader itself has against a file, as opposed to what its library does: the worker stays in use."""


class _Fault(Exception):
    """What went wrong with a file, without its name, and the type of error that it becomes."""

    def __init__(self, message: str, kind: type[Exception] = ValueError) -> None:
        super().__init__(message)
        self.kind = kind


class _Refusal(_Fault):
    """The reader refused the file: `Refused`, as it arrives."""


class _Died(_Fault):
    """The worker ended before its answer came."""


@contextlib.contextmanager
def limits(seconds: float, memory: int) -> Iterator[None]:
    """End this process where the body takes longer, and fail its allocations beyond `memory` more bytes.

    For worker processes that are there to die of a file (those of `multiprocessing`); others run without limits. The
    system does it, whatever a library is at; memory is limited where Linux counts it.
    """
    if multiprocessing.parent_process() is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(FileNotFoundError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
        wanted = data + memory
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if before[1] < 0 else min(wanted, before[1]), before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, which nobody handles, ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


# ---- in the process that wants a file read ----

_readers: weakref.WeakSet[Reader] = weakref.WeakSet()
_shared_reader = Reader()


def _stop() -> None:
    for reader in list(_readers):
        reader.stop()


def _forget() -> None:
    for reader in list(_readers):
        reader.forget()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)


class _Worker:
    """A running worker and the socket to it."""

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        # Not multiprocessing: its processes import the user's main script again. One thread: pools reserve memory.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                env=os.environ | threads,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def ask(self, request: dict, seconds: float) -> Parsed:
        """Send a request and wait for its answer. Raises _Fault, _Died for a worker that ends without one."""
        try:
            self.connection.settimeout(seconds)
            _send(self.connection, request, [])
            answer, files = _receive(self.connection)
        except TimeoutError:
            raise _Fault(f"no answer within {seconds:.0f} s of its reader; {_CURE}") from None
        except (EOFError, OSError, ValueError):
            raise self._death(request) from None
        try:
            if "error" in answer:
                if answer["kind"] in ("Refused", "ImportError"):
                    raise _Refusal(answer["error"], ImportError if answer["kind"] == "ImportError" else ValueError)
                raise _Fault(answer["error"], OSError if answer["kind"] == "OSError" else ValueError)
            arrays = {}
            for (name, shape, dtype), file in zip(answer["arrays"], files, strict=True):
                arrays[name] = _map(file, shape, np.dtype(dtype))
            return answer["facts"], arrays
        finally:
            for file in files:
                os.close(file)

    def _death(self, request: dict) -> _Fault:
        self.connection.close()
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return _Died(f"its reader gave no answer that can be read; {_CURE}")
        if code == -signal.SIGXCPU:
            return _Fault(f"its reader was still computing after {request['computing']} s; {_CURE}")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Died(f"its reader crashed ({name}), or memory ran out; {_CURE}")

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


_CURE = "the file is damaged: copy or extract it again"


def _map(file: int, shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(file, size, flags=_flags(size)), dtype).reshape(shape)


# ---- both ends ----


def _flags(size: int) -> int:
    """How arrays are mapped: at once, but for large ones, which are worked through in blocks."""
    return mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if size <= blocks.LARGE else 0)


def _send(connection: socket.socket, message: dict, files: list[int]) -> None:
    data = json.dumps(message).encode()
    socket.send_fds(connection, [LENGTH.pack(len(data))], files)
    connection.sendall(data)


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A message and the file descriptors that came with it. Raises EOFError where the other end is closed."""
    head, files, *_ = socket.recv_fds(connection, LENGTH.size, 16)
    if len(head) < LENGTH.size:
        raise EOFError
    data, left = bytearray(LENGTH.unpack(head)[0]), LENGTH.unpack(head)[0]
    while left:
        count = connection.recv_into(memoryview(data)[len(data) - left :])
        if not count:
            raise EOFError
        left -= count
    return json.loads(data), files


# ---- in the worker ----

_shared: list[tuple[np.ndarray, int]] = []  # arrays of this request and the files that they lie in


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


def serve(descriptor: int) -> None:
    """The worker's life: answer requests until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the other process's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(fileno=descriptor)
    while True:
        try:
            request, _ = _receive(connection)
        except (EOFError, ConnectionError):
            return
        _answer(connection, request)


def _answer(connection: socket.socket, request: dict) -> None:
    try:
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)  # before the limits: libraries are large
        _limit_computing(request["computing"])
        _limit_memory(request["memory"], more=False)
        facts, arrays = function(request["path"], *request["arguments"])
        files = [_file_of(array) for array in arrays.values()]
        listed = [(name, array.shape, array.dtype.str) for name, array in arrays.items()]
        _send(connection, {"facts": facts, "arrays": listed}, files)
    except MemoryError:
        _send_error(connection, f"its reader wants more than {request['memory'] / 1e6:.0f} MB; {_CURE}", ValueError)
    except (ValueError, OSError, ImportError) as error:
        kinds = (kind for kind in (Refused, OSError, ImportError) if isinstance(error, kind))
        _send_error(connection, str(error), next(kinds, ValueError))
    except Exception as error:  # whatever a library raises on broken files
        _send_error(connection, f"its reader fails ({type(error).__name__}: {error}); {_CURE}", ValueError)
    finally:
        for _, file in _shared:
            os.close(file)
        _shared.clear()


def _send_error(connection: socket.socket, message: str, kind: type[Exception]) -> None:
    _send(connection, {"error": message[:LONGEST_MESSAGE], "kind": kind.__name__}, [])


def _file_of(array: np.ndarray) -> int:
    """The file that an array lies in; one that lies elsewhere is copied into one."""
    for shared, file in _shared:
        if shared is array:
            return file
    copy = shared_empty(array.shape, array.dtype, array.nbytes, "an array")
    copy[...] = array
    return _file_of(copy) if array.size else os.open(os.devnull, os.O_RDONLY)


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
