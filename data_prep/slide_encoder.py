"""Features of single slides, each in a folder of records of its own, such as the entries of a cache."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.device_batches import check_encoder
from data_prep.device_pipeline import DevicePipeline
from data_prep.encoders import DeviceEncoder, load_encoder, runs_on_device
from data_prep.encoding_task import Encoded, Task
from data_prep.jobs import Job, Outcome, prepare_slide, read_progress, read_remarks, remarks_path, worker_died
from data_prep.pool import run_each
from data_prep.recipe import claim_recipe, features_recipe
from data_prep.settings import PrepareSettings
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe, objection
from pathflip_jax.data.readers.features import case_of
from pathflip_jax.data.records.records import finish_folder, shard_name
from pathflip_jax.runtime.limits import processors

_POLL = 0.2  # seconds between two looks at the progress of the slides


class SlideEncoder:
    """Encoder of single slides by the settings of `prepare`; a network is loaded once, with the first slide.

    `expected` is the recipe that the features must agree with, that of a run. `settings.workers` processes read and
    encode; distribution over machines has no effect here.
    """

    def __init__(self, settings: PrepareSettings, expected: FeatureRecipe | None = None) -> None:
        self.settings, self._expected = settings, expected
        self._network: DeviceEncoder | None = None

    def encode(
        self, tasks: Sequence[Task], on_progress: Callable[[str, int, int], Any] | None = None
    ) -> Iterator[Encoded]:
        """Encode slides, each into a finished folder of records; yields them as they end, bad ones with their error.

        `on_progress` gets the id of a slide, the patches done and all of its patches; without it, a bar is shown.
        Raises ValueError for an encoder whose features are not those expected, and as `load_encoder`; OSError for a
        full disk.
        """
        # While imported, it replaces `__import__` for all threads, and those of worker processes import something.
        importlib.import_module("tensorflow_datasets.proto")
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
        jobs = {str(job.part): job for job in map(self._job, tasks)}
        folders = {str(self._job(task).part): task.folder for task in tasks}
        with _Progress(list(jobs.values()), on_progress) as progress:
            for job, outcome in self._run(list(jobs.values())):
                outcome = outcome or worker_died(job)
                if outcome.fatal:
                    raise OSError(outcome.error)
                progress.end(job)
                yield _finished(job, folders[str(job.part)], outcome)

    def load(self) -> None:
        """Load a network, and compare its recipe with the expected one. Raises ValueError where they differ."""
        settings = self.settings
        if not runs_on_device(settings.encoder):
            encoder = load_encoder(settings.encoder, settings.half)
            self._check(encoder)
        elif self._network is None:
            network = load_encoder(settings.encoder, settings.half, settings.batch_size, settings.weights)
            self._check(network)
            check_encoder(network, settings.patch_size)
            self._network = network

    def _check(self, encoder: Any) -> None:
        recipe = features_recipe(encoder, self.settings.of_records())
        if found := objection(recipe, self._expected):
            weights = f" from {self.settings.weights}" if self.settings.weights else ""
            raise ValueError(
                f"encoder {self.settings.encoder}{weights}: its features are not those that the run was trained on: "
                f"{found}; pass the weights of that run with --weights"
            )

    def _job(self, task: Task) -> Job:
        shard = task.folder / shard_name(0)
        return Job(
            task.slide_id,
            case_of(task.slide_id),
            task.file,
            shard,
            shard,  # the record of a slide alone is its shard
            self.settings.of_records(),
            self.settings.workers,
            self.settings.override_mpp,
            self.settings.weights,
            self.settings.reader,
            progress=task.folder / ".progress",
        )

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome | None]]:
        if not jobs:
            return iter(())
        self.load()
        workers = self.settings.workers or processors()
        if self._network is None:
            return run_each(prepare_slide, jobs, workers)
        for job in jobs:
            claim_recipe(job.shard.parent, self._network, job.settings)
        return DevicePipeline({self.settings.encoder: self._network}, workers).run(jobs)


def _finished(job: Job, folder: Path, outcome: Outcome) -> Encoded:
    """Slide whose job has ended, with its folder completed."""
    if outcome.error:
        return Encoded(job.slide_id, folder, outcome.error)
    notes = read_remarks(job.part).notes
    for path in (remarks_path(job.part), job.progress):
        path.unlink(missing_ok=True)
    finish_folder(folder, edge_um=job.settings["edge_um"])
    return Encoded(job.slide_id, folder, notes=notes)


class _Progress:
    """Progress of slides by their patches, watched by a thread, as a bar or for a caller."""

    def __init__(self, jobs: Sequence[Job], on_progress: Callable[[str, int, int], Any] | None) -> None:
        self._left: dict[str, Job] = {job.slide_id: job for job in jobs}
        self._counts: dict[str, tuple[int, int]] = {}
        self._report, self._many = on_progress, len(jobs) > 1
        self._over: Future = Future()

    def __enter__(self) -> "_Progress":
        title = f"encoding {len(self._left)} slides" if self._many else f"encoding {next(iter(self._left), '')}"
        self._bar = tqdm(desc=title, unit="patch", disable=None if self._report is None else True)
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(self._watch)
        return self

    def __exit__(self, *_) -> None:
        self._over.set_result(None)
        self._pool.shutdown()
        self._bar.close()

    def end(self, job: Job) -> None:
        """Count all patches of a slide that has ended."""
        self._look(job)
        self._left.pop(job.slide_id, None)

    def _watch(self) -> None:
        while not wait([self._over], timeout=_POLL).done:
            for job in list(self._left.values()):
                self._look(job)

    def _look(self, job: Job) -> None:
        found = read_progress(job.progress)
        if found is None or found == self._counts.get(job.slide_id):
            return
        self._counts[job.slide_id] = found
        if self._report is not None:
            self._report(job.slide_id, *found)
        self._bar.total = None if len(self._counts) < len(self._left) else sum(of for _, of in self._counts.values())
        self._bar.n = sum(done for done, _ in self._counts.values())
        self._bar.refresh()
