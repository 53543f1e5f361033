"""Evaluations side by side: the same slides, paired bootstrap, and published rows where the protocol matches.

It reads what `pathflip evaluate` wrote: scores.json and a row of every slide or text in the tables beside it.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.storage.failures import some
from pathflip_jax.data.storage.json_values import json_object
from pathflip_jax.data.texts.tables import read_rows
from pathflip_jax.evaluate import report, summary
from pathflip_jax.evaluate.published import published
from pathflip_jax.evaluate.tasks import few_shot
from pathflip_jax.evaluate.tasks import map_scores as grounding
from pathflip_jax.scores import retrieval
from pathflip_jax.scores import statistics as scores

GROUNDING = {"auc": "ROC AUC of patches", "pointing": "Pointing game", "dice": "Dice"}
CLASSIFICATION = ("balanced_accuracy", "accuracy", "auc", "weighted_f1")


class Evaluation(NamedTuple):
    """A folder that `pathflip evaluate` wrote."""

    folder: Path
    scores: dict

    def rows(self, table: str) -> list[dict]:
        """The rows of a table. Raises FileNotFoundError for one that is missing."""
        path = self.folder / f"{table}.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, although scores.json speaks of it; evaluate anew")
        return [row.values for row in read_rows(path)]


class Units(NamedTuple):
    """What is scored in an evaluation: its slides or texts by key, their patients, and a statistic for each metric."""

    keys: list[tuple]
    patients: list[str]
    truth: list[str]
    metrics: dict[str, list[scores.Statistic]]  # over runs and seeds, in the order of `keys`


def compare(folders: Sequence, out, *, seed: int = 0, command: Sequence[str] | None = None) -> dict:
    """Compare evaluations with the first of them, and write compare.json and compare.html into `out`.

    Scores that one of them lacks are left out and named. Raises ValueError for evaluations of other slides, texts or
    labels, and for those that have no score in common. Returns what compare.json holds.
    """
    if len(folders) < 2:
        raise ValueError("one evaluation has nothing to be compared with; name at least two folders of scores")
    found = [read_evaluations(folder) for folder in folders]
    parts = [name for name in found[0] if all(name in other for other in found)]
    rows, left_out = [], sorted({name for one in found for name in one} - set(parts))
    for part in parts:
        evaluations = [one[part] for one in found]
        tables = [_tasks(evaluation) for evaluation in evaluations]
        for task in tables[0]:
            if all(task in table for table in tables):
                rows += _compare_task(part, task, evaluations, [table[task] for table in tables], seed)
        known = {task for table in tables for task in table}
        left_out += [
            " ".join(filter(None, (part, *map(str, task)))) for task in known - set.intersection(*map(set, tables))
        ]
    if not rows:
        raise ValueError(f"{', '.join(map(str, folders))}: have no score in common; evaluate them on the same tasks")
    result = {
        "evaluations": [str(folder) for folder in folders],
        "names": _names([Path(folder) for folder in folders]),
        "interval": f"95%, bootstrap by patient, {scores.DRAWS} draws, seed {seed}",
        "rows": rows,
        "left_out": sorted(left_out),
        "warnings": sorted({w for one in found for e in one.values() for w in e.scores.get("warnings", [])}),
        "versions": report.versions(),
        "command": list(command) if command is not None else None,
    }
    return _write(Path(out), report.without_nan(result))


def _names(folders: list[Path]) -> list[str]:
    """What the evaluations are called on the page: their folders' last names, where these are different."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def read_evaluations(folder) -> dict[str, Evaluation]:
    """The evaluations of a folder: itself, named "", or those of a file of tasks by their names.

    Raises FileNotFoundError for a folder with no scores.json in it.
    """
    folder = Path(folder)
    if (folder / "scores.json").exists():
        return {"": _read(folder)}
    found = {path.parent.name: _read(path.parent) for path in sorted(folder.glob("*/scores.json"))}
    if not found:
        raise FileNotFoundError(
            f"{folder}: no scores.json in it; expected a folder that `pathflip evaluate --out` wrote"
        )
    return found


