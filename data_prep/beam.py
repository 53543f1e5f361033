"""Preparation on Apache Beam: the single-machine work, distributed by any runner (Dataflow, Flink, Spark, local).

Only slide names and outcomes are exchanged between machines, never pixels or features: one task turns a slide into its
part, another assembles a shard, both by the functions of the single-machine path, and their output goes directly to the
folder of records. Every worker must therefore see that folder and the slides under the same paths (a shared or mounted
file system), and must have this package with its `beam` extra. Runners retry lost tasks; both functions are idempotent.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from data_prep.jobs import Job, Outcome, StageTimings, worker_died
from data_prep.majority import has_uniform_traits, vote
from data_prep.plan import Plan
from data_prep.pool import PRELOADED, run_one
from data_prep.shards import Progress, assemble, part_traits
from pathflip_jax.data.records.cohort import Cohort, Traits
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.runtime.workers import Worker

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability import python_urns
    from apache_beam.runners.portability.fn_api_runner import worker_handlers
    from apache_beam.runners.runner import PipelineState
except ImportError as error:
    raise ImportError(
        f"--beam needs Apache Beam ({error}); install it with `pip install pathflip-jax[beam]`"
    ) from error


def run_on_beam(plan: Plan, work: Callable[[Job], Outcome], options: Sequence[str]) -> Progress:
    """Run the jobs of a plan on the runner that `options` name (Beam's options; DirectRunner by default).

    Raises ValueError for an unknown runner, OSError with Beam's message when the pipeline ends early: a full disk, or a
    worker that died with more than a slide. Finished work is kept, and a second run does the rest.
    """
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    processed = (
        pipeline
        | "slides" >> beam.Create([_with_absolute_paths(job) for job in plan.jobs])
        | "reshuffle" >> beam.Reshuffle()
        | "slide to part" >> beam.ParDo(_SlideToPart(work))
    )
    cohort = (
        processed
        | "votes" >> beam.Map(lambda element: element[1][2])
        | "all votes" >> beam.combiners.ToList()
        | "majority vote" >> beam.Map(_cohort, plan.cohort, has_uniform_traits(plan))
    )
    outcomes = plan.parts.absolute() / "beam.json"
    _ = (
        processed
        | "slides of a shard" >> beam.GroupByKey()
        | "parts to shard" >> beam.Map(_assemble, beam.pvalue.AsSingleton(cohort))
        | "all shards" >> beam.combiners.ToList()
        | "save outcomes" >> beam.Map(_save, outcomes)
    )
    outcomes.unlink(missing_ok=True)
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:  # every runner raises its own class, with a worker's traceback in the message
        lines = str(error).strip().splitlines() or [repr(error)]
        raise OSError(f"{plan.out}: the Beam pipeline failed: {lines[-1]}; {_CURE}") from error
    if state != PipelineState.DONE or not outcomes.exists():
        raise OSError(f"{plan.out}: the Beam pipeline ended in state {state}, expected {PipelineState.DONE}; {_CURE}")
    found = json.loads(outcomes.read_bytes())
    outcomes.unlink()
    failed = [Failure(**row) for row in found["failed"]]
    notes = [(note, slide) for note, slide in found["notes"]]
    return Progress(found["done"], failed, StageTimings(**found["effort"]), notes)


_CURE = "finished work is kept: fix the cause and run the same command again"


class _SlideToPart(beam.DoFn):
    """Conversion of slides to parts, in a process that a slide may crash, with the outcome of each.

    A slide that crashes its reader would otherwise crash the runner's worker, and the pipeline after some retries.
    """

    def __init__(self, work: Callable[[Job], Outcome]) -> None:
        self._work = work
        count = beam.metrics.Metrics.counter
        self._counters = {name: count("pathflip", name) for name in ("slides", "failed slides", "patches")}

    def setup(self) -> None:
        """Called by Beam in each of its workers."""
        self._worker = Worker(preload=PRELOADED)

    def process(self, job: Job) -> Iterator[tuple[str, tuple[Job, Outcome, Traits | None]]]:
        """Process one slide and its vote, keyed by its shard. Raises OSError for errors that every slide would meet."""
        outcome = Outcome()
        if not job.part.exists():  # else an earlier attempt or run has processed it
            outcome = run_one(self._worker, self._work, job) or worker_died(job)
        if outcome.fatal:
            raise OSError(outcome.error)
        self._counters["slides"].inc()
        self._counters["failed slides"].inc(bool(outcome.error))
        self._counters["patches"].inc(outcome.timings.patches)
        yield str(job.shard), (job, outcome, None if outcome.error else part_traits(job))

    def teardown(self) -> None:
        """Called by Beam when a worker ends."""
        self._worker.stop()


@worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _LocalWorker(worker_handlers.SubprocessSdkWorkerHandler):
    """DirectRunner worker process whose death ends the pipeline.

    In Beam 2.77 a caller waiting for a response of a dead process waits forever, unless there was more output to read;
    for containers, callers are notified. At the end Beam waits forever for a process that was just starting and was
    never told to stop. Beam uses this class instead of its own.
    """

    def start_worker(self) -> None:
        """Called by Beam once."""
        super().start_worker()
        self._stopping = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop_worker(self) -> None:
        """Called by Beam at the end."""
        self._stopping.set()
        self.control_conn.push(worker_handlers.BeamFnControlServicer._DONE_MARKER)  # for a late connection
        super().stop_worker()

    def _watch(self) -> None:
        self.worker_thread.join()  # until the process has ended
        if not self._stopping.is_set():
            with contextlib.suppress(Exception):  # it raises its read error, which no caller awaits
                self.data_conn.close()
        while not self._stopping.wait(_ANSWER_SECONDS):  # repeated for later requests
            with contextlib.suppress(RuntimeError):  # a request is in progress
                self.control_conn.abort(RuntimeError("a worker process of the DirectRunner died"))


_ANSWER_SECONDS = 1.0  # seconds from a worker's death to notifying waiters: a response may still arrive


def _with_absolute_paths(job: Job) -> Job:
    """Job with absolute paths: a worker starts in another folder."""
    return replace(job, file=job.file.absolute(), shard=job.shard.absolute(), part=job.part.absolute())


def _cohort(votes: list[Traits | None], before: Cohort | None, alike: bool) -> Cohort | None:
    """Common traits of the slides of all shards: of existing shards, else of finished slides."""
    voters = [traits for traits in votes if traits is not None]
    return before or (vote(voters, alike) if voters else None)


def _assemble(shard: tuple[str, Iterable[tuple[Job, Outcome, Traits | None]]], cohort: Cohort | None) -> Progress:
    """Assemble a shard once all of its slides are finished."""
    processed = sorted(shard[1], key=lambda slide: slide[0].slide_id)
    progress = assemble([job for job, _, _ in processed], cohort)
    for job, outcome, _ in processed:
        progress.count(job, outcome)
    return progress


def _save(shards: list[Progress], path: Path) -> None:
    """Save the outcomes of the slides for the machine that started the pipeline."""
    total = Progress()
    for progress in shards:
        total.add(progress)
    failed = [failure._asdict() for failure in total.failed]
    outcomes = {"done": total.done, "failed": failed, "effort": asdict(total.timings), "notes": total.notes}
    write_json(path, outcomes, indent=1)
