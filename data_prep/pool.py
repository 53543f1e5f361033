"""Work spread over processes that may die: one bad file ends its own job, never the run.

C libraries parse what users bring, and broken files crash some of them; so files are opened in worker
processes. `ProcessPoolExecutor` gives up all jobs when one worker dies; here the jobs that were running then
are tried again, each alone, and only the one that kills its worker a second time is given up.
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
    waiting: deque = deque(jobs)
    running: dict[Future, Any] = {}
    pool = _pool(workers)
    try:
        while waiting or running:
            suspects = []
            try:
                while waiting and len(running) < workers:
                    running[pool.submit(work, waiting[0])] = waiting[0]
                    waiting.popleft()
            except BrokenProcessPool:
                suspects = list(running.values())
            ended = [] if suspects else wait(running, return_when=FIRST_COMPLETED).done
            for future in ended:
                job = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    suspects = [job, *running.values()]
                    break
                yield job, future.result()
            if suspects:
                running.clear()
                pool.shutdown()
                for job in suspects:
                    yield job, _alone(work, job)
                pool = _pool(workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(work: Callable[[Any], Any], job: Any) -> Any:
    with _pool(1) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            return None


def _pool(workers: int) -> ProcessPoolExecutor:
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
    else:
        context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Let no worker outlive a run that was killed: it would hold the machine and write files nobody waits for."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
