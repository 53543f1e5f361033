"""Conversion of slides or feature files to a folder of records: on one machine, in a job array, or on Apache Beam.

Every slide is processed in a separate process, or only read there if the encoder owns the devices (`device_pipeline`),
and first becomes a small record in `OUT/.parts`; when all of a shard's slides are finished, the shard is assembled from
them. An interrupted run thus loses only the slides in progress, a shard is written atomically, and its content depends
on neither workers nor tasks nor runner.
"""

import importlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.assembly import Assembly
from data_prep.device_batches import check_encoder
from data_prep.device_pipeline import DevicePipeline
from data_prep.encoders import load_encoder, runs_on_device
from data_prep.jobs import Job, Outcome, import_slide, layout, mask_slide, prepare_slide, try_encoder, worker_died
from data_prep.majority import MajorityVote
from data_prep.mask_files import remove_masks
from data_prep.mask_sheet import masked_slides, write_sheet
from data_prep.plan import Plan, make_plan
from data_prep.pool import run_each
from data_prep.recipe import claim_recipe, release_recipe, write_imported_recipe
from data_prep.report import Report, grouped
from data_prep.settings import ImportSettings, PrepareSettings, RecordsSettings, check_together
from data_prep.shards import Progress, amend, remove
from data_prep.slide_files import find_slides
from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.feature_format import slide_id_of
from pathflip_jax.data.readers.formats import finds_coords
from pathflip_jax.data.records.index import read_index
from pathflip_jax.data.records.records import finish_folder, manifest_hash, write_shard
from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.files import Place, as_path, make_folder
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.runtime.limits import processors
from pathflip_jax.vision.recipes import RECIPES

_PREPARE, _IMPORT = PrepareSettings(), ImportSettings()
_Runner = Callable[[Sequence[Job]], Generator[tuple[Job, Outcome | None]]]  # of jobs, in the order in which they end


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
    if runs_on_device(settings.encoder) and settings.beam is None:
        return _prepare_on_devices(slides, {as_path(out): settings})[0]
    if settings.batch_size is not None:
        where = "on Beam" if runs_on_device(settings.encoder) else f"with encoder {settings.encoder!r}"
        raise ValueError(f"--batch-size {settings.batch_size}: has no effect {where}; leave it out")
    plan = _slides_plan(find_slides(slides), out, settings)
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
    return _with_sheet(plan, _run(plan, prepare_slide, settings), settings)


def prepare_several(
    slides: Path | str | Sequence[Path | str], out: Place | str, settings: Sequence[PrepareSettings]
) -> dict[str, Report]:
    """Turn slide files into records of several encoders, each in the folder OUT/ENCODER, in one pass over the slides.

    A slide is opened once; encoders with the same patches share them, and those of other patch sizes are read block by
    block beside them. A slide that a folder already has is read for the others alone. Returns the report of each
    encoder; one encoder alone is prepared as by `prepare`, in OUT. Everything else as there.

    Raises ValueError for settings that differ in more than encoder and patches (`settings.check_together`), and for
    encoders that do not run on the devices of this process.
    """
    if len(settings) == 1:
        return {settings[0].encoder: prepare(slides, out, settings[0])}
    check_together(settings)
    if others := [one.encoder for one in settings if not runs_on_device(one.encoder)]:
        raise ValueError(
            f"--encoder {', '.join(others)}: several encoders are prepared together where all of them run on the "
            "devices of one process; run the command once for each of the others, with an --out of its own"
        )
    reports = _prepare_on_devices(slides, {as_path(out) / one.encoder: one for one in settings})
    return {one.encoder: report for one, report in zip(settings, reports, strict=True)}


def _prepare_on_devices(
    slides: Path | str | Sequence[Path | str], settings: Mapping[Place, PrepareSettings]
) -> list[Report]:
    """Prepare slides with encoders that live in this process, each in its folder."""
    common = next(iter(settings.values()))
    if common.beam is not None:
        raise ValueError("--beam prepares one encoder at a time; pass one --encoder, or run without Beam")
    found = find_slides(slides)
    plans = [_slides_plan(found, out, one) for out, one in settings.items()]
    encoders = {}
    for plan, one in zip(plans, settings.values(), strict=True):
        if one.shard == (0, 1):
            release_recipe(plan.out)
        if plan.jobs:
            encoder = encoders[one.encoder] = load_encoder(one.encoder, one.half, one.batch_size, one.weights)
            claim_recipe(plan.out, encoder, plan.settings)
            check_encoder(encoder, one.patch_size)
    if common.strict and any(plan.failed or plan.absent for plan in plans):
        return [_stopped(plan) for plan in plans]
    for plan in plans:
        _begin(plan)
    pipeline = DevicePipeline(encoders, _workers(common))
    progress = _run_here(plans, pipeline.run, common.strict)
    reports = [replace(_finish(*each), device=pipeline.usage) for each in zip(plans, progress, strict=True)]
    return [_with_sheet(plans[0], reports[0], common), *reports[1:]]


