"""Processing of one slide in a worker process: reading, and writing as a separate record.

A worker never raises for a bad slide; it returns the error as a line that names the file. Reading is one batch ahead of
encoding, in a thread: OpenSlide and the encoder's libraries both release the GIL.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from data_prep.detectors import TissueSettings
from data_prep.encoders import PatchEncoder, load_encoder
from data_prep.given_masks import SUFFIXES, find_mask
from data_prep.mask_files import write_mask
from data_prep.recipe import claim_recipe
from data_prep.slides import Slide, open_slide
from data_prep.tiling import Tiles, read_patches, tile_slide
from pathflip_jax.data.pixels.reader_names import READERS
from pathflip_jax.data.readers.features import SlideFeatures, UnknownPatchSize, read_features
from pathflip_jax.data.records.columns import DTYPES
from pathflip_jax.data.records.index import narrowed
from pathflip_jax.data.records.records import write_shard
from pathflip_jax.data.storage import blocks
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, remove
from pathflip_jax.data.storage.json_values import json_object
from pathflip_jax.runtime import ulimits
from pathflip_jax.runtime.limits import processors

PLACEHOLDER = 256  # pixels: patch size of a slide that does not state it, until its cohort determines it


@dataclass(frozen=True)
class Job:
    """Conversion of one slide to a record: read from `file`, written to `part`, for `shard`.

    `sharing` worker processes share a machine; None for as many as it has cores. `mpp` is the level-0 resolution that
    overrides the file's; None to use the file's. `weights` are those of a registered encoder that this job loads,
    `reader` decodes the pixels (`READERS`), `progress` is a file that tells the patches done (`read_progress`), `masks`
    is a folder of masks made elsewhere.
    """

    slide_id: str
    case_id: str
    file: Path
    shard: Place
    part: Place
    settings: dict[str, Any]
    sharing: int | None = None
    mpp: float | None = None
    weights: Path | None = None
    reader: str = READERS[0]
    progress: Path | None = None
    masks: Path | None = None


@dataclass(frozen=True)
class StageTimings:
    """Cost of slides: patches, seconds of each stage, and the largest resident size of a worker in bytes.

    The stages are consecutive: `tissue`, then `wait` (for pixels) and `encode` alternately, then `write`. `read` is the
    time of the concurrent prefetch thread. The encoder is the bottleneck where `wait` is near zero.
    """

    patches: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def summary(self) -> str:
        """Summary: patches, and the stages' shares of the workers' time."""
        stages = [stage for stage in ("tissue", "wait", "encode", "write") if stage in self.seconds]
        if "encode" not in stages:  # feature files, and readers of slides: reading is a stage of its own
            stages = ["read", *stages]
        whole = sum(self.seconds[stage] for stage in stages) or 1.0
        shares = ", ".join(f"{stage} {self.seconds[stage] / whole:.0%}" for stage in stages)
        peak = f"{self.peak_bytes / 1e9:.2f} GB"
        return f"{self.patches} patches; workers' time: {shares}; peak memory of a worker {peak}"

    def __add__(self, other: "StageTimings") -> "StageTimings":
        stages = {**self.seconds, **other.seconds}
        seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}
        return StageTimings(self.patches + other.patches, seconds, max(self.peak_bytes, other.peak_bytes))


class Remarks(NamedTuple):
    """Remarks on a slide that are not in its record: `notes` for the summary, and the certainty of its patch size.

    `guessed` is a patch size inferred from the gaps between patches; `sizeless` is the reason for a missing one.
    """

    notes: tuple[str, ...] = ()
    guessed: bool = False
    sizeless: str = ""


class Outcome(NamedTuple):
    """Result of a worker's job on a slide: its error, if any; `fatal` where every slide would meet it."""

    error: str = ""
    fatal: bool = False
    timings: StageTimings = StageTimings()


def prepare_slide(job: Job) -> Outcome:
    """Convert a slide file to its part."""
    outcome = try_encoder(job)
    return outcome if outcome.error else _guarded(job, _slide_features)


def mask_slide(job: Job) -> Outcome:
    """Write the tissue mask of a slide beside its records, without encoding it."""
    try:
        with _opened(job) as slide:
            tile_for([job], slide)
    except Exception as error:
        return failed(job, error)
    return Outcome()


def import_slide(job: Job) -> Outcome:
    """Convert a feature file to its part."""
    return _guarded(job, _imported_features)


