"""Work spread over processes that may die: one bad file ends its own job, never the run.

C libraries parse what users bring, and broken files crash some of them; so files are opened in worker
processes. A `ProcessPoolExecutor` gives up all jobs when one of its workers dies, and hangs or raises when that
happens while it starts another (CPython 3.11). So every worker is a pool of its own, and a job whose worker died is
tried once more at the end, when no other takes its memory.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pathflip_jax.runtime import limits

PRELOADED = "data_prep.jobs"  # imported once by the server that workers are forked from

_number: int | None = None


def worker_number() -> int:
    """Which of the workers this process is: what they share one each (GPUs), they divide by it.

    They are counted from 0; one that does not know of the others goes by its process id.
    """
    return os.getpid() if _number is None else _number


def cores() -> int:
    """The cores that this process may use: a scheduler often gives it fewer than the machine has."""
    return limits.processors()


class Worker:
    """One process that takes one job at a time, and is started anew after a job that killed it."""

    def __init__(self, number: int | None = None) -> None:
        self._number = number
        self._start()

    def _start(self) -> None:
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([PRELOADED])
        else:
            context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(self._number,))

    def submit(self, work: Callable[[Any], Any], job: Any) -> Future:
        """Begin a job; its future raises BrokenProcessPool when the process dies of it: then call `restart`."""
        try:
            return self._pool.submit(work, job)
        except BrokenProcessPool:  # it died while it had nothing to do
            self.restart()
            return self._pool.submit(work, job)

    def run(self, work: Callable[[Any], Any], job: Any, tries: int = 2) -> Any:
        """What `work(job)` returns, or None where the process died of it each time."""
        for _ in range(tries):
            try:
                return self.submit(work, job).result()
            except BrokenProcessPool:
                self.restart()
        return None

    def restart(self) -> None:
        """A new process in place of one that died."""
        self._pool.shutdown()
        self._start()

    def close(self) -> None:
        """End the process, after its job."""
        self._pool.shutdown(cancel_futures=True)


def run_each(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Run `work(job)` in `workers` processes; yields (job, result) as they end, result None for a worker that died.

    `work` is a function of a module and should catch what it can: whatever it raises ends the run. At most one
    job per worker is under way, so results do not pile up. Leaving early lets the running jobs end first.
    """
    waiting, again = deque(jobs), []
    idle = [Worker(number) for number in range(min(workers, len(waiting)))]
    running: dict[Future, tuple[Any, Worker]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.popleft(), idle.pop()
                running[worker.submit(work, job)] = job, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, worker = running.pop(future)
                idle.append(worker)
                if isinstance(future.exception(), BrokenProcessPool):
                    worker.restart()
                    again.append(job)
                else:
                    yield job, future.result()
    finally:
        for worker in (*idle, *(worker for _, worker in running.values())):
            worker.close()
    for job in again:
        worker = Worker(0)
        try:
            yield job, worker.run(work, job, tries=1)
        finally:
            worker.close()


def _begin(number: int | None) -> None:
    """Tell a worker its number, and let it not outlive a run that was killed: it would hold the machine."""
    global _number
    _number = number
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