def _read(folder: Path) -> Evaluation:
    return Evaluation(folder, json_object(folder / "scores.json", (folder / "scores.json").read_bytes()))


def _tasks(evaluation: Evaluation) -> dict[tuple, Callable[[], Units]]:
    """How to read every score of an evaluation, by its name: (task, and what tells it apart)."""
    found: dict[tuple, Callable[[], Units]] = {}
    if "zero_shot" in evaluation.scores:
        found["zero_shot", evaluation.scores["zero_shot"]["task"]] = lambda: _classified(evaluation, "predictions", {})
    for task, table, directions in (
        ("retrieval", "ranks", summary.DIRECTIONS),
        ("region_retrieval", "region_ranks", summary.REGION_DIRECTIONS),
    ):
        for direction in directions if task in evaluation.scores else ():
            found[task, direction] = lambda table=table, direction=direction: _ranked(evaluation, table, direction)
    for block in evaluation.scores.get("few_shot", []):
        for probe, by_shots in block["probes"].items():
            for shots in by_shots if probe != few_shot.FLOOR else ():  # which no run has a part in
                chosen = {"probe": probe, "shots": shots}
                found["few_shot", block["label"], probe, shots] = lambda table=block["figures"], chosen=chosen: (
                    _classified(evaluation, table, chosen)
                )
    if "grounding" in evaluation.scores:
        found["grounding",] = lambda: _grounded(evaluation)
    return found


def _by_run(rows: list[dict], columns: Sequence[str]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column, "") for column in columns), []).append(row)
    return found


def _classified(evaluation: Evaluation, table: str, chosen: dict[str, str]) -> Units:
    rows = [row for row in evaluation.rows(table) if all(row[name] == value for name, value in chosen.items())]
    runs = list(_by_run(rows, ("run", "seed")).values())
    runs = [sorted(run, key=lambda row: row["slide_id"]) for run in runs]
    names = [column for column in rows[0] if column.startswith("p_")]
    place = {name.removeprefix("p_"): i for i, name in enumerate(names)}
    metrics: dict[str, list] = {metric: [] for metric in CLASSIFICATION}
    for run in runs:
        labels, predicted = (np.array([place[row[name].lower()] for row in run]) for name in ("label", "predicted"))
        belief = np.array([[float(row[name]) for name in names] for row in run])
        statistics = scores.classification(labels, predicted, belief)
        for metric in CLASSIFICATION:
            metrics[metric].append(statistics[metric])
    first = runs[0]
    keys = [(row["slide_id"],) for row in first]
    return Units(keys, [row["patient_id"] for row in first], [row["label"] for row in first], metrics)


def _ranked(evaluation: Evaluation, table: str, direction: str) -> Units:
    runs = list(_by_run(evaluation.rows(table), ("run",)).values())
    metrics: dict[str, list] = {f"R@{k}": [] for k in retrieval.RECALLS} | {"median_rank": []}
    for run in runs:
        above, tied, gallery = (
            np.array([int(row[name]) for row in run]) for name in (f"{direction}_above", f"{direction}_tied", "gallery")
        )
        ranks = retrieval.Ranks(above, tied, gallery - 1)
        for k in retrieval.RECALLS:
            metrics[f"R@{k}"].append(scores.mean(retrieval.recall(ranks, k)))
        metrics["median_rank"].append(scores.median(retrieval.expected_rank(ranks)))
    seen: Counter = Counter()
    keys = []
    for row in runs[0]:  # texts of one slide are told apart by their order
        keys.append((row["slide_ids"], str(seen[row["slide_ids"]])))
        seen[row["slide_ids"]] += 1
    return Units(keys, [row["patient_id"] for row in runs[0]], [row["gallery"] for row in runs[0]], metrics)