def try_encoder(job: Job) -> Outcome:
    """Load the encoder and run it on one patch, so that its faults are reported once, not once per slide."""
    try:
        claim_recipe(job.shard.parent, _encoder(job), job.settings)
    except (ValueError, OSError, ImportError) as error:
        return Outcome(str(error), fatal=True)
    return Outcome()


def worker_died(job: Job) -> Outcome:
    """Outcome of a slide whose worker process died."""
    cure = "the file crashed or hung its reader, or memory ran out: check the file, or use fewer workers"
    return Outcome(f"{job.file}: the worker process died; {cure}")


def remarks_path(part: Place) -> Place:
    """Path of the remarks on a part's slide, next to the part."""
    return part.with_name(part.name.removesuffix(".tfrecord") + ".json")


def save_remarks(part: Place, remarks: Remarks) -> None:
    """Save the remarks on a slide until its shard is assembled, perhaps by another run."""
    remove(remarks_path(part))
    if remarks != Remarks():
        with atomic_file(remarks_path(part)) as out:
            out.write(json.dumps(remarks._asdict()).encode())


def read_remarks(part: Place) -> Remarks:
    """Read the remarks on the slide of a part."""
    path = remarks_path(part)
    if not path.exists():
        return Remarks()
    found = Remarks(**json_object(path, path.read_bytes()))
    return found._replace(notes=tuple(found.notes))


def write_progress(job: Job, done: int, patches: int) -> None:
    """Write the patches done of a slide and all of its patches to the job's progress file, if it has one."""
    if job.progress is not None:
        job.progress.write_text(f"{done} {patches}\n")


def read_progress(path: Path) -> tuple[int, int] | None:
    """Read a progress file: patches done, and all patches; None before the first of them."""
    try:
        done, patches = path.read_text().split()
        return int(done), int(patches)
    except (FileNotFoundError, ValueError):  # not there yet, or being written
        return None


def failed(job: Job, error: Exception) -> Outcome:
    """Outcome of a slide that cannot be read or encoded."""
    if isinstance(error, ValueError | OSError):
        limit = ulimits.explain(error)  # an error of this process, not of this file
        return Outcome(limit or str(error), fatal=bool(limit))
    # A reader's bug triggered by one file must not end an overnight run.
    return Outcome(f"{job.file}: {type(error).__name__}: {error}")


def save_part(job: Job, slide: SlideFeatures, remarks: Remarks, seconds: dict[str, float]) -> Outcome:
    """Write the features of a slide as its part; `seconds` are those of its earlier stages."""
    start = time.perf_counter()
    try:
        save_remarks(job.part, remarks)
        write_shard(job.part, [slide], **layout(job.settings))
    except OSError as error:
        return Outcome(str(error), fatal=True)
    except ValueError as error:
        return Outcome(f"{job.file}: {error}")
    seconds["write"] = time.perf_counter() - start
    return Outcome(timings=StageTimings(len(slide.features), seconds, peak_bytes()))


def _guarded(job: Job, read: Callable[[Job, dict[str, float]], tuple[SlideFeatures, Remarks]]) -> Outcome:
    """Read and write one slide; any error becomes a line of text."""
    seconds: dict[str, float] = {}
    try:
        slide, remarks = read(job, seconds)
    except Exception as error:
        return failed(job, error)
    return save_part(job, slide, remarks, seconds)


def _slide_features(job: Job, seconds: dict[str, float]) -> tuple[SlideFeatures, Remarks]:
    settings, encode = job.settings, _encoder(job)
    dtype = settings.get("dtype", "float16")
    with _opened(job) as slide:
        start = time.perf_counter()
        tiles = tile_for([job], slide)
        began = time.perf_counter()
        features, rows = blocks.empty((len(tiles.coords), encode.dim), DTYPES[dtype]), 0  # as records store them
        encoding = 0.0
        for patches in _read_ahead(read_patches(slide, tiles), seconds):
            before = time.perf_counter()
            features[rows : rows + len(patches)] = stored(encode(patches), dtype, job.file)
            rows += len(patches)
            blocks.release(features)
            write_progress(job, rows, len(features))
            encoding += time.perf_counter() - before
        waiting = time.perf_counter() - began - encoding
        seconds |= {"tissue": began - start, "wait": waiting, "encode": encoding}
        place = (tiles.coords, tiles.patch_size_level0, slide.mpp, slide.width, slide.height)
        found = SlideFeatures(job.slide_id, job.case_id, features, *place, encode.name)
        return found, Remarks((*slide.notes, *tiles.notes))


