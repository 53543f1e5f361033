"""Worker processes for jobs that may crash them: reused between jobs, limited in time, replaced when they end.

C libraries parse user-supplied files, and broken ones make them crash, hang or exhaust memory. pebble manages the
processes and reports how they ended; each pool has one process, so that a crash neither takes another job with it nor
leaves a lock behind.
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

DEATHS = (ProcessExpired, BrokenProcessPool)  # raised by a future whose process ended before the job

_number: int | None = None
_is_worker = False


def worker_number() -> int:
    """Index of this worker among those of a run, from 0, for dividing resources such as GPUs.

    A process without an index uses its process id.
    """
    return os.getpid() if _number is None else _number


def exit_name(death: BaseException) -> str:
    """Signal or exit code with which a process ended; empty if unknown."""
    code = getattr(death, "exitcode", None)
    if code is None:
        return ""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Worker:
    """A process that runs one job at a time, started by the first job.

    It is forked from a server that has imported the module `preload`, where the platform supports fork servers, else
    spawned, and calls `begin(*arguments)` first. It ends with this process, however that ends.
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
        """Submit a job, limited to `seconds`.

        Its future raises the job's exception, TimeoutError, or one of DEATHS; after these two, the next job has a new
        process.
        """
        try:
            return self._pool.schedule(work, args=arguments, timeout=seconds)
        except RuntimeError:  # the process ended between two jobs
            self.stop()
            return self._pool.schedule(work, args=arguments, timeout=seconds)

    @property
    def is_over(self) -> bool:
        """Whether the process ended between two jobs: those submitted meanwhile may never end."""
        return not self._pool.active

    def stop(self) -> None:
        """Terminate the process immediately; the next job starts a new one."""
        pool, self._pool = self._pool, self._new_pool()
        pool.stop()
        pool.join()


@contextlib.contextmanager
def limits(seconds: float, memory: int) -> Iterator[None]:
    """End this process if the body exceeds `seconds`, and fail allocations beyond `memory` additional bytes.

    For the processes of a `Worker`, which may be sacrificed to a broken file; others run without limits. The operating
    system enforces both, whatever a library is doing; memory is limited on Linux only.
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
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, unhandled, ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _begin(number: int | None, begin: Callable[..., None] | None, arguments: tuple) -> None:
    """Make this process a worker, which must not outlive a killed run, as it would occupy the machine."""
    global _number, _is_worker
    _number, _is_worker = number, True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # terminates immediately, even inside a library
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
    """Start a process without importing the user's script, which may have no main guard.

    It is a daemon, which multiprocessing ends with this process, and may be started by a daemon (a loader's worker).
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
