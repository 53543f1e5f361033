"""Shard assembly from the records of its slides: the only function that writes shards, however work is distributed.

It can be retried at any time, as cluster runners do with lost tasks: the output depends on the slides alone, and a
retry finds the shard of the first attempt.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.jobs import Job, Outcome, StageTimings, layout, read_remarks, remarks_path
from data_prep.recipe import contradictions, encoder_name
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.cohort import Cohort, Traits, traits_of
from pathflip_jax.data.records.columns import SlideInfo
from pathflip_jax.data.records.index import index_path, read_index
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records, write_shard
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.data.storage.files import Place


@dataclass
class Progress:
    """Progress of a run: the ids of slides now in a shard, those that failed, and their cost.

    `notes` are pairs of a line for the summary and the slide that it is about.
    """

    done: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    timings: StageTimings = StageTimings()
    notes: list[tuple[str, str]] = field(default_factory=list)

    def count(self, job: Job, outcome: Outcome) -> None:
        """Add a worker's outcome for a slide."""
        if outcome.error:
            self.failed.append(Failure(job.slide_id, str(job.file), outcome.error))
        self.timings += outcome.timings

    def add(self, other: "Progress") -> None:
        """Add the progress of other slides."""
        self.done += other.done
        self.failed += other.failed
        self.timings += other.timings
        self.notes += other.notes


def part_traits(job: Job) -> Traits | None:
    """Cohort traits of the slide of a part; None where it has no part."""
    if not job.part.exists():
        return None
    info = _info(job)
    found = traits_of(info)._replace(where=str(job.file), encoder=encoder_name(info.encoder, job.file))
    return found._replace(patch_size=0) if read_remarks(job.part).sizeless else found


def assemble(jobs: list[Job], cohort: Cohort | None) -> Progress:
    """Write a shard from its present content and the parts of its missing slides, unless nothing is new.

    `jobs` are these slides, at least one; those that failed have no part. A slide that does not belong to the
    `cohort` is left out, and its part is kept. The shard and its index are written atomically, and only then are the
    parts deleted. Returns the slides of `jobs` that are in it, and those of another cohort. Raises OSError on a full
    disk.
    """
    start, path, settings = time.perf_counter(), jobs[0].shard, jobs[0].settings
    added: dict[str, tuple[Job, dict[str, Any]]] = {}
    progress = Progress()
    for job in jobs:
        if not job.part.exists():
            continue
        try:
            changes, notes = _fitted(job, cohort)
        except ValueError as error:
            progress.failed.append(Failure(job.slide_id, str(job.file), str(error)))
        else:
            added[job.slide_id] = job, changes
            progress.notes += [(note, job.slide_id) for note in notes]
    before = {info.slide_id: info for info in read_index(path).slides} if path.exists() else {}
    old = {job.slide_id for job in jobs if job.slide_id in before and outdated(before[job.slide_id], job.mpp, settings)}
    kept = before.keys() - old
    if added or old or not path.exists():
        write_shard(path, _slides(path, kept - added.keys(), added), **layout(settings))
    for job, _ in added.values():
        remove(job.part)
    progress.done = [job.slide_id for job in jobs if job.slide_id in kept | added.keys()]
    progress.timings = StageTimings(seconds={"write": time.perf_counter() - start})
    return progress


def amend(shard: Place, gone: Collection[str], cases: Mapping[str, str], settings: dict[str, Any]) -> None:
    """Rewrite a shard without the slides that are `gone`, and with the `cases` of those that have new ones."""
    slides = [info.slide_id for info in read_index(shard).slides if info.slide_id not in gone]
    records = Records([shard])

    def amended() -> Iterator[SlideFeatures]:
        for slide_id in slides:
            slide = open_slide(records, records.position(slide_id))
            yield replace(slide, case_id=cases[slide_id]) if slide_id in cases else slide

    write_shard(shard, amended(), **layout(settings))


def outdated(info: SlideInfo, mpp: float | None, settings: dict[str, Any]) -> bool:
    """Whether a record has another resolution than the one given now: by `mpp`, which overrides files, or filled in."""
    if mpp is not None:
        return abs(info.mpp - mpp) > 1e-5 * mpp
    return not info.mpp and settings.get("command") == "import" and bool(settings.get("mpp"))


def remove(part: Place) -> None:
    """Delete a part with its index and its remarks."""
    for path in (part, index_path(part), remarks_path(part)):
        path.unlink(missing_ok=True)


def _info(job: Job) -> SlideInfo:
    """Index entry of the slide of a part."""
    return read_index(job.part).slides[0]


def _fitted(job: Job, cohort: Cohort | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Changes to a slide that joins its cohort, and notes on them. Raises ValueError where it does not fit.

    A patch size that is only inferred, or unknown, is replaced by the cohort's: a biopsy of two distant patches
    determines no size.
    """
    found, remarks = part_traits(job), read_remarks(job.part)
    changes: dict[str, Any] = {}
    notes = list(remarks.notes)
    if job.case_id and job.case_id != _info(job).case_id:
        changes["case_id"] = job.case_id
    if cohort is not None and (remarks.guessed or remarks.sizeless):
        size = cohort.pixels_of(found.mpp)
        loose = not found.patch_size or (cohort.size_objection(found) and _whole_gaps(found.patch_size, size))
        if size and loose:
            changes["patch_size"], found = size, found._replace(patch_size=size)
            notes = [note for note in notes if "gaps" not in note]
            notes.append("patch size of the other slides used: these have too few adjacent patches to determine it")
    if remarks.sizeless and not found.patch_size:
        raise ValueError(remarks.sizeless)
    if cohort is None:
        return changes, tuple(notes)
    encoder = cohort.common["encoder"].value
    if found.encoder == encoder_name(encoder, job.file):
        found = found._replace(encoder=encoder)  # as the shards of an earlier version spell it
    if objection := cohort.objection(found):
        raise ValueError(f"{job.file}: {objection}")
    if encoder and encoder != _info(job).encoder:
        changes["encoder"] = encoder
    if job.settings.get("command") == "import":
        notes += contradictions(cohort)
    return changes, tuple(notes)


def _whole_gaps(gap: int, size: int) -> bool:
    """Whether a gap between two patches is a whole number of patches of this size, more than one."""
    return bool(size) and round(gap / size) > 1 and abs(gap / size - round(gap / size)) < 0.02


def _slides(
    path: Place, kept: Collection[str], added: Mapping[str, tuple[Job, dict[str, Any]]]
) -> Iterator[SlideFeatures]:
    """Slides of a shard in order, from the existing shard and from parts."""
    existing = Records([path]) if kept else None
    for slide_id in sorted({*kept, *added}):
        if slide_id in added:
            job, changes = added[slide_id]
            slide = open_slide(Records([job.part]), 0)
            yield replace(slide, **changes) if changes else slide
        else:
            yield open_slide(existing, existing.position(slide_id))
