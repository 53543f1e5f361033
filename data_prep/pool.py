"""Worker processes for slides: one bad file ends its own job, never the run.

A job whose worker died is retried once at the end, when no other job competes for memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from pathflip_jax.runtime.workers import DEATHS, Worker

PRELOADED = "data_prep.jobs"  # imported once by the fork server of the workers
WORKER_LOSS = (*DEATHS, TimeoutError)  # the worker ended before its job
JOB_SECONDS = 24 * 3600.0  # seconds per job: a slide that takes a day is stuck


def run_each(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Run `work(job)` in `workers` processes; yields (job, result) as they end, result None for a worker that died.

    `work` is a module-level function and should catch what it can: any exception ends the run. At most one job per
    worker is in progress, so results do not accumulate. Leaving early lets running jobs finish first.
    """
    waiting, retries = deque(jobs), []
    pool = [Worker(number, PRELOADED) for number in range(min(workers, len(waiting)))]
    idle = list(pool)
    running: dict[Future, tuple[Any, Worker]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.popleft(), idle.pop()
                running[worker.submit(work, job, seconds=JOB_SECONDS)] = job, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, worker = running.pop(future)
                idle.append(worker)
                if isinstance(future.exception(), WORKER_LOSS):
                    retries.append(job)
                else:
                    yield job, future.result()
    finally:
        wait(running)
        for worker in pool:
            worker.stop()
    for job in retries:
        worker = Worker(0, PRELOADED)
        try:
            yield job, run_one(worker, work, job, tries=1)
        finally:
            worker.stop()


def run_one(worker: Worker, work: Callable[[Any], Any], job: Any, tries: int = 2) -> Any:
    """Result of `work(job)`, or None where the process died each time."""
    for _ in range(tries):
        try:
            return worker.submit(work, job, seconds=JOB_SECONDS).result()
        except WORKER_LOSS:
            continue
    return None
