"""Slides or feature files in, a folder of records out: on one machine, or as one task of a job array.

Every slide is worked in a process of its own and first becomes a small record in `OUT/.parts`; when all of
a shard's slides are through, the shard is put together from them. So an interrupted run loses the slides under way and
nothing else, a shard appears whole or not at all, and what is in it depends on neither workers nor tasks.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.jobs import Job, Outcome, import_slide, prepare_slide, region_cut, try_encoder
from data_prep.pool import run_each
from data_prep.tiling import SLIDE_SUFFIXES, one_per_series
from pathflip_jax.data.failures import Failure, list_failures
from pathflip_jax.data.features import find_feature_files, slide_id_of
from pathflip_jax.data.index import check_cohort, index_path, read_index
from pathflip_jax.data.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.data.regions import EDGE_UM
from pathflip_jax.data.storage import Place, as_path, make_folder
from pathflip_jax.data.text import clean_id, read_slide_table, some
from pathflip_jax.data.tfrecord import whole_file

_UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


@dataclass(frozen=True)
class Report:
    """What a run did: slides `done` now, `skipped` because their record was there, `failed`; `finished` when the
    folder is complete (of a job array, when the last task is through)."""

    folder: Place
    done: list[str]
    skipped: list[str]
    failed: list[Failure]
    finished: bool
    notes: list[str] = field(default_factory=list)

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
    half: bool = False,
    cut: str = "grid",
    edge_um: float = EDGE_UM,
    shard: tuple[int, int] = (0, 1),
    slides_per_shard: int = 32,
    workers: int | None = None,
    strict: bool = False,
    slides_table: Place | str | None = None,
) -> Report:
    """Turn slide files into records: tissue, patches of `patch_size` pixels at `mpp`, features, regions.

    `slides` is a folder (searched below, too), a file or a list of files; a slide's id is its file name without
    the extension. `assume_mpp` is for slides that do not tell their level-0 resolution; `min_tissue` the tissue share
    of a patch; `half` lets networks compute in half precision. `shard` = (i, n) does the i-th of n shares, for job
    arrays. `slides_table` (columns slide_id and case_id or patient_id) names the cases. A second run does only
    what is missing, failed slides included. A bad slide is reported, in `OUT/failures.json` too, and the rest goes
    on; `strict` stops at the first. Raises ValueError for settings that cannot be, for slide ids that occur twice, and
    for a folder that was begun with other settings or slides; FileNotFoundError for no slides; OSError on a full disk.
    """
    if patch_size < 1 or not 0 < mpp < 1e3 or not 0 <= min_tissue <= 1:
        raise ValueError(
            f"patch_size={patch_size}, mpp={mpp}, min_tissue={min_tissue}: expected a size and a resolution above 0 "
            "and a share from 0 to 1"
        )
    settings = {
        "command": "prepare", "encoder": encoder, "half": half, "patch_size": patch_size, "mpp": mpp,
        "assume_mpp": assume_mpp, "min_tissue": min_tissue, "cut": cut, "edge_um": edge_um,
    }  # fmt: skip
    build = _Build(_slide_files(slides), as_path(out), settings, shard, slides_per_shard, workers, strict, slides_table)
    if build.jobs:
        ((_, outcome),) = run_each(try_encoder, [settings], 1)
        if outcome is None:
            raise ValueError(f"encoder {encoder!r}: its process died while it was loaded; is there memory for it?")
        if outcome.error:
            raise ValueError(outcome.error)
    return build.run(prepare_slide)


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
) -> Report:
    """Turn the feature files of CLAM, TRIDENT, SlideChat or STAMP below a folder into records.

    `patch_size` (level-0 pixels), `mpp` (level 0) and `encoder` are for what the files do not say. A folder of
    bare .pt files has no coordinates and is cut by `scan`. Everything else as in `prepare`.
    """
    files = {slide_id_of(path): path for path in find_feature_files(folder)}
    bare = cut == "grid" and all(path.suffix.lower() == ".pt" for path in files.values())
    settings = {
        "command": "import", "patch_size": patch_size, "mpp": mpp, "encoder": encoder,
        "cut": "scan" if bare else cut, "edge_um": edge_um,
    }  # fmt: skip
    build = _Build(files, as_path(out), settings, shard, slides_per_shard, workers, strict, slides_table)
    if bare:
        build.notes.append(
            ".pt files have no coordinates: their regions are runs of stored patches (scan), and grounding refuses"
        )
    return build.run(import_slide)


class _Build:
    """One task of a build: its shards, the slides still missing from them, and what became of those."""

    def __init__(
        self,
        files: dict[str, Path],
        out: Place,
        settings: dict[str, Any],
        shard: tuple[int, int],
        slides_per_shard: int,
        workers: int | None,
        strict: bool,
        slides_table: Place | str | None,
    ) -> None:
        task, tasks = shard
        if not 0 <= task < tasks or slides_per_shard < 1 or (workers is not None and workers < 1):
            raise ValueError(
                f"shard={shard}, slides_per_shard={slides_per_shard}, workers={workers}: expected 0 <= i < n and "
                "numbers of at least 1"
            )
        self.out, self.shard, self.workers, self.strict = out, shard, workers or os.cpu_count() or 1, strict
        self.settings, self.notes = settings, []
        ids = sorted(files)
        cases = _cases(ids, slides_table, self.notes)
        _claim(out, settings | {"slides_per_shard": slides_per_shard}, {slide: cases.get(slide, "") for slide in ids})
        groups = [ids[start : start + slides_per_shard] for start in range(0, len(ids), slides_per_shard)]
        self.all_shards = [out / shard_name(number) for number in range(len(groups))]
        self.shards = dict(list(zip(self.all_shards, groups, strict=True))[task::tasks])
        self.parts = out / ".parts"
        there = [info for path in self.shards if path.exists() for info in read_index(path).slides]
        self.skipped = [info.slide_id for info in there]
        self.reference = there[0] if there else None
        known = set(self.skipped)
        self.jobs = [
            Job(
                slide_id=slide,
                case_id=cases.get(slide, ""),
                file=files[slide],
                shard=path,
                part=self.parts / f"{slide}.tfrecord",
                settings=settings,
                workers=self.workers,
            )
            for path, slides in self.shards.items()
            for slide in slides
            if slide not in known
        ]
        self.done: list[str] = []
        self.failed: list[Failure] = []

    def run(self, work: Callable[[Job], Outcome]) -> Report:
        """Do the jobs, put shards together as their last slide is through, and finish the folder if it is whole."""
        make_folder(self.parts)
        jobs = [job for job in self.jobs if not job.part.exists()]
        left = {path: {job.slide_id for job in jobs if job.shard == path} for path in self.shards}
        for path in [path for path, slides in left.items() if not slides]:
            self._assemble(path)
        total = len(self.skipped) + len(self.jobs)
        bar = tqdm(total=total, initial=total - len(jobs), unit="slide", desc="slides to records")
        with bar, closing(run_each(work, jobs, self.workers)) as results:
            for job, outcome in results:
                if outcome is None:
                    cure = "the file crashes its reader, or memory ran out: look at it, or use fewer workers"
                    outcome = Outcome(f"{job.file}: the worker process died; {cure}")
                if outcome.fatal:
                    raise OSError(outcome.error)
                if outcome.error:
                    self.failed.append(Failure(job.slide_id, str(job.file), outcome.error))
                    if self.strict:
                        self.notes.append("stopped at the first bad slide (--strict)")
                        break
                bar.update()
                left[job.shard].remove(job.slide_id)
                if not left[job.shard]:
                    self._assemble(job.shard)
        return self._finish()

    def _assemble(self, path: Place) -> None:
        """Write a shard from what is in it already and the parts that are through, unless nothing is new."""
        jobs = [job for job in self.jobs if job.shard == path and job.part.exists() and self._belongs(job)]
        if path.exists() and not jobs:
            return
        sources = {job.slide_id: Records([job.part]) for job in jobs}
        if path.exists() and read_index(path).slides:
            old = Records([path])
            sources |= {info.slide_id: old for info in old.slides}
        write_shard(
            path,
            (sources[slide].read(sources[slide].position(slide)) for slide in self.shards[path] if slide in sources),
            **region_cut(self.settings),
        )
        for job in jobs:
            _remove(job.part)
            self.done.append(job.slide_id)

    def _belongs(self, job: "Job") -> bool:
        """Whether a slide is of one cohort with the first one; else it has failed."""
        info = dataclasses.replace(read_index(job.part).slides[0], shard=job.file)
        self.reference = self.reference or info
        try:
            check_cohort([self.reference, info] if info.slide_id != self.reference.slide_id else [info])
        except ValueError as error:
            self.failed.append(Failure(job.slide_id, str(job.file), str(error)))
            _remove(job.part)
            return False
        return True

    def _finish(self) -> Report:
        task, tasks = self.shard
        self.failed.sort()
        whole = all(path.exists() for path in self.all_shards)
        own = self.out / ("failures.json" if tasks == 1 else f"failures-{task:05d}-of-{tasks:05d}.json")
        _write_json(own, [failure._asdict() for failure in self.failed])
        if whole and tasks > 1:
            lists = sorted(self.out.glob(f"failures-*-of-{tasks:05d}.json"))
            _write_json(self.out / "failures.json", [row for path in lists for row in json.loads(path.read_bytes())])
        infos = [info for path in self.all_shards if path.exists() for info in read_index(path).slides]
        unknown = [info.slide_id for info in infos if info.cut == "grid" and not info.mpp]
        if unknown:
            self.notes.append(
                f"slides that do not tell their mpp: {len(unknown)} ({some(unknown)}); their regions are 16 patches "
                "wide, whatever that is in micrometres; pass --mpp where it is known"
            )
        if whole and infos and (self.done or not (self.out / "manifest.json").exists()):
            finish_folder(self.out, edge_um=self.settings["edge_um"])
        if self.parts.is_dir() and not any(self.parts.iterdir()):
            self.parts.rmdir()
        return Report(self.out, sorted(self.done), sorted(self.skipped), self.failed, whole and bool(infos), self.notes)


def _remove(part: Place) -> None:
    part.unlink()
    index_path(part).unlink(missing_ok=True)


def _slide_files(slides: Path | str | Sequence[Path | str]) -> dict[str, Path]:
    """Slide id to file, of a folder and those below it, of a file or of a list."""
    if isinstance(slides, (str, Path)) and Path(slides).is_dir():
        paths = [path for path in sorted(Path(slides).rglob("*")) if path.suffix.lower() in SLIDE_SUFFIXES]
        paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]
        if not paths:
            raise FileNotFoundError(f"{slides}: no slides in it or below ({' '.join(SLIDE_SUFFIXES)})")
        paths = one_per_series(paths)
    else:
        paths = [Path(slides)] if isinstance(slides, (str, Path)) else [Path(path) for path in slides]
        absent = [path for path in paths if not path.is_file()]
        if absent or not paths:
            raise FileNotFoundError(f"{some(absent) or 'an empty list'}: no such slide or folder of slides")
    files: dict[str, Path] = {}
    for path in paths:
        other = files.setdefault(path.stem, path)
        if other != path:
            raise ValueError(
                f"{other} and {path} have one slide id, {path.stem}: texts are matched to slides by id; rename one, or "
                "prepare them in two folders"
            )
    return files


def _cases(slide_ids: Sequence[str], table: Place | str | None, notes: list[str]) -> dict[str, str]:
    """Slide id to the case that the table gives it. Raises ValueError when the table knows none of the slides."""
    if table is None:
        return {}
    rows = {row["slide_id"].lower(): row["case_id"] for row in read_slide_table(table)}
    short = {_UUID.sub("", name): case for name, case in rows.items()}
    names = {slide: clean_id(slide).lower() for slide in slide_ids}
    cases = {}
    for slide, name in names.items():
        case = rows.get(name) or short.get(_UUID.sub("", name))
        if case is not None:
            cases[slide] = case
    if not cases:
        raise ValueError(
            f"{table}: none of its {len(rows)} slide ids is among the {len(slide_ids)} slides; it has {some(rows)}, "
            f"the slides are {some(slide_ids)}; slide ids are file names without the extension"
        )
    absent = [slide for slide in slide_ids if slide not in cases]
    if absent:
        notes.append(f"slides that are not in {table}: {len(absent)} ({some(absent)}); their ids name their cases")
    return cases


def _claim(out: Place, settings: dict[str, Any], cases: dict[str, str]) -> None:
    """Tie a folder to its settings and slides, so that a second run continues the first and never mixes two."""
    make_folder(out)
    path, plan = out / "plan.json", {"settings": settings, "cases": cases}
    begun = any(out.glob("*.tfrecord*")) or any(out.glob(".parts/*.tfrecord"))
    if not begun:
        _write_json(path, plan)
        return
    if not path.exists():
        raise ValueError(f"{out} holds records that were not begun by this command; choose another --out")
    try:
        found = json.loads(path.read_bytes())
        before, slides = found["settings"], found["cases"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a plan of records ({error!r}); choose another --out") from None
    changed = [
        f"{name} {before.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if set(cases) != set(slides):
        new, gone = sorted(set(cases) - set(slides)), sorted(set(slides) - set(cases))
        changed += [f"slides added: {len(new)} ({some(new)})"] if new else []
        changed += [f"slides gone: {len(gone)} ({some(gone)})"] if gone else []
    elif cases != slides:
        moved = [slide for slide in cases if cases[slide] != slides[slide]]
        changed.append(f"slides with another case: {len(moved)} ({some(moved)})")
    if changed:
        raise ValueError(
            f"{out} was begun with other settings or slides: {'; '.join(changed)}. Give what it was begun with, or "
            "another --out"
        )


def _write_json(path: Place, content: Any) -> None:
    with whole_file(path) as out:
        out.write((json.dumps(content, indent=1) + "\n").encode())