def _grounded(evaluation: Evaluation) -> Units:
    runs = list(_by_run(evaluation.rows("grounding"), ("run",)).values())
    slides = [_by_run(sorted(run, key=lambda row: (row["slide_id"], row["concept"])), ("slide_id",)) for run in runs]
    first = slides[0].values()
    metrics = {}
    for metric in grounding.METRICS:
        known = [[[row[metric] for row in rows if row[metric]] for rows in one.values()] for one in slides]
        if any(values for one in known for values in one):  # Dice needs training slides, which may have no outlines
            means = [[np.mean(np.array(values, float)) if values else np.nan for values in one] for one in known]
            metrics[metric] = [scores.mean(values) for values in means]
    concepts = ["+".join(row["concept"] for row in rows) for rows in first]
    return Units(list(slides[0]), [rows[0]["patient_id"] for rows in first], concepts, metrics)


def _compare_task(part: str, task: tuple, evaluations: list[Evaluation], readers: list, seed: int) -> list[dict]:
    units = [read() for read in readers]
    for evaluation, other in zip(evaluations[1:], units[1:], strict=True):
        _check_same(evaluations[0], evaluation, task, units[0], other)
    weights = scores.patient_weights(units[0].patients, seed=seed)
    rows = []
    for metric in [name for name in units[0].metrics if all(name in one.metrics for one in units)]:
        statistics = [scores.mean_over_runs(one.metrics[metric]) for one in units]
        row = {"part": part, "task": list(task), "heading": _heading(part, task), "metric": metric}
        names = GROUNDING if task[0] == "grounding" else report.METRICS
        row["name"] = names.get(metric, metric.replace("_", " "))
        row["units"] = len(units[0].keys)
        row["patients"] = len(set(units[0].patients))
        row["values"] = [scores.interval(statistic, weights)._asdict() for statistic in statistics]
        row["differences"] = []
        for statistic in statistics[1:]:
            change = scores.difference(statistic, statistics[0])
            row["differences"].append(
                scores.interval(change, weights)._asdict() | {"p": scores.p_value(change, weights)}
            )
        row["published"] = published(evaluations[0].scores, task, metric)
        rows.append(row)
    return rows


def _heading(part: str, task: tuple) -> str:
    """A score's name for people: "zero-shot, TCGA-RCC"."""
    kind = {"zero_shot": "zero-shot", "few_shot": "few-shot", "region_retrieval": "retrieval of regions"}
    words = [part, kind.get(task[0], task[0]), *(str(name).replace("_", " ") for name in task[1:])]
    return ", ".join(filter(None, words)) + (" shots" if task[0] == "few_shot" else "")


def _check_same(first: Evaluation, second: Evaluation, task: tuple, ours: Units, theirs: Units) -> None:
    """Raise ValueError where two evaluations scored other slides or texts, or the same by other labels."""
    apart = set(ours.keys) ^ set(theirs.keys)
    if apart:
        names = some(sorted({key[0] for key in apart}))
        raise ValueError(
            f"{first.folder} and {second.folder} scored different slides in {' '.join(task)} ({len(apart)} are in one "
            f"of them only: {names}); evaluate both on the same split"
        )
    if ours.keys != theirs.keys:
        raise ValueError(
            f"{first.folder} and {second.folder} scored {' '.join(task)} in another order; evaluate both on one table"
        )
    other = [key[0] for key, a, b in zip(ours.keys, ours.truth, theirs.truth, strict=True) if a != b]
    if other:
        raise ValueError(
            f"{first.folder} and {second.folder} differ in what is true of {some(other)} in {' '.join(task)} (label, "
            "concepts or gallery); evaluate both on the same table, under the same protocol"
        )


def _write(out: Path, result: dict) -> dict:
    """Write compare.json and compare.html; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault(row["heading"], []).append(row)
    page = (
        report.environment()
        .get_template("compare.html")
        .render(found=result, groups=groups, command=report.command_line(result["command"]))
    )
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in (("compare.json", text), ("compare.html", page)):
        partial = out / f"{name}.part"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, out / name)
    return result
