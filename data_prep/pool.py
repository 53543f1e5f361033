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

PRELOADED = "data_prep.jobs"  # imported once by the server that workers are forked from


def run_each(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Run `work(job)` in `workers` processes; yields (job, result) as they end, result None for a worker that died.

    `work` is a function of a module and should catch what it can: whatever it raises ends the run. At most one
    job per worker is under way, so results do not pile up. Leaving early lets the running jobs end first.
    """
    waiting, again = deque(jobs), []
    idle = [_worker() for _ in range(min(workers, len(waiting)))]
    running: dict[Future, tuple[Any, ProcessPoolExecutor]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.popleft(), idle.pop()
                try:
                    running[worker.submit(work, job)] = job, worker
                except BrokenProcessPool:  # it died while it had nothing to do
                    worker.shutdown()
                    waiting.appendleft(job)
                    idle.append(_worker())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, worker = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    worker.shutdown()
                    again.append(job)
                    idle.append(_worker())
                else:
                    idle.append(worker)
                    yield job, future.result()
    finally:
        for worker in (*idle, *(worker for _, worker in running.values())):
            worker.shutdown(cancel_futures=True)
    for job in again:
        yield job, _alone(work, job)


def _alone(work: Callable[[Any], Any], job: Any) -> Any:
    with _worker() as worker:
        try:
            return worker.submit(work, job).result()
        except BrokenProcessPool:
            return None


def _worker() -> ProcessPoolExecutor:
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
    else:
        context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Let no worker outlive a run that was killed: it would hold the machine and write files nobody waits for."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
