"""Build plan: the slides of each shard, and those without a record yet.

A folder of records is tied to its settings from the start, so that a second run, another task of a job array or another
runner resumes the same build and never mixes two. Its slides may change: new ones fill the last shard and further ones,
finished slides stay in their shards.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.jobs import Job
from data_prep.plan_file import FILLS, OVERRIDE, PARTS, Entry, fills, read_plan, write_plan
from data_prep.shards import outdated, remove
from data_prep.slide_table import SlideTable, read_table
from pathflip_jax.data.readers.features import case_of
from pathflip_jax.data.records.cohort import Cohort, majority_cohort, traits_of
from pathflip_jax.data.records.columns import SlideInfo
from pathflip_jax.data.records.index import read_index
from pathflip_jax.data.records.records import is_shard, shard_name
from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.files import Place, make_folder

_NUMBER = re.compile(r"(\d+)\.tfrecord$")


@dataclass(frozen=True)
class Amendment:
    """Changes of a finished shard that need no slide to be read again: slides removed, cases renamed."""

    gone: set[str] = field(default_factory=set)
    cases: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Work of a build, or of one task of it.

    `shards` are those of the folder. `missing` maps the shards of this task, `task` = (i, n), to the slides that they
    lack, in order; `skipped` are the ids of the slides that they have, and `finished` their jobs. `cohort` holds the
    common traits of the slides in shards, None where there are none. `failed` are slides that cannot be read at all,
    `absent` rows of the slide table without a file.
    """

    out: Place
    settings: dict[str, Any]
    task: tuple[int, int]
    shards: list[Place]
    missing: dict[Place, list[Job]]
    skipped: list[str]
    cohort: Cohort | None
    amendments: dict[Place, Amendment]
    failed: list[Failure]
    absent: list[Failure]
    notes: list[str]
    finished: list[Job] = field(default_factory=list)

    @property
    def parts(self) -> Place:
        """Folder of finished slides whose shard is not finished."""
        return self.out / PARTS

    @property
    def jobs(self) -> list[Job]:
        """Slides that this task must process."""
        return [job for jobs in self.missing.values() for job in jobs]

    @property
    def own_shards(self) -> list[Place]:
        """Shards that this task writes."""
        task, tasks = self.task
        return self.shards[task::tasks]


@dataclass(frozen=True)
class _Slides:
    """State of the slides: their current `files`, those `written` to shards, and the previous plan (`before`)."""

    files: dict[str, Path]
    written: dict[str, SlideInfo]
    before: dict[str, Entry]
    table: SlideTable | None
    settings: dict[str, Any]
    prune: bool