def _opened(job: Job) -> Slide:
    return open_slide(job.file, job.settings["assume_mpp"], job.mpp, job.reader, bool(job.settings.get("icc")))


def tile_for(jobs: Sequence[Job], slide: Slide) -> Tiles:
    """Tile an open slide for jobs that share its patches, and write its mask beside the records of each.

    Raises ValueError for a slide without tissue, or without the mask that it needs.
    """
    tissue, notes = _tissue_settings(jobs[0])
    grid = (jobs[0].settings[name] for name in ("patch_size", "mpp", "min_tissue"))
    tiles = tile_slide(
        slide, *grid, tissue, lambda found: [write_mask(job.shard.parent, job.slide_id, slide, found) for job in jobs]
    )
    return tiles._replace(notes=(*notes, *tiles.notes))


def _tissue_settings(job: Job) -> tuple[TissueSettings, tuple[str, ...]]:
    """Tissue settings of a job, and notes on them. Raises ValueError for a slide without a mask that it needs."""
    names = {"detector": "tissue", "holes_um2": "holes_um2", "smallest_um2": "smallest_um2"}
    given = {name: job.settings.get(key) for name, key in names.items()}
    settings = TissueSettings(**given, keep_ink=bool(job.settings.get("keep_ink")))
    if job.masks is None:
        return settings, ()
    if source := find_mask(job.masks, job.slide_id):
        return replace(settings, source=source), ()
    if settings.detector is None:
        raise ValueError(
            f"{job.file}: no mask of its tissue: expected {' or '.join(job.slide_id + suffix for suffix in SUFFIXES)} "
            f"in {job.masks}; add it, or let a detector find the tissue of such slides, for example with `--tissue "
            "embedded`"
        )
    return settings, (f"no mask in --tissue-from, tissue found by {settings.detector}",)


def stored(features: Float[np.ndarray, "n F"], dtype: str, file: Path) -> np.ndarray:
    """Features of a batch of patches as stored in records; non-finite values are reported for the slide as a whole."""
    return narrowed(features, dtype, str(file)) if np.isfinite(features).all() else features


def _read_ahead(batches: Iterator[np.ndarray], seconds: dict[str, float]) -> Iterator[np.ndarray]:
    """Batches of an iterator, each read while the previous one is processed; measures the reading time."""
    seconds["read"] = 0.0

    def read() -> np.ndarray | None:
        start = time.perf_counter()
        batch = next(batches, None)
        seconds["read"] += time.perf_counter() - start
        return batch

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read)
        while (batch := coming.result()) is not None:
            coming = reader.submit(read)
            yield batch


def _imported_features(job: Job, seconds: dict[str, float]) -> tuple[SlideFeatures, Remarks]:
    given = {name: job.settings[name] for name in ("patch_size", "mpp", "encoder")} | {"override_mpp": job.mpp}
    start, sizeless = time.perf_counter(), ""
    names = {"slide_id": job.slide_id, "case_id": job.case_id}
    try:
        slide = read_features(job.file, **names, **given)
    except UnknownPatchSize as error:  # the rest of the cohort may determine it
        sizeless = str(error)
        slide = read_features(job.file, **names, **given | {"patch_size": PLACEHOLDER})
    seconds["read"] = time.perf_counter() - start
    return slide, Remarks(slide.notes, slide.patch_size_source == "gaps", sizeless)


def _encoder(job: Job) -> PatchEncoder:
    settings, threads = job.settings, max(1, processors() // (job.sharing or processors()))
    return _loaded(settings["encoder"], settings["half"], settings["patch_size"], threads, job.weights)


@lru_cache(maxsize=1)
def _loaded(name: str, half: bool, patch_size: int, threads: int, weights: Path | None) -> PatchEncoder:
    encoder = load_encoder(name, half, weights=weights)
    if "torch" in sys.modules:  # as many threads in total as cores, not as many in each worker
        sys.modules["torch"].set_num_threads(threads)
    encoder(np.zeros((1, patch_size, patch_size, 3), np.uint8))
    return encoder


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def layout(settings: dict[str, Any]) -> dict[str, Any]:
    """Record layout settings, as `write_shard` takes them."""
    return {"cut": settings["cut"], "edge_um": settings["edge_um"], "dtype": settings.get("dtype", "float16")}
