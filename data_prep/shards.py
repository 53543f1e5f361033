"""A shard put together from the records of its slides: the one function that writes shards, whoever spreads the work.

It can be tried again at any moment, as cluster runners do with a task that they lost: what is written depends on the
slides alone, and a second try finds the first one's shard.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data_prep.jobs import Effort, Job, Outcome, region_cut
from pathflip_jax.data.failures import Failure
from pathflip_jax.data.index import SlideInfo, check_cohort, index_path, read_index
from pathflip_jax.data.records import Records, write_shard
from pathflip_jax.data.storage import Place


@dataclass
class Progress:
    """What has come of some slides: the ids of those that are in a shard now, those that failed, what they took."""

    done: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    effort: Effort = Effort()

    def count(self, job: Job, outcome: Outcome) -> None:
        """Add what a worker said of a slide."""
        if outcome.error:
            self.failed.append(Failure(job.slide_id, str(job.file), outcome.error))
        self.effort += outcome.effort

    def add(self, other: "Progress") -> None:
        """Add what has come of other slides."""
        self.done += other.done
        self.failed += other.failed
        self.effort += other.effort


def first_through(jobs: Sequence[Job]) -> SlideInfo | None:
    """The first of some slides that has a part, to compare the others with; None where none has."""
    return next((_info(job) for job in jobs if job.part.exists()), None)


def assemble(jobs: Sequence[Job], reference: SlideInfo | None) -> Progress:
    """Write a shard from what is in it already and the parts of the slides that it lacked, unless nothing is new.

    `jobs` are these slides, at least one; without a part where they failed. A slide that does not belong to one cohort
    with `reference` stays out, and its part stays where it is. The shard and its index appear whole or not at all, and
    only then the parts go. Returns the slides of `jobs` that are in it, and those of another cohort. Raises OSError on
    a full disk.
    """
    start, path, settings = time.perf_counter(), jobs[0].shard, jobs[0].settings
    added, failed = {}, []
    for job in jobs:
        if not job.part.exists():
            continue
        info = _info(job)
        try:
            check_cohort([reference, info] if reference and info.slide_id != reference.slide_id else [info])
        except ValueError as error:
            failed.append(Failure(job.slide_id, str(job.file), str(error)))
        else:
            added[job.slide_id] = job.part
    before = read_index(path).slides if path.exists() else ()
    if added or not path.exists():
        sources = {slide: Records([part]) for slide, part in added.items()}
        if before:
            sources |= dict.fromkeys((info.slide_id for info in before), Records([path]))
        slides = (sources[slide].read(sources[slide].position(slide)) for slide in sorted(sources))
        write_shard(path, slides, **region_cut(settings))
    for part in added.values():
        remove(part)
    there = {info.slide_id for info in before} | set(added)
    done = [job.slide_id for job in jobs if job.slide_id in there]
    return Progress(done, failed, Effort(seconds={"write": time.perf_counter() - start}))


def remove(part: Place) -> None:
    """Delete a part with its index."""
    part.unlink(missing_ok=True)
    index_path(part).unlink(missing_ok=True)


def _info(job: Job) -> SlideInfo:
    """What the index of a slide's part knows of it; its errors name the slide's own file."""
    return replace(read_index(job.part).slides[0], shard=job.file)