def make_plan(
    slides: tuple[dict[str, Path], list[Failure]],
    out: Place,
    settings: dict[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
    slides_per_shard: int = 32,
    sharing: int | None = None,
    slides_table: Place | str | None = None,
    prune: bool = False,
) -> Plan:
    """Plan the work that a folder of records still needs for `slides`: slide id to file, and those that cannot be read.

    `sharing` worker processes share a machine (`Job`); `prune` removes the records of slides that are not among
    `slides`. Raises ValueError for impossible numbers, for a slide table of other slides and for a folder that was
    started with other settings.
    """
    task, tasks = shard
    if not 0 <= task < tasks or slides_per_shard < 1 or (sharing is not None and sharing < 1):
        raise ValueError(
            f"shard={shard}, slides_per_shard={slides_per_shard}, workers={sharing}: expected a shard i, n with 0 <= "
            "i < n, and slides_per_shard and workers of at least 1"
        )
    files, failed = slides
    make_folder(out)
    every = settings | {"slides_per_shard": slides_per_shard}
    before, written = read_plan(out, every), _written_slides(out)
    others = {*written, *(failure.slide for failure in failed)} - files.keys()
    table = None if slides_table is None else read_table(slides_table, sorted(files), sorted(others))
    known = _Slides(files, written, before, table, settings, prune)
    entries = _entries(known, slides_per_shard)
    for slide in files.keys() & before.keys():
        if (before[slide].mpp, before[slide].given) != (entries[slide].mpp, entries[slide].given):
            remove(_part(out, slide))  # written by an interrupted run with other options
    write_plan(out, every, entries, files if prune else {*files, *written})
    shards = [out / shard_name(number) for number in range(max((e.shard for e in entries.values()), default=0) + 1)]
    jobs = {path: [] for path in shards}
    for slide, entry in sorted(entries.items()):
        if slide in files:
            place = (files[slide], shards[entry.shard], _part(out, slide))
            mpp = entry.mpp or settings.get(OVERRIDE)
            jobs[shards[entry.shard]].append(Job(slide, entry.case, *place, settings, sharing, mpp))
    due = {job.slide_id for own in jobs.values() for job in own if _is_due(job, written)}
    own = {path: jobs[path] for path in shards[task::tasks]}
    like = [info for slide, info in written.items() if slide not in due and (slide in files or not prune)]
    return Plan(
        out,
        settings,
        shard,
        shards,
        {path: todo for path, of in own.items() if (todo := [job for job in of if job.slide_id in due])},
        sorted(job.slide_id for of in own.values() for job in of if job.slide_id not in due),
        majority_cohort([traits_of(info) for info in like]) if like else None,
        {path: change for path in own if (change := _amendment(path, known, entries)) != Amendment()},
        failed[task::tasks],
        table.absent[task::tasks] if table else [],
        [*(table.notes if table else []), *_changes(known, entries, due)],
        [job for of in own.values() for job in of if job.slide_id not in due],
    )


def _part(out: Place, slide: str) -> Place:
    return out / PARTS / f"{slide}.tfrecord"


def _is_due(job: Job, written: dict[str, SlideInfo]) -> bool:
    info = written.get(job.slide_id)
    return info is None or outdated(info, job.mpp, job.settings)


def _written_slides(out: Place) -> dict[str, SlideInfo]:
    """Slides in the shards of a folder."""
    paths = sorted(path for path in out.glob("*.tfrecord") if is_shard(path.name) and _NUMBER.search(path.name))
    return {info.slide_id: info for path in paths for info in read_index(path).slides}


def _entries(known: _Slides, slides_per_shard: int) -> dict[str, Entry]:
    """Plan entry of each slide: in its present shard, else where it was planned, else after the others.

    A function of the folder and the slides alone, so that all tasks of a job array derive the same plan.
    """
    shards = {slide: known.before[slide].shard for slide in known.files if slide in known.before}
    shards |= {slide: int(_NUMBER.search(info.shard.name)[1]) for slide, info in known.written.items()}
    sizes = Counter(shards.values())
    last = max(shards.values(), default=0)
    for slide in sorted(known.files.keys() - shards.keys()):
        while sizes[last] >= slides_per_shard:
            last += 1
        shards[slide] = last
        sizes[last] += 1
    given, entries = fills(known.settings), {}
    for slide, number in shards.items():
        old = known.before.get(slide, Entry(number))
        case, mpp = old.case, old.mpp
        if known.table is not None and slide in known.files:  # without a table, the earlier values still apply
            case, mpp = known.table.cases.get(slide) or case_of(slide), known.table.mpp.get(slide)
        info = known.written.get(slide)
        stays = info is not None and not outdated(info, mpp or known.settings.get(OVERRIDE), known.settings)
        entries[slide] = Entry(number, case, mpp, old.given if stays else given)
    return entries


def _amendment(path: Place, known: _Slides, entries: dict[str, Entry]) -> Amendment:
    """Changes of a finished shard."""
    own = [slide for slide, info in known.written.items() if info.shard == path]
    gone = {slide for slide in own if known.prune and slide not in known.files}
    return Amendment(gone, {slide: entries[slide].case for slide in own if _is_moved(slide, known, entries)})


def _is_moved(slide: str, known: _Slides, entries: dict[str, Entry]) -> bool:
    """Whether the case in a slide's record differs from the slide table's."""
    return slide in known.files and entries[slide].case not in ("", known.written[slide].case_id)


def _changes(known: _Slides, entries: dict[str, Entry], due: set[str]) -> list[str]:
    """Notes on a folder whose slides, cases or resolutions have changed since it was started."""
    notes, written = [], sorted(known.written)
    if gone := [slide for slide in written if slide not in known.files]:
        what = "removed from the records" if known.prune else "kept; pass `--prune` to remove them"
        notes.append(f"slides in the records that are not among those given: {len(gone)} ({preview(gone)}); {what}")
    if moved := [slide for slide in written if _is_moved(slide, known, entries)]:
        notes.append(f"slides whose case has changed: {len(moved)} ({preview(moved)}); updated in the records")
    if anew := [slide for slide in written if slide in due]:
        notes.append(f"slides whose given resolution has changed: {len(anew)} ({preview(anew)}); processed again")
    present = [slide for slide in written if slide in known.files and slide not in due]
    if kept := [slide for slide in present if _has_earlier_value(slide, known, entries[slide])]:
        notes.append(
            f"slides processed with another resolution, patch size or encoder in the options: {len(kept)} "
            f"({preview(kept)}); kept as they are; to process a slide again, give a new mpp in the slide table"
        )
    return notes


def _has_earlier_value(slide: str, known: _Slides, entry: Entry) -> bool:
    """Whether a record holds a value from an option or the slide table that this run would not give."""
    info, now = known.written[slide], fills(known.settings)
    for name, field_name in FILLS.get(known.settings.get("command", ""), {}).items():
        old = entry.given.get(name)
        if old is not None and old != now.get(name) and getattr(info, field_name) in (old, _float32(old)):
            return True
    before = known.before[slide].mpp if slide in known.before else None
    before = entry.given.get(OVERRIDE) if before is None else before
    return before is not None and entry.mpp is None and now.get(OVERRIDE) is None


def _float32(value: Any) -> Any:
    """Number as stored in records."""
    return float(np.float32(value)) if isinstance(value, float) else value
