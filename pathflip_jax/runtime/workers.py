"""Worker processes that may die of a job: kept between jobs, limited in time, replaced when they end.

C libraries parse what users bring, and broken files crash, stall and bloat them. pebble keeps the processes and says
how they ended; one process to a pool, so that no death takes the job of another, or leaves a lock that it held.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import context
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

DEATHS = (ProcessExpired, BrokenProcessPool)  # what a future raises when its process ended before the job did

_number: int | None = None
_is_worker = False


def worker_number() -> int:
    """The number of this worker among those of a run, from 0: what they share one each (GPUs), they divide by it.

    A process without a number goes by its process id.
    """
    return os.getpid() if _number is None else _number


def exit_name(death: BaseException) -> str:
    """The signal or exit code that a process ended with; empty if it is unknown."""
    code = getattr(death, "exitcode", None)
    if code is None:
        return ""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Worker:
    """One process that takes one job at a time; the first job starts it.

    It is forked from a server that has imported the module `preload`, where there are such servers, else started from
    nothing, and calls `begin(*arguments)` first. It ends with this process, however that ends.
    """

    def __init__(
        self,
        number: int | None = None,
        preload: str | None = None,
        begin: Callable[..., None] | None = None,
        arguments: Sequence[Any] = (),
    ) -> None:
        self._context = _Spawned()
        if preload is not None and "forkserver" in multiprocessing.get_all_start_methods():
            self._context = _Forked()
            self._context.set_forkserver_preload([preload])
        self._begin = (number, begin, tuple(arguments))
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(1, initializer=_begin, initargs=self._begin, context=self._context)

    def submit(self, work: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Future:
        """Begin a job of at most so many seconds.

        Its future raises what the job raises, TimeoutError, or one of DEATHS; then the next job has a new process.
        """
        try:
            return self._pool.schedule(work, args=arguments, timeout=seconds)
        except RuntimeError:  # the process ended between two jobs
            self.stop()
            return self._pool.schedule(work, args=arguments, timeout=seconds)

    def stop(self) -> None:
        """End the process, whatever it is at; another job starts a new one."""
        pool, self._pool = self._pool, self._new_pool()
        pool.stop()
        pool.join()


@contextlib.contextmanager
def limits(seconds: float, memory: int) -> Iterator[None]:
    """End this process where the body takes longer, and fail its allocations beyond `memory` more bytes.

    For the processes of a `Worker`, which are there to die of a file; others run without limits. The system does it,
    whatever a library is at; memory is limited where Linux counts it.
    """
    if not _is_worker:
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


def _begin(number: int | None, begin: Callable[..., None] | None, arguments: tuple) -> None:
    """Make this process a worker, which must not outlive a run that was killed: it would hold the machine."""
    global _number, _is_worker
    _number, _is_worker = number, True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it at once, even inside a library
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if begin is not None:
        begin(*arguments)


_starting = threading.Lock()


def _start(start: Callable[[], None], process: multiprocessing.process.BaseProcess) -> None:
    """Start a process that does not import the user's script, which need not be made for that.

    It is a daemon, which multiprocessing ends with this process, and may be started by one (a loader's worker).
    """
    process.daemon = True
    multiprocessing.current_process().daemon = False
    with _starting:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            start()
        finally:
            sys.modules["__main__"] = script


class _SpawnedProcess(context.SpawnProcess):
    def start(self) -> None:
        _start(super().start, self)


class _Spawned(context.SpawnContext):
    Process = _SpawnedProcess


class _ForkedProcess(context.ForkServerProcess):
    def start(self) -> None:
        _start(super().start, self)


class _Forked(context.ForkServerContext):
    Process = _ForkedProcess