def _slides_plan(slides: tuple[dict[str, Path], list[Failure]], out: Place | str, settings: PrepareSettings) -> Plan:
    """Plan of `prepare`, whose jobs know files and the reader, to which a folder of records is not tied."""
    plan = _plan(slides, out, settings, settings.of_records())
    masks = settings.tissue_from and Path(settings.tissue_from).absolute()
    how = {"weights": settings.weights, "reader": settings.reader, "masks": masks}
    recipe = RECIPES.get(settings.encoder)
    if recipe and (settings.patch_size, settings.mpp) != (recipe.patch_size, recipe.mpp):
        plan.notes.append(
            f"patches are {settings.patch_size} px at {settings.mpp:g} um per px, {recipe.name} was trained on "
            f"{recipe.patch_size} px at {recipe.mpp:g}: its features may be weaker; for its own patches, leave out "
            "--patch-size and --mpp"
        )
    missing = {path: [replace(job, **how) for job in own] for path, own in plan.missing.items()}
    return replace(plan, missing=missing, finished=[replace(job, **how) for job in plan.finished])


def _with_sheet(plan: Plan, report: Report, settings: PrepareSettings) -> Report:
    """Report of a run after drawing the sheet of its masks, if one is wanted.

    Slides that an earlier version prepared get their masks first. A job array draws once its last task has ended.
    """
    if settings.sheet is None:
        return report
    masked = masked_slides(plan.out)
    without = [job for job in plan.finished if job.slide_id not in masked]
    outcomes = run_each(mask_slide, without, _workers(settings))
    bad = [(job.slide_id, outcome.error) for job, outcome in outcomes if outcome is not None and outcome.error]
    notes = [f"{slide}: no mask for --sheet: {error}" for slide, error in bad]
    if not report.finished and settings.shard != (0, 1):
        return replace(report, notes=[*report.notes, *notes, "--sheet is drawn by the task that completes the folder"])
    written = [info.slide_id for path in plan.shards if path.exists() for info in read_index(path).slides]
    files = write_sheet(plan.out, written, Path(settings.sheet))
    more = f" to {files[-1].name}" if len(files) > 1 else ""
    return replace(report, notes=[*report.notes, *notes, f"tissue masks drawn in {files[0]}{more}"])


def import_features(folder: Path | str, out: Place | str, settings: ImportSettings = _IMPORT) -> Report:
    """Turn the feature files below a folder into records; their formats are `data/readers/formats.py:FORMATS`.

    A folder of bare .pt files, with no coordinates in or beside them, is cut by `scan`. The majority of slides
    determines the cohort's encoder, feature width and physical patch size. Everything else as in `prepare`.
    """
    found = find_feature_files(folder)
    files = {slide_id_of(path): path for path in found.files}
    bare = settings.cut == "grid" and not any(map(finds_coords, files.values()))
    kept = settings.of_records() | ({"cut": "scan"} if bare else {})
    plan = _plan((files, found.unreachable), out, settings, kept)
    plan.notes.extend(found.notes)
    if bare:
        kinds = ", ".join(sorted({path.suffix.lower() for path in files.values()}))
        plan.notes.append(
            f"{kinds} files have no coordinates, in them or beside them: their regions are runs of patches in stored "
            "order (scan), and grounding refuses them"
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
        return _stopped(plan)
    _begin(plan)
    if settings.beam is None:
        (progress,) = _run_here([plan], lambda jobs: run_each(work, jobs, _workers(settings)), settings.strict)
    else:
        from data_prep.beam import run_on_beam

        progress = run_on_beam(plan, work, settings.beam) if plan.jobs else Progress()
    return _finish(plan, progress)


def _workers(settings: RecordsSettings) -> int:
    return settings.workers or processors()


def _stopped(plan: Plan) -> Report:
    plan.notes.append("stopped before the first slide, because of the bad slides (--strict)")
    write_json(_failures(plan), [failure._asdict() for failure in [*plan.failed, *plan.absent]], indent=1)
    return Report(plan.out, [], plan.skipped, [*plan.failed, *plan.absent], False, plan.notes)


def _begin(plan: Plan) -> None:
    make_folder(plan.parts)
    _amend(plan)


def _amend(plan: Plan) -> None:
    """Apply changes that need no slide: remove slides, rename cases, and close gaps in the shard numbers."""
    for path, change in plan.amendments.items():
        remove_masks(plan.out, change.gone)
        amend(path, change.gone, change.cases, plan.settings)
    for path in plan.own_shards:
        if path not in plan.missing and not path.exists():  # its slides were removed before they were finished
            write_shard(path, [], **layout(plan.settings))


def _run_here(plans: Sequence[Plan], run: _Runner, strict: bool) -> list[Progress]:
    """Run the jobs of plans for the same slides on this machine, and assemble shards as they are complete."""
    # While it is imported, it replaces `__import__` for all threads, and those of worker processes import something.
    importlib.import_module("tensorflow_datasets.proto")
    assemblies = [Assembly(plan) for plan in plans]
    jobs = [job for assembly in assemblies for job in assembly.jobs]
    assembly_of = {str(job.part): assembly for assembly in assemblies for job in assembly.jobs}
    total = sum(len(plan.skipped) + len(plan.jobs) for plan in plans)
    bar = tqdm(total=total, initial=total - len(jobs), unit="slide", desc="slides to records")
    start, patches = time.perf_counter(), 0
    with bar, closing(run(jobs)) as results:
        for job, outcome in results:
            outcome = outcome or worker_died(job)
            if outcome.fatal:
                raise OSError(outcome.error)
            patches += outcome.timings.patches
            bar.set_postfix_str(f"{patches / (time.perf_counter() - start):.0f} patches/s", refresh=False)
            bar.update()
            assembly = assembly_of[str(job.part)]
            assembly.take(job, outcome, strict)
            if assembly.progress.failed and strict:
                assembly.plan.notes.append("stopped at the first bad slide (--strict)")
                break
    return [assembly.progress for assembly in assemblies]


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
