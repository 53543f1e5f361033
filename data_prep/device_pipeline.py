"""Slides to features where one process owns the devices: readers decode ahead, and batches mix slides.

Reader processes go from slide to slide. One thread of this process copies their patches to batches of exactly the
encoder's size and starts these, a second awaits them in order, a third scatters the features to their slides and writes
finished ones; each has a bounded number of batches ahead of it. Thus the devices wait neither at the borders of slides
nor for files, and only the last batch is padded. Several encoders share one pass over the slides.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from data_prep.device_batches import Batch, EncoderQueue
from data_prep.device_usage import DeviceClock, DeviceUsage
from data_prep.encoders import DeviceEncoder
from data_prep.jobs import Job, Outcome, Remarks, failed, save_part, stored, worker_died, write_progress
from data_prep.pool import WORKER_LOSS
from data_prep.readers import SLOTS, Reader
from data_prep.reading import Chunk, Opened, grid_of, grids_of, slot_bytes
from data_prep.tiling import Tiles
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.columns import DTYPES
from pathflip_jax.data.storage import blocks

_IN_FLIGHT = 3  # batches on the devices: one computed, the others there when it ends
_PATIENCE = 2.0  # seconds without an answer of any reader, after which all are checked
_UNWRITTEN = 16  # batches of features whose slides wait to be written


class _Stopped(Exception):
    """The run has ended early."""


@dataclass
class _Task:
    """Features of a slide by one encoder on their way to its part; `dropped` when the slide has failed."""

    job: Job
    tiles: Tiles
    opened: Opened
    features: np.ndarray
    left: int  # rows that are still missing
    seconds: dict[str, float]  # of the slide's reading, for all its tasks
    peak_bytes: int = 0
    dropped: bool = False


@dataclass
class _Slide:
    """Slide on its way: `position` counts the patches that its reader has delivered."""

    number: int
    jobs: list[Job]
    position: int = 0
    tasks: list[tuple[int, _Task]] = field(default_factory=list)  # with the grid of each
    sizes: list[int] = field(default_factory=list)  # of the patches of each grid
    seconds: dict[str, float] = field(default_factory=dict)


class _Span(NamedTuple):
    """Rows of a task that follow each other in a batch."""

    task: _Task
    rows: np.ndarray


class _Event(NamedTuple):
    """End of a reader's request."""

    reader: Reader
    slide: _Slide
    slot: int
    future: Future


