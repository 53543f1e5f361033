"""Scores of the benchmark's runs, read back from what `pathflip evaluate` wrote, and the table of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.storage.json_files import read_json
from pathflip_jax.evaluate.prompt_files import read_prompts
from pathflip_jax.evaluate.task import Task
from pathflip_jax.evaluate.tasks import few_shot, grounding, retrieval, zero_shot, zero_shot_windows
from pathflip_jax.evaluate.units import Evaluation, Units, classified_units, group_rows
from pathflip_jax.scores import concepts, statistics
from pathflip_jax.scores.statistics import Statistic
from real_tissue_parts import baselines
from real_tissue_parts.intervals import Scored, by_case
from real_tissue_parts.mosaics import MASKS
from real_tissue_parts.steps import Places

COLUMNS = {
    "grounding": "grounding AUC",
    "grounding_masks": "grounding AUC, masks",
    "zero_shot": "zero-shot balanced accuracy",
    "zero_shot_windows": "by windows",
    "retrieval": "R@5",
    "few_shot": "linear probe balanced accuracy",
    "concepts": "captions' concept F1",
}
UNIT = (0.0, 1.0)  # bounds of every column's scores
WITH, WITHOUT, GAIN = "with region loss", "without region loss", "gain of the region loss"
NO_TEXT, MEAN_COLOUR, CHANCE, FEATURES = "no text", baselines.MEAN_COLOUR, "chance", "mean patch feature"
Statistics = dict[str, list[Statistic]]  # of each column, over runs


class Scores(NamedTuple):
    """The scores of the runs with and without the region loss by seed, and those of baselines."""

    runs: dict[str, Statistics]
    baselines: dict[str, Statistics]
    chance: dict[str, float]
    cases: list[list[str]]
    classes: dict[str, dict[str, int]]  # slides and cases of each class


def read_evaluation(folder: Path, slide_ids: Sequence[str]) -> dict[str, Statistic]:
    """The statistic of each column that an evaluation scored, over the slides in order."""
    evaluation = Evaluation(folder, read_json(folder / "scores.json"))
    found = evaluation.scores
    directions = [_ordered(units(), slide_ids) for units in retrieval.TASK.paired(evaluation).values()]
    statistic = {
        "grounding": read_grounding(folder, slide_ids),
        **{task.key: _classified(task, evaluation, slide_ids) for task in (zero_shot.TASK, zero_shot_windows.TASK)},
        "retrieval": statistics.mean_over_runs([units.metrics["R@5"][0] for units in directions]),
        "few_shot": _probe(evaluation, few_shot.LINEAR, slide_ids),
    }
    if "language" in found:
        statistic["concepts"] = concept_f1(folder, slide_ids, "written")
    return statistic


def read_run(
    places: Places, seed: int, kind: str, slide_ids: Sequence[str]
) -> tuple[dict[str, Statistic], dict[str, dict[str, Statistic]]]:
    """The statistics of one run by column, and of the baselines of its evaluations by name and column."""
    folder, masked = places.scores(seed, kind), places.scores(seed, kind, MASKS)
    found, blind = read_evaluation(folder, slide_ids), read_blind(folder, slide_ids)
    if masked.is_dir():
        found["grounding_masks"] = read_grounding(masked, slide_ids)
        for name, one in blind_grounding(masked, slide_ids).items():
            blind[name]["grounding_masks"] = one
    return found, blind


def add(rows: dict[str, Statistics], found: Mapping[str, Mapping[str, Statistic]]) -> None:
    """Add the statistics of one more run to rows and columns."""
    for name, columns in found.items():
        for column, one in columns.items():
            rows.setdefault(name, {}).setdefault(column, []).append(one)


def read_grounding(folder: Path, slide_ids: Sequence[str]) -> Statistic:
    """The ROC AUC of patches of an evaluation."""
    (spots,) = grounding.TASK.paired(Evaluation(folder, {})).values()
    return _ordered(spots(), slide_ids).metrics["auc"][0]


def blind_grounding(folder: Path, slide_ids: Sequence[str]) -> dict[str, Statistic]:
    """The ROC AUC of maps without text and of mean colour."""
    rows = group_rows(Evaluation(folder, {}).rows("grounding"), ("slide_id",))
    found = {}
    for name, column in ((NO_TEXT, "no_text_auc"), (MEAN_COLOUR, "mean_colour_auc")):
        if column in next(iter(rows.values()))[0]:
            values = [np.array([float(row[column]) for row in rows[slide,]]) for slide in slide_ids]
            found[name] = statistics.mean(np.array([own.mean() for own in values]))
    return found


def read_blind(folder: Path, slide_ids: Sequence[str]) -> dict[str, dict[str, Statistic]]:
    """The statistics of an evaluation's own baselines, by name and column."""
    evaluation = Evaluation(folder, read_json(folder / "scores.json"))
    found: dict[str, dict[str, Statistic]] = {FEATURES: {"few_shot": _probe(evaluation, few_shot.FLOOR, slide_ids)}}
    found |= {name: {"grounding": one} for name, one in blind_grounding(folder, slide_ids).items()}
    if "language" in evaluation.scores:
        found[NO_TEXT]["concepts"] = concept_f1(folder, slide_ids, "text_only")
    return found


