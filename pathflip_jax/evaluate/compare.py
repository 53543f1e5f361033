"""Paired comparison of evaluations of the same slides, with published figures of the same protocol.

The inputs are folders of `pathflip evaluate`: scores.json and the tables with a row for every slide or text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.storage.json_values import json_object
from pathflip_jax.evaluate import report
from pathflip_jax.evaluate.published import published
from pathflip_jax.evaluate.task import Task
from pathflip_jax.evaluate.units import Evaluation, Units
from pathflip_jax.scores import statistics


def compare(folders: Sequence, out, *, seed: int = 0, command: Sequence[str] | None = None) -> dict:
    """Compare evaluations with the first of them, and write compare.json and compare.html into `out`.

    Scores that one of them lacks are left out and listed. Raises ValueError for evaluations of different slides, texts
    or labels, and for evaluations without a common score. Returns the content of compare.json.
    """
    if len(folders) < 2:
        raise ValueError("a comparison needs at least two evaluations; pass two or more folders of scores")
    found = [read_evaluations(folder) for folder in folders]
    parts = [name for name in found[0] if all(name in other for other in found)]
    rows, left_out = [], sorted({name for one in found for name in one} - set(parts))
    for part in parts:
        evaluations = [one[part] for one in found]
        tables = [_readers(evaluation) for evaluation in evaluations]
        for name, (task, _) in tables[0].items():
            if all(name in table for table in tables):
                units = [table[name][1]() for table in tables]
                rows += _compare_score(part, task, name, evaluations, units, seed)
        known = {name for table in tables for name in table}
        left_out += [
            " ".join(filter(None, (part, *map(str, name)))) for name in known - set.intersection(*map(set, tables))
        ]
    if not rows:
        raise ValueError(f"{', '.join(map(str, folders))}: no score in common; evaluate them on the same tasks")
    result = {
        "evaluations": [str(folder) for folder in folders],
        "names": _names([Path(folder) for folder in folders]),
        "interval": f"95%, bootstrap by patient, {statistics.DRAWS} draws, seed {seed}",
        "rows": rows,
        "left_out": sorted(left_out),
        "warnings": sorted({w for one in found for e in one.values() for w in e.scores.get("warnings", [])}),
        "versions": report.versions(),
        "command": list(command) if command is not None else None,
    }
    return _write(Path(out), report.without_nan(result))


def _names(folders: list[Path]) -> list[str]:
    """The names of the evaluations on the page: the last parts of their folders if these differ."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def read_evaluations(folder) -> dict[str, Evaluation]:
    """The evaluations of a folder: itself, named "", or those of a benchmark file by their names.

    Raises FileNotFoundError for a folder without scores.json.
    """
    folder = Path(folder)
    if (folder / "scores.json").exists():
        return {"": _read(folder)}
    found = {path.parent.name: _read(path.parent) for path in sorted(folder.glob("*/scores.json"))}
    if not found:
        raise FileNotFoundError(f"{folder}: no scores.json; expected a folder that `pathflip evaluate --out` wrote")
    return found


def _read(folder: Path) -> Evaluation:
    return Evaluation(folder, json_object(folder / "scores.json", (folder / "scores.json").read_bytes()))


def _readers(evaluation: Evaluation) -> dict[tuple, tuple[Task, Callable[[], Units]]]:
    """The scores of an evaluation that can be compared, by name, with their tasks and readers."""
    tasks = report.scored_tasks(evaluation.scores)
    return {name: (task, read) for task in tasks for name, read in task.paired(evaluation).items()}


def _compare_score(
    part: str, task: Task, name: tuple, evaluations: list[Evaluation], units: list[Units], seed: int
) -> list[dict]:
    """One row per metric of a score: the value of each evaluation and its difference to the first."""
    for evaluation, other in zip(evaluations[1:], units[1:], strict=True):
        _check_same(evaluations[0], evaluation, name, units[0], other)
    weights = statistics.patient_weights(units[0].patients, seed=seed)
    rows = []
    words = [str(word).replace("_", " ") for word in name[1:]]
    heading = task.heading([word for word in (part, task.title, *words) if word])
    for metric in [known for known in units[0].metrics if all(known in one.metrics for one in units)]:
        values = [statistics.mean_over_runs(one.metrics[metric]) for one in units]
        row = {"part": part, "task": list(name), "heading": heading, "metric": metric}
        row["name"] = task.metric_names.get(metric, metric.replace("_", " "))
        row["units"] = len(units[0].keys)
        row["patients"] = len(set(units[0].patients))
        row["values"] = [statistics.interval(value, weights)._asdict() for value in values]
        row["differences"] = []
        for value in values[1:]:
            change = statistics.difference(value, values[0])
            row["differences"].append(
                statistics.interval(change, weights)._asdict() | {"p": statistics.p_value(change, weights)}
            )
        row["published"] = published(evaluations[0].scores, name, metric)
        rows.append(row)
    return rows


def _check_same(first: Evaluation, second: Evaluation, task: tuple, ours: Units, theirs: Units) -> None:
    """Raise ValueError for evaluations of different slides or texts, and for different labels of the same ones."""
    apart = set(ours.keys) ^ set(theirs.keys)
    if apart:
        names = preview(sorted({key[0] for key in apart}))
        raise ValueError(
            f"{first.folder} and {second.folder} scored different slides in {' '.join(task)} ({len(apart)} are in "
            f"only one of them: {names}); evaluate both on the same split"
        )
    if ours.keys != theirs.keys:
        raise ValueError(
            f"{first.folder} and {second.folder} scored {' '.join(task)} in different orders; evaluate both on the "
            "same table"
        )
    other = [key[0] for key, a, b in zip(ours.keys, ours.truth, theirs.truth, strict=True) if a != b]
    if other:
        raise ValueError(
            f"{first.folder} and {second.folder} differ in the ground truth of {preview(other)} in {' '.join(task)} "
            "(label, concepts or gallery); evaluate both on the same table, under the same protocol"
        )


def _write(out: Path, result: dict) -> dict:
    """Write compare.json and compare.html atomically."""
    out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault(row["heading"], []).append(row)
    page = (
        report.environment()
        .get_template("compare.html")
        .render(found=result, groups=groups, command=report.command_line(result["command"]))
    )
    write_json(out / "compare.json", result, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_file(out / "compare.html") as file:
        file.write(page.encode())
    return result
