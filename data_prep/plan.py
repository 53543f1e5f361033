"""What a build has to do: which slides belong to which shard, and which of them have no record yet.

A folder of records is tied to its settings and slides from the start, so that a second run, another task of a job array
or another runner continues the first and never mixes two.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.jobs import Job
from data_prep.slide_files import find_slides
from pathflip_jax.data.index import SlideInfo, read_index
from pathflip_jax.data.records import shard_name
from pathflip_jax.data.storage import Place, make_folder
from pathflip_jax.data.text import clean_id, read_slide_table, some
from pathflip_jax.data.tfrecord import whole_file

PARTS = ".parts"  # hidden: shards are found by their suffix
_UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


@dataclass(frozen=True)
class Plan:
    """The work of a build, or of one task of it.

    `shards` are those of the folder. `missing` has the slides that the shards of this task, `task` = (i, n), lack, in
    order; `skipped` the ids of those that they have. `reference` is the first slide in a shard that stands: the cohort
    is what is like it; None where none stands.
    """

    out: Place
    settings: dict[str, Any]
    task: tuple[int, int]
    shards: list[Place]
    missing: dict[Place, list[Job]]
    skipped: list[str]
    reference: SlideInfo | None
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> Place:
        """The folder of the slides that are through while their shard is not."""
        return self.out / PARTS

    @property
    def jobs(self) -> list[Job]:
        """The slides that this task has to see to."""
        return [job for jobs in self.missing.values() for job in jobs]


def make_plan(
    files: dict[str, Path],
    out: Place,
    settings: dict[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
    slides_per_shard: int = 32,
    sharing: int | None = None,
    slides_table: Place | str | None = None,
) -> Plan:
    """Look at a folder of records and plan what it lacks of `files`, slide id to file.

    `sharing` worker processes share a machine (`Job`). Raises ValueError for numbers that cannot be, for a slide table
    of other slides and for a folder that was begun with other settings or slides.
    """
    task, tasks = shard
    if not 0 <= task < tasks or slides_per_shard < 1 or (sharing is not None and sharing < 1):
        raise ValueError(
            f"shard={shard}, slides_per_shard={slides_per_shard}, workers={sharing}: expected 0 <= i < n and numbers "
            "of at least 1"
        )
    notes: list[str] = []
    ids = sorted(files)
    cases = _cases(ids, slides_table, notes)
    _claim(out, settings | {"slides_per_shard": slides_per_shard}, {slide: cases.get(slide, "") for slide in ids})
    groups = [ids[start : start + slides_per_shard] for start in range(0, len(ids), slides_per_shard)]
    shards = [out / shard_name(number) for number in range(len(groups))]
    skipped, missing, reference = [], {}, None
    for path, slides in list(zip(shards, groups, strict=True))[task::tasks]:
        there = {info.slide_id: info for info in read_index(path).slides} if path.exists() else {}
        skipped += there
        reference = reference or next(iter(there.values()), None)
        jobs = [
            Job(slide, cases.get(slide, ""), files[slide], path, out / PARTS / f"{slide}.tfrecord", settings, sharing)
            for slide in slides
            if slide not in there
        ]
        if jobs:
            missing[path] = jobs
    return Plan(out, settings, shard, shards, missing, sorted(skipped), reference, notes)


def slide_files(slides: Path | str | Sequence[Path | str]) -> dict[str, Path]:
    """Slide id to file, of a folder and those below it, of a file or of a list."""
    return find_slides(slides)[0]


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
    begun = any(out.glob("*.tfrecord*")) or any(out.glob(f"{PARTS}/*.tfrecord"))
    if not begun:
        write_json(path, plan)
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


def write_json(path: Place, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    with whole_file(path) as out:
        out.write((json.dumps(content, indent=1) + "\n").encode())