def read_chance(folder: Path) -> dict[str, float]:
    """The expected scores of a random answer."""
    found = read_json(folder / "scores.json")
    both = [block["all"]["R@5"]["chance"] for block in found["retrieval"].values()]
    classes = len(found["zero_shot"]["classes"])
    return {
        "grounding": 0.5,
        "grounding_masks": 0.5,
        "zero_shot": 1 / classes,
        "zero_shot_windows": 1 / classes,
        "retrieval": float(np.mean(both)),
        "few_shot": 1 / classes,
    }


def _classified(task: Task, evaluation: Evaluation, slide_ids: Sequence[str]) -> Statistic:
    """The balanced accuracy of a zero-shot classification."""
    (units,) = task.paired(evaluation).values()
    return _ordered(units(), slide_ids).metrics["balanced_accuracy"][0]


def _probe(evaluation: Evaluation, probe: str, slide_ids: Sequence[str]) -> Statistic:
    """A probe's balanced accuracy at the most shots, mean over draws."""
    block = evaluation.scores["few_shot"][0]
    units = classified_units(evaluation, block["figures"], {"probe": probe, "shots": block["shots"][-1]})
    return statistics.mean_over_runs(_ordered(units, slide_ids).metrics["balanced_accuracy"])


def _ordered(units: Units, slide_ids: Sequence[str]) -> Units:
    """The units, whose order must be that of the slides: their statistics take weights in it."""
    found = [key[0] for key in units.keys]
    if found != list(slide_ids):
        raise ValueError(f"{len(found)} slides were scored, from {found[0]}: expected {len(slide_ids)} in order")
    return units


def concept_f1(folder: Path, slide_ids: Sequence[str], column: str) -> Statistic:
    """F1 of the concepts that captions assert against those of the reports."""
    finder = concepts.Finder(read_prompts(folder.parent.parent / "slides" / "concepts.json").classes)
    rows = {row["slide_ids"]: row for row in Evaluation(folder, {}).rows("captions")}
    asserted = [concepts.asserted(finder(rows[slide][column])) for slide in slide_ids]
    truth = [concepts.asserted(finder(rows[slide]["reference"])) for slide in slide_ids]
    right = np.array([2 * len(said & true) for said, true in zip(asserted, truth, strict=True)])
    return concepts.ratio(right, np.array([len(said) + len(true) for said, true in zip(asserted, truth, strict=True)]))


def make_table(scores: Scores) -> dict[str, dict[str, dict]]:
    """Row -> column -> {value, low, high, by_run}: runs, the paired gain, and baselines."""
    table: dict[str, dict[str, dict]] = {}
    for name, found in scores.runs.items():
        table[name] = _intervals(found, scores.cases)
    if WITHOUT in scores.runs:
        ours, others = scores.runs[WITH], scores.runs[WITHOUT]
        table[GAIN] = {
            column: by_case(ours[column], scores.cases, others[column])._asdict() for column in ours if column in others
        }
    for name, found in scores.baselines.items():
        table[name] = _intervals(found, scores.cases)
    known = {column: value for column, value in scores.chance.items() if column in scores.runs[WITH]}
    table[CHANCE] = {column: Scored(value, value, value, [value])._asdict() for column, value in known.items()}
    return table


def _intervals(found: Statistics, cases: Sequence[Sequence[str]]) -> dict[str, dict]:
    return {column: by_case(runs, cases, bounds=UNIT)._asdict() for column, runs in found.items()}


def markdown(table: Mapping[str, Mapping[str, dict]], gallery: int, split: str) -> str:
    """The table in Markdown: values with intervals, and below each row of several runs those of its seeds."""
    columns = [column for column in COLUMNS if any(column in row for row in table.values())]
    titles = [COLUMNS[column] + (f" of {gallery}, both ways" if column == "retrieval" else "") for column in columns]
    lines = [f"| {split} slides | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(column), name) for column in columns) + " |")
        runs = max((len(entry["by_run"]) for entry in row.values()), default=0)
        for number in range(runs if runs > 1 else 0):
            values = (row.get(column, {"by_run": []})["by_run"][number : number + 1] for column in columns)
            lines.append(
                f"| - run {number + 1} | " + " | ".join(f"{own[0]:.3f}" if own else "-" for own in values) + " |"
            )
    return "\n".join(lines)


def _cell(entry: Mapping | None, name: str) -> str:
    if entry is None:
        return "-"
    sign = "+" if name == GAIN else ""
    if name == CHANCE:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:{sign}.3f} ({entry['low']:{sign}.3f} to {entry['high']:{sign}.3f})"


def class_sizes(rows: Sequence[Mapping[str, str]], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Class -> slides that show it, slides labelled by it: what intervals of the class rest on."""
    return {
        name: {
            "slides": sum(name in row["classes"].split(";") for row in rows),
            "labelled": sum(row["label"] == name for row in rows),
        }
        for name in classes
    }


def median_slides(folder: Path) -> dict[str, tuple[str, float]]:
    """Class -> the slide whose grounding AUC is the median of the class's, with that AUC."""
    rows = group_rows(Evaluation(folder, {}).rows("grounding"), ("concept",))
    chosen = {}
    for (concept,), own in rows.items():
        own = sorted(own, key=lambda row: (float(row["auc"]), row["slide_id"]))
        middle = own[len(own) // 2]
        chosen[concept] = middle["slide_id"], float(middle["auc"])
    return chosen