class DevicePipeline:
    """Features of slides by encoders that live in this process, `readers` processes reading ahead.

    `encoders` are by the name that jobs have for theirs.
    """

    def __init__(self, encoders: Mapping[str, DeviceEncoder], readers: int) -> None:
        self._encoders = encoders
        self._count = readers
        self._clock = DeviceClock()
        self._decoded = 0

    @property
    def usage(self) -> DeviceUsage:
        """Use of the devices so far."""
        return self._clock.usage(self._decoded, self._count)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Encode slides and write their parts; yields (job, outcome) as they end, as `pool.run_each` does.

        Jobs of one slide, for different encoders, share its reading. A slide whose reader died is read once more at
        the end. Raises OSError for errors of the device, which end the run; leaving early frees everything.
        """
        if not jobs:
            return
        self._begin(jobs)
        try:
            self._feeder.submit(self._guarded, self._feed)
            while (found := self._outcomes.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            self._end()

    def _begin(self, jobs: Sequence[Job]) -> None:
        self._slides = _slides(jobs)
        self._count = min(self._count, len(self._slides))
        self._slot_size = slot_bytes(jobs)
        sizes = {job.settings["encoder"]: job.settings["patch_size"] for job in jobs}
        self._queues = {name: EncoderQueue(self._encoders[name], size) for name, size in sizes.items()}
        self._open = {name: queue.new_batch() for name, queue in self._queues.items()}
        self._readers: list[Reader] = []
        self._waiting, self._retries = deque(self._slides), deque[_Slide]()
        self._current: dict[Reader, _Slide] = {}
        self._events: SimpleQueue[_Event | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[Job, Outcome] | BaseException | None] = SimpleQueue()
        self._reported: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._in_flight, self._unwritten = threading.Semaphore(_IN_FLIGHT), threading.Semaphore(_UNWRITTEN)
        self._feeder, self._awaiter, self._writer = (ThreadPoolExecutor(1) for _ in range(3))

    def _end(self) -> None:
        """Stop the threads, then the readers; batches in flight end first."""
        self._stopping = True
        self._events.put(None)
        self._in_flight.release()
        self._unwritten.release()
        for thread in (self._feeder, self._awaiter, self._writer):
            thread.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a thread's work; an error of it ends the run."""
        try:
            work(*arguments)
        except _Stopped:
            pass
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold views of the rings, which are to be freed
            self._outcomes.put(error)

    # The feeder: from readers to batches.

    def _feed(self) -> None:
        """Read all slides, then those once more whose readers died, and start their batches."""
        for _ in range(self._count):
            self._hire()
        self._follow()
        self._dismiss()
        while self._retries:
            self._waiting.append(self._retries.popleft())
            self._hire()
            self._follow(last_try=True)
            self._dismiss()
        for name, batch in self._open.items():
            if batch.used:
                self._start(name, batch)
        self._awaiter.submit(self._writer.submit, self._outcomes.put, None)  # after all that they have to do

    def _hire(self) -> None:
        reader = Reader(self._slot_size)
        self._readers.append(reader)
        for slot in range(SLOTS):
            self._request(reader, slot)

    def _dismiss(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers.clear()

    def _request(self, reader: Reader, slot: int) -> None:
        """Let a reader fill a slot with patches of its slide, or of the next one."""
        slide = self._current.get(reader)
        if slide is None:
            if not self._waiting:
                return
            slide = self._current[reader] = self._waiting.popleft()
        reader.requests += 1
        reader.request(
            slot, slide.number, slide.jobs, lambda future: self._events.put(_Event(reader, slide, slot, future))
        )

    def _follow(self, last_try: bool = False) -> None:
        """Take what the readers deliver until they have nothing left to read."""
        while any(reader.requests for reader in self._readers):
            try:
                with self._clock.waiting("reading"):
                    event = self._events.get(timeout=_PATIENCE)
            except Empty:
                for reader in [reader for reader in self._readers if reader.is_over]:
                    self._lose(reader, last_try)
                continue
            if self._stopping or event is None:
                raise _Stopped
            event.reader.requests -= 1
            if event.reader not in self._readers:
                continue
            if _is_lost(event):
                self._lose(event.reader, last_try)
                continue
            if (found := event.future.result()) is not None:
                self._take(event, found)
            self._request(event.reader, event.slot)

    def _lose(self, reader: Reader, last_try: bool) -> None:
        """Drop the slide of a reader that died, and replace the reader."""
        slide = self._current.pop(reader, None)
        reader.close()
        self._readers.remove(reader)
        if slide is not None:
            for _, task in slide.tasks:
                task.dropped = True
            if last_try:
                for job in slide.jobs:
                    self._report(job, worker_died(job))
            else:
                jobs = [job for job in slide.jobs if str(job.part) not in self._reported]
                self._retries.append(_Slide(slide.number, jobs))
        if self._waiting:
            self._hire()

    def _take(self, event: _Event, found: Chunk | Outcome) -> None:
        """Copy the patches of a slot to the batches of all their encoders."""
        slide = event.slide
        if isinstance(found, Outcome):
            self._current.pop(event.reader)
            for _, task in slide.tasks:
                task.dropped = True
            for job in slide.jobs:
                self._report(job, found)
            return
        if found.last:
            self._current.pop(event.reader)
        if found.opened is not None:
            self._begin_slide(slide, found.opened)
        for stage, seconds in found.seconds.items():
            slide.seconds[stage] = slide.seconds.get(stage, 0.0) + seconds
        for _, task in slide.tasks:
            task.peak_bytes = found.peak_bytes
        used, pixels = 0, event.reader.pixels(event.slot)
        for grid, rows in found.runs:
            size = slide.sizes[grid]
            end = used + 3 * size**2 * len(rows)
            patches = pixels[used:end].reshape(len(rows), size, size, 3)
            for number, task in slide.tasks:
                if number == grid:
                    self._add(task, rows, patches)
            used = end
            slide.position += len(rows)
            self._decoded += len(rows)

    def _begin_slide(self, slide: _Slide, opened: Opened) -> None:
        grids = [grid_of(job) for job in grids_of(slide.jobs)]
        slide.sizes = [job.settings["patch_size"] for job in grids_of(slide.jobs)]
        for job in slide.jobs:
            grid = grids.index(grid_of(job))
            tiles = opened.grids[grid]
            if isinstance(tiles, Outcome):
                self._report(job, tiles)
                continue
            number, dtype = len(tiles.coords), DTYPES[job.settings.get("dtype", "float16")]
            try:
                features = blocks.empty((number, self._encoders[job.settings["encoder"]].dim), dtype)
            except OSError as error:
                self._report(job, failed(job, error))
                continue
            slide.tasks.append((grid, _Task(job, tiles, opened, features, number, slide.seconds)))

    def _add(self, task: _Task, rows: np.ndarray, patches: np.ndarray) -> None:
        """Copy patches to the open batch of their encoder, and start it when it is full."""
        name = task.job.settings["encoder"]
        while len(rows) and not task.dropped:
            batch = self._open[name]
            count = min(batch.room, len(rows))
            batch.patches[batch.used : batch.used + count] = patches[:count]
            batch.spans.append(_Span(task, rows[:count]))
            batch.used += count
            rows, patches = rows[count:], patches[count:]
            if not batch.room:
                self._start(name, batch)
                self._open[name] = self._queues[name].new_batch()

    def _start(self, name: str, batch: Batch) -> None:
        with self._clock.waiting("writing"):
            self._unwritten.acquire()
        self._in_flight.acquire()
        if self._stopping:
            raise _Stopped
        batch.dispatched = self._clock.dispatch()
        self._queues[name].start(batch)
        self._awaiter.submit(self._guarded, self._await, name, batch)

    # The awaiter and the writer: from batches to parts.

    def _await(self, name: str, batch: Batch) -> None:
        features = self._queues[name].features(batch)
        self._clock.complete(batch.dispatched, batch.used)
        self._in_flight.release()
        self._writer.submit(self._guarded, self._scatter, batch.spans, features)

    def _scatter(self, spans: Sequence[_Span], features: np.ndarray) -> None:
        """Put the features of a batch in their slides, and write those that are complete."""
        start = 0
        for task, rows in spans:
            own = features[start : start + len(rows)]
            start += len(rows)
            if task.dropped:
                continue
            try:
                task.features[rows] = stored(own, task.job.settings.get("dtype", "float16"), task.job.file)
                blocks.release(task.features)
            except (ValueError, OSError) as error:
                task.dropped = True
                self._report(task.job, failed(task.job, error))
                continue
            task.left -= len(rows)
            write_progress(task.job, len(task.features) - task.left, len(task.features))
            if not task.left and str(task.job.part) not in self._reported:  # else its first part may be in a shard
                self._report(task.job, self._save(task))
        self._unwritten.release()

    def _save(self, task: _Task) -> Outcome:
        job, tiles, opened = task.job, task.tiles, task.opened
        place = (tiles.coords, tiles.patch_size_level0, opened.mpp, opened.width, opened.height)
        encoder = self._encoders[job.settings["encoder"]]
        slide = SlideFeatures(job.slide_id, job.case_id, task.features, *place, encoder.name)
        outcome = save_part(job, slide, Remarks((*opened.notes, *tiles.notes)), dict(task.seconds))
        return outcome._replace(timings=replace(outcome.timings, peak_bytes=task.peak_bytes))

    def _report(self, job: Job, outcome: Outcome) -> None:
        """Report the end of a job, once: a slide may fail in a reader and in a batch."""
        with self._lock:
            if (part := str(job.part)) in self._reported:
                return
            self._reported.add(part)
        self._outcomes.put((job, outcome))


def _is_lost(event: _Event) -> bool:
    """Whether the reader's process has ended, in a request or between two: a new one begins the slide anew."""
    if event.future.cancelled() or isinstance(event.future.exception(), WORKER_LOSS):
        return True
    found = event.future.result()
    return isinstance(found, Chunk) and found.start != event.slide.position


def _slides(jobs: Sequence[Job]) -> list[_Slide]:
    """Jobs by slide, where they open it alike."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        found.setdefault((job.slide_id, str(job.file), job.mpp, job.settings["assume_mpp"]), []).append(job)
    return [_Slide(number, own) for number, own in enumerate(found.values())]
