"""Conversion of slides or feature files to a folder of records: on one machine, in a job array, or on Apache Beam.

Every slide is processed in a separate process and first becomes a small record in `OUT/.parts`; when all of a shard's
slides are finished, the shard is assembled from them. An interrupted run thus loses only the slides in progress, a
shard is written atomically, and its content depends on neither workers nor tasks nor runner.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.jobs import Job, Outcome, import_slide, layout, prepare_slide, try_encoder, worker_died
from data_prep.majority import MajorityVote
from data_prep.plan import Plan, make_plan
from data_prep.pool import run_each
from data_prep.recipe import release_recipe, write_imported_recipe
from data_prep.report import Report, grouped
from data_prep.settings import ImportSettings, PrepareSettings, RecordsSettings
from data_prep.shards import Progress, amend, assemble, remove
from data_prep.slide_files import find_slides
from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.feature_format import slide_id_of
from pathflip_jax.data.readers.formats import format_by_extension
from pathflip_jax.data.records.index import read_index
from pathflip_jax.data.records.records import finish_folder, manifest_hash, write_shard
from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.files import Place, as_path, make_folder
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.runtime.limits import processors

_PREPARE, _IMPORT = PrepareSettings(), ImportSettings()


def prepare(
    slides: Path | str | Sequence[Path | str], out: Place | str, settings: PrepareSettings = _PREPARE
) -> Report:
    """Turn slide files into records: tissue, patches, features, regions.

    `slides` is a folder (searched with its subfolders), a file or a list of files; a slide's id is its file name
    without the extension. A second run does only what is missing, failed slides and new ones included; records of
    slides that no longer exist are kept, unless `prune` removes them. A bad slide is reported, in `OUT/failures.json`
    too, and the others continue.

    Raises ValueError for slide ids that occur twice and for a folder that was begun with other settings;
    FileNotFoundError for no slides; OSError on a full disk.
    """
    plan = _plan(find_slides(slides), out, settings, settings.of_records())
    if settings.shard == (0, 1):
        release_recipe(plan.out)
    if plan.jobs and settings.beam is None:  # cluster machines test the encoder: this one may lack its weights
        ((_, outcome),) = run_each(try_encoder, plan.jobs[:1], 1)
        if outcome is None:
            raise ValueError(
                f"encoder {settings.encoder!r}: the worker process died while loading it; check "
                "that there is enough memory"
            )
        if outcome.error:
            raise ValueError(outcome.error)
    return _run(plan, prepare_slide, settings)


def import_features(folder: Path | str, out: Place | str, settings: ImportSettings = _IMPORT) -> Report:
    """Turn the feature files below a folder into records; their formats are `data/readers/formats.py:FORMATS`.

    A folder of bare .pt files has no coordinates and is cut by `scan`. The majority of slides determines the cohort's
    encoder, feature width and physical patch size. Everything else as in `prepare`.
    """
    found = find_feature_files(folder)
    files = {slide_id_of(path): path for path in found.files}
    bare = settings.cut == "grid" and not any(format_by_extension(path).has_coords for path in files.values())
    kept = settings.of_records() | ({"cut": "scan"} if bare else {})
    plan = _plan((files, found.unreachable), out, settings, kept)
    plan.notes.extend(found.notes)
    if bare:
        kinds = ", ".join(sorted({path.suffix.lower() for path in files.values()}))
        plan.notes.append(
            f"{kinds} files have no coordinates: their regions are runs of patches in stored order (scan), and "
            "grounding refuses them"
        )
    return _run(plan, import_slide, settings)


def _plan(
    slides: tuple[dict[str, Path], list[Failure]], out: Place | str, settings: RecordsSettings, kept: dict[str, Any]
) -> Plan:
    return make_plan(
        slides, as_path(out), kept, shard=settings.shard, slides_per_shard=settings.slides_per_shard,
        sharing=settings.workers, slides_table=settings.slides_table, prune=settings.prune,
    )  # fmt: skip


def _run(plan: Plan, work: Callable[[Job], Outcome], settings: RecordsSettings) -> Report:
    if settings.strict and (plan.failed or plan.absent):
        plan.notes.append("stopped before the first slide, because of the bad slides (--strict)")
        write_json(_failures(plan), [failure._asdict() for failure in [*plan.failed, *plan.absent]], indent=1)
        return Report(plan.out, [], plan.skipped, [*plan.failed, *plan.absent], False, plan.notes)
    make_folder(plan.parts)
    _amend(plan)
    if settings.beam is None:
        progress = _run_here(plan, work, settings.workers or processors(), settings.strict)
    else:
        from data_prep.beam import run_on_beam

        progress = run_on_beam(plan, work, settings.beam) if plan.jobs else Progress()
    return _finish(plan, progress)


def _amend(plan: Plan) -> None:
    """Apply changes that need no slide: remove slides, rename cases, and close gaps in the shard numbers."""
    for path, change in plan.amendments.items():
        amend(path, change.gone, change.cases, plan.settings)
    for path in plan.own_shards:
        if path not in plan.missing and not path.exists():  # its slides were removed before they were finished
            write_shard(path, [], **layout(plan.settings))


def _run_here(plan: Plan, work: Callable[[Job], Outcome], workers: int, strict: bool) -> Progress:
    """Run the jobs in processes on this machine, and assemble shards in order as their last slide finishes.

    No shard is assembled before the majority of the slides is certain.
    """
    progress = Progress()
    left = {path: {job.slide_id for job in own if not job.part.exists()} for path, own in plan.missing.items()}
    jobs = [job for job in plan.jobs if job.slide_id in left[job.shard]]
    majority = MajorityVote(plan)
    majority.add(job for job in plan.jobs if job.slide_id not in left[job.shard])
    shards = deque(left)
    total = len(plan.skipped) + len(plan.jobs)
    bar = tqdm(total=total, initial=total - len(jobs), unit="slide", desc="slides to records")

    def assemble_finished() -> None:
        if not majority.is_over(outstanding=sum(map(len, left.values()))):
            return
        while shards and not left[shards[0]]:
            progress.add(assemble(plan.missing[shards.popleft()], majority.cohort))

    assemble_finished()
    with bar, closing(run_each(work, jobs, workers)) as results:
        for job, outcome in results:
            outcome = outcome or worker_died(job)
            if outcome.fatal:
                raise OSError(outcome.error)
            progress.count(job, outcome)
            bar.update()
            left[job.shard].remove(job.slide_id)
            if not (outcome.error and strict):
                majority.add([job])
                assemble_finished()
            if progress.failed and strict:
                plan.notes.append("stopped at the first bad slide (--strict)")
                break
    return progress


def _failures(plan: Plan) -> Place:
    """Path of the list of failures, of an entire run or of a task."""
    task, tasks = plan.task
    return plan.out / ("failures.json" if tasks == 1 else f"failures-{task:05d}-of-{tasks:05d}.json")


def _finish(plan: Plan, progress: Progress) -> Report:
    """List the failures, and complete the folder's data set once its last shard exists."""
    out, failed, tasks = plan.out, sorted([*plan.failed, *progress.failed]), plan.task[1]
    notes = [*plan.notes, *grouped(progress.notes)]
    unfit = {failure.slide for failure in failed}
    for job in plan.jobs:
        if job.slide_id in unfit:
            remove(job.part)
    whole = all(path.exists() for path in plan.shards)
    write_json(_failures(plan), [failure._asdict() for failure in [*failed, *plan.absent]], indent=1)
    if whole and tasks > 1:
        lists = sorted(out.glob(f"failures-*-of-{tasks:05d}.json"))
        write_json(out / "failures.json", [row for path in lists for row in json.loads(path.read_bytes())], indent=1)
    infos = [info for path in plan.shards if path.exists() for info in read_index(path).slides]
    unknown = [info.slide_id for info in infos if info.cut == "grid" and not info.mpp]
    if unknown:
        notes.append(
            f"slides of unknown mpp: {len(unknown)} ({preview(unknown)}); their regions are 16 patches wide, whatever "
            "that is in micrometres; where you know the mpp, give it with --mpp or in the column mpp of --slides"
        )
    if whole and infos and plan.settings.get("command") == "import":
        write_imported_recipe(out, infos)
    if whole and infos and _is_manifest_outdated(out):
        finish_folder(out, edge_um=plan.settings["edge_um"])
    if whole:
        MajorityVote.forget(plan)
    if plan.parts.is_dir() and not any(plan.parts.iterdir()):
        plan.parts.rmdir()
    finished = whole and bool(infos)
    return Report(out, sorted(progress.done), plan.skipped, failed, finished, notes, progress.timings, plan.absent)


def _is_manifest_outdated(out: Place) -> bool:
    """Whether the manifest of a folder is missing or does not match its shards."""
    try:
        return json.loads((out / "manifest.json").read_bytes())["sha256"] != manifest_hash(out)
    except (OSError, ValueError, KeyError, TypeError):
        return True
