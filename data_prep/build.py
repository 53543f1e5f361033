"""Slides or feature files in, a folder of records out: on one machine, as a task of a job array, or on Apache Beam.

Every slide is worked in a process of its own and first becomes a small record in `OUT/.parts`; when all of
a shard's slides are through, the shard is put together from them. So an interrupted run loses the slides under way and
nothing else, a shard appears whole or not at all, and what is in it depends on neither workers nor tasks nor runner.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_prep.jobs import Effort, Job, Outcome, ended, import_slide, prepare_slide, try_encoder
from data_prep.plan import Plan, make_plan, slide_files, write_json
from data_prep.pool import cores, run_each
from data_prep.shards import Progress, assemble, first_through, remove
from pathflip_jax.data.failures import Failure, list_failures
from pathflip_jax.data.feature_files import find_feature_files
from pathflip_jax.data.features import slide_id_of
from pathflip_jax.data.index import read_index
from pathflip_jax.data.records import finish_folder
from pathflip_jax.data.regions import EDGE_UM
from pathflip_jax.data.storage import Place, as_path, make_folder
from pathflip_jax.data.text import some


@dataclass(frozen=True)
class Report:
    """What a run did: slides `done` now, `skipped` because their record was there, `failed`; `finished` when the
    folder is complete (of a job array, when the last task is through); `effort`, what the slides took."""

    folder: Place
    done: list[str]
    skipped: list[str]
    failed: list[Failure]
    finished: bool
    notes: list[str] = field(default_factory=list)
    effort: Effort = Effort()

    @property
    def exit_code(self) -> int:
        """0, or 1 when slides failed."""
        return 1 if self.failed else 0

    def summary(self) -> str:
        """What to tell the user at the end, failures by name."""
        counts = f"slides written {len(self.done)}, there before {len(self.skipped)}, failed {len(self.failed)}"
        lines = [f"{self.folder}: {counts}", *self.notes]
        if not self.finished and not self.failed:
            lines.append("other tasks of the job array have shards to write; the last one finishes the folder")
        if self.effort.patches:
            lines.append(self.effort.summary())
        if self.failed:
            lines.append("not in the records (all are listed in failures.json there):")
            lines += list_failures(self.failed)
        return "\n".join(lines)


def prepare(
    slides: Path | str | Sequence[Path | str],
    out: Place | str,
    *,
    encoder: str = "stain_texture",
    patch_size: int = 256,
    mpp: float = 0.5,
    assume_mpp: float | None = None,
    min_tissue: float = 0.25,
    keep_ink: bool = False,
    half: bool = False,
    cut: str = "grid",
    edge_um: float = EDGE_UM,
    shard: tuple[int, int] = (0, 1),
    slides_per_shard: int = 32,
    workers: int | None = None,
    strict: bool = False,
    slides_table: Place | str | None = None,
    beam: Sequence[str] | None = None,
) -> Report:
    """Turn slide files into records: tissue, patches of `patch_size` pixels at `mpp`, features, regions.

    `slides` is a folder (searched below, too), a file or a list of files; a slide's id is its file name without
    the extension. `assume_mpp` is for slides that do not tell their level-0 resolution; `min_tissue` the tissue share
    of a patch; `keep_ink` takes pen for tissue, for stains that look like it; `half` lets networks compute in half
    precision. `shard` = (i, n) does the i-th of n shares, for job arrays. `workers` processes share this machine
    (default: one for each core) and its GPUs. `slides_table` (columns slide_id and case_id or patient_id) names the
    cases. A second run does only what is missing, failed slides included. A bad slide is reported, in
    `OUT/failures.json` too, and the rest goes on; `strict` stops at the first. `beam` has Apache Beam spread the work,
    with these options of its (`data_prep.beam`).

    Raises ValueError for settings that cannot be, for slide ids that occur twice, and for a folder that was begun with
    other settings or slides; FileNotFoundError for no slides; OSError on a full disk.
    """
    if patch_size < 1 or not 0 < mpp < 1e3 or not 0 <= min_tissue <= 1:
        raise ValueError(
            f"patch_size={patch_size}, mpp={mpp}, min_tissue={min_tissue}: expected a size and a resolution above 0 "
            "and a share from 0 to 1"
        )
    settings = {
        "command": "prepare", "encoder": encoder, "half": half, "patch_size": patch_size, "mpp": mpp,
        "assume_mpp": assume_mpp, "min_tissue": min_tissue, "keep_ink": keep_ink or None, "cut": cut,
        "edge_um": edge_um,
    }  # fmt: skip
    _check_spreading(beam, shard, strict)
    plan = make_plan(
        slide_files(slides), as_path(out), settings, shard=shard, slides_per_shard=slides_per_shard, sharing=workers,
        slides_table=slides_table,
    )  # fmt: skip
    if plan.jobs and beam is None:  # the machines of a cluster try it themselves: this one may not have the weights
        ((_, outcome),) = run_each(try_encoder, plan.jobs[:1], 1)
        if outcome is None:
            raise ValueError(f"encoder {encoder!r}: its process died while it was loaded; is there memory for it?")
        if outcome.error:
            raise ValueError(outcome.error)
    return _run(plan, prepare_slide, workers, strict, beam)


def import_features(
    folder: Path | str,
    out: Place | str,
    *,
    patch_size: int | None = None,
    mpp: float | None = None,
    encoder: str | None = None,
    cut: str = "grid",
    edge_um: float = EDGE_UM,
    shard: tuple[int, int] = (0, 1),
    slides_per_shard: int = 32,
    workers: int | None = None,
    strict: bool = False,
    slides_table: Place | str | None = None,
    beam: Sequence[str] | None = None,
) -> Report:
    """Turn the feature files of CLAM, TRIDENT, SlideChat or STAMP below a folder into records.

    `patch_size` (level-0 pixels), `mpp` (level 0) and `encoder` are for what the files do not say. A folder of
    bare .pt files has no coordinates and is cut by `scan`. Everything else as in `prepare`.
    """
    files = {slide_id_of(path): path for path in find_feature_files(folder).files}
    bare = cut == "grid" and all(path.suffix.lower() == ".pt" for path in files.values())
    settings = {
        "command": "import", "patch_size": patch_size, "mpp": mpp, "encoder": encoder,
        "cut": "scan" if bare else cut, "edge_um": edge_um,
    }  # fmt: skip
    _check_spreading(beam, shard, strict)
    plan = make_plan(
        files, as_path(out), settings, shard=shard, slides_per_shard=slides_per_shard, sharing=workers,
        slides_table=slides_table,
    )  # fmt: skip
    if bare:
        plan.notes.append(
            ".pt files have no coordinates: their regions are runs of stored patches (scan), and grounding refuses"
        )
    return _run(plan, import_slide, workers, strict, beam)


def _check_spreading(beam: Sequence[str] | None, shard: tuple[int, int], strict: bool) -> None:
    if beam is not None and (strict or shard != (0, 1)):
        raise ValueError(
            "--beam goes with neither --shard nor --strict: the runner shares the slides out, and no task knows how "
            "the others fare; leave these out (bad slides are listed, and the exit code is 1)"
        )


def _run(
    plan: Plan, work: Callable[[Job], Outcome], workers: int | None, strict: bool, beam: Sequence[str] | None
) -> Report:
    make_folder(plan.parts)
    if beam is None:
        progress = _run_here(plan, work, workers or cores(), strict)
    else:
        from data_prep.beam import run_on_beam

        progress = run_on_beam(plan, work, beam) if plan.jobs else Progress()
    return _finish(plan, progress)


def _run_here(plan: Plan, work: Callable[[Job], Outcome], workers: int, strict: bool) -> Progress:
    """Do the jobs in processes of this machine, and put shards together, in order, as their last slide is through."""
    progress, reference = Progress(), plan.reference
    left = {path: {job.slide_id for job in own if not job.part.exists()} for path, own in plan.missing.items()}
    jobs = [job for job in plan.jobs if job.slide_id in left[job.shard]]
    shards = deque(left)
    total = len(plan.skipped) + len(plan.jobs)
    bar = tqdm(total=total, initial=total - len(jobs), unit="slide", desc="slides to records")

    def assemble_whole() -> None:
        nonlocal reference
        while shards and not left[shards[0]]:  # in order: the first slide of all says what the cohort is
            own = plan.missing[shards.popleft()]
            reference = reference or first_through(own)
            progress.add(assemble(own, reference))

    assemble_whole()
    with bar, closing(run_each(work, jobs, workers)) as results:
        for job, outcome in results:
            outcome = outcome or ended(job)
            if outcome.fatal:
                raise OSError(outcome.error)
            progress.count(job, outcome)
            if outcome.error and strict:
                plan.notes.append("stopped at the first bad slide (--strict)")
                break
            bar.update()
            left[job.shard].remove(job.slide_id)
            assemble_whole()
    return progress


def _finish(plan: Plan, progress: Progress) -> Report:
    """List what failed, and make the folder a data set when its last shard stands."""
    out, notes, failed = plan.out, plan.notes, sorted(progress.failed)
    unfit = {failure.slide for failure in failed}
    for job in plan.jobs:
        if job.slide_id in unfit:
            remove(job.part)
    task, tasks = plan.task
    whole = all(path.exists() for path in plan.shards)
    own = out / ("failures.json" if tasks == 1 else f"failures-{task:05d}-of-{tasks:05d}.json")
    write_json(own, [failure._asdict() for failure in failed])
    if whole and tasks > 1:
        lists = sorted(out.glob(f"failures-*-of-{tasks:05d}.json"))
        write_json(out / "failures.json", [row for path in lists for row in json.loads(path.read_bytes())])
    infos = [info for path in plan.shards if path.exists() for info in read_index(path).slides]
    unknown = [info.slide_id for info in infos if info.cut == "grid" and not info.mpp]
    if unknown:
        notes.append(
            f"slides that do not tell their mpp: {len(unknown)} ({some(unknown)}); their regions are 16 patches "
            "wide, whatever that is in micrometres; pass --mpp where it is known"
        )
    if whole and infos and (progress.done or not (out / "manifest.json").exists()):
        finish_folder(out, edge_um=plan.settings["edge_um"])
    if plan.parts.is_dir() and not any(plan.parts.iterdir()):
        plan.parts.rmdir()
    finished = whole and bool(infos)
    return Report(out, sorted(progress.done), plan.skipped, failed, finished, notes, progress.effort)
