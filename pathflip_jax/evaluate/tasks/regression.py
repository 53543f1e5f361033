"""Regression: ridge probe and attention MIL on the frozen model for columns of numbers, by slide.

Baselines are the mean of the training values, the ridge probe on the mean of the raw patch features, a ridge regression
on clinical columns, and permuted values.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pathflip_jax.evaluate.figures import BASE, GRID, MAIN, make_axes, set_title
from pathflip_jax.evaluate.task import Headline, LoadedRun, Part, Predictions, Setting, Task, make_headline
from pathflip_jax.evaluate.tasks import outcome_columns, outcome_probes
from pathflip_jax.evaluate.tasks.outcome_columns import Cell, Encoding, Tables
from pathflip_jax.evaluate.tasks.outcome_probes import Measured
from pathflip_jax.evaluate.units import Evaluation, Units, group_rows
from pathflip_jax.scores import statistics
from pathflip_jax.scores.regression import METRICS, permuted_regression, regression
from pathflip_jax.scores.retrieval import normalise

KEY = "regression"
RIDGE, ATTENTION, FLOOR, CLINICAL = "ridge", "attention MIL", "mean patch feature", "clinical columns"
MEAN = "training mean"
PROBES = (RIDGE, ATTENTION)
LEAST_SLIDES = 5  # with a value, in training and in the scored split, each


class Values(NamedTuple):
    """The slides of one split that have a value, with their patients."""

    ids: list[str]
    patients: list[str]
    y: Float[np.ndarray, "n"]


class Column(NamedTuple):
    """A column of numbers: its slides by side, without `val` if there is none, and the clinical columns of them."""

    name: str
    sides: dict[str, Values]
    clinical: Encoding | None
    left_out: dict[str, int]


Predicted = dict[str, Float[np.ndarray, "n"]]  # values of the scored slides, by probe


def _read(setting: Setting) -> list[Column]:
    tables, groups = outcome_columns.read_tables(setting), outcome_columns.sides(setting, KEY)
    return [read_column(setting, tables, groups, name) for name in setting.spec.regression]


def read_column(
    setting: Setting, tables: Tables, groups: Mapping[str, Mapping[str, Sequence[str]]], name: str
) -> Column:
    """The values of a column by slide; slides without one are left out and counted.

    Raises ValueError for cells that are not numbers, a constant column, and too few slides.
    """
    cells, cohort = tables.cells(name), setting.cohort
    found, left_out = {}, {}
    for side, patients in groups.items():
        pairs = [(slide, patient) for patient, slides in patients.items() for slide in slides]
        known = [(slide, patient) for slide, patient in pairs if slide in cells and cells[slide].text]
        values = [outcome_columns.parse_number(name, cells[slide]) for slide, _ in known]
        found[side] = Values([slide for slide, _ in known], [patient for _, patient in known], np.array(values, float))
        left_out[side] = len(pairs) - len(known)
    for side in ("train", cohort.split):
        _check_side(setting, name, side, found.get(side, Values([], [], np.zeros(0))))
    if lost := sum(left_out.values()):
        cohort.warnings.append(f"regression, {name}: {lost} slides have no value and are left out")
    kept = {"train": found["train"], "test": found[cohort.split]}
    if cohort.split != "val" and len(found.get("val", ((),))[0]):
        kept["val"] = found["val"]
    return Column(name, kept, _read_clinical(setting, tables, kept), left_out)


def _check_side(setting: Setting, name: str, side: str, values: Values) -> None:
    where = f"{setting.spec.label_table or setting.spec.slides}, column {name!r}"
    if len(values.ids) < LEAST_SLIDES:
        raise ValueError(
            f"{where}: {len(values.ids)} slides of split {side!r} have a value; expected at least {LEAST_SLIDES}: "
            "complete the column, or name another one"
        )
    if len(np.unique(values.y)) == 1:
        raise ValueError(
            f"{where}: constant, all {len(values.ids)} slides of split {side!r} have {values.y[0]:g}; expected values "
            "that differ, name another column"
        )


def _read_clinical(setting: Setting, tables: Tables, sides: Mapping[str, Values]) -> Encoding | None:
    if not setting.spec.clinical:
        return None
    found, nowhere = {}, Cell(tables.labels or tables.slides, "")
    for column in setting.spec.clinical:
        cells = tables.cells(column)
        found[column] = {side: [cells.get(slide, nowhere) for slide in one.ids] for side, one in sides.items()}
    return outcome_columns.encode(found)


def _embed(setting: Setting, columns: list[Column]) -> list[str]:
    return [slide for column in columns for side in column.sides.values() for slide in side.ids]


def _predict(setting: Setting, columns: list[Column], run: LoadedRun) -> list[Predicted]:
    return [_predict_column(setting, column, run) for column in columns]


def _predict_column(setting: Setting, column: Column, run: LoadedRun) -> Predicted:
    found = {}
    for probe, part in ((RIDGE, "slide"), (FLOOR, "features")):
        rows = {side: normalise(np.stack([getattr(run.bags[slide], part) for slide in one.ids]))
                for side, one in column.sides.items()}  # fmt: skip
        found[probe] = _ridge(column, rows)
    bags = {side: [run.bags[slide].regions for slide in one.ids] for side, one in column.sides.items()}
    sizes = [len(bag) for side in bags.values() for bag in side]
    how = {"settings": setting.protocol.attention, "room": (max(sizes), sum(sizes))}
    train, val = (_measured(column, bags, side) for side in ("train", "val"))
    (found[ATTENTION],) = outcome_probes.attention_value(train, val, [bags["test"]], **how)
    return found


def _ridge(column: Column, x: Mapping[str, Float[np.ndarray, "n D"]]) -> Float[np.ndarray, "n"]:
    (found,) = outcome_probes.ridge(_measured(column, x, "train"), _measured(column, x, "val"), [x["test"]])
    return found


def _measured(column: Column, x: Mapping, side: str) -> Measured | None:
    return Measured(x[side], column.sides[side].y) if side in column.sides else None


def _score(setting: Setting, columns: list[Column], predictions: Predictions) -> Part:
    blocks, pictures, rows, warnings = [], {}, {}, []
    for number, column in enumerate(columns):
        ours, theirs = ([one[number] for one in side] for side in (predictions.ours, predictions.theirs))
        key = f"{KEY}_{number + 1}"
        blocks.append(score_column(column, ours, theirs, setting.spec.seed) | {"figures": key})
        warnings += warn_if_not_above(blocks[-1])
        for place, probe in enumerate(PROBES):
            pictures[f"{key}_{place + 1}"] = scatter(column, ours[0][probe], probe)
        rows[key] = value_rows(column, predictions.runs, ours)
    return Part(blocks, pictures, rows, warnings)


def score_column(column: Column, ours: Sequence[Predicted], theirs: Sequence[Predicted], seed: int) -> dict:
    """The metrics of each probe with its gains, and those of the baselines: mean over runs, interval by patient."""
    test, train = column.sides["test"], column.sides["train"]
    weights = statistics.patient_weights(test.patients, seed=seed)
    predicted = {probe: [run[probe] for run in ours] for probe in (RIDGE, ATTENTION, FLOOR)}
    if column.clinical is not None:
        predicted[CLINICAL] = [_ridge(column, column.clinical.x)]
    predicted[MEAN] = [np.full(len(test.y), train.y.mean())]
    others = {probe: [run[probe] for run in theirs] for probe in PROBES}
    found = {probe: [regression(test.y, one) for one in runs] for probe, runs in predicted.items()}
    compared = {probe: [regression(test.y, one) for one in runs] for probe, runs in others.items()}
    baselines = [name for name in (FLOOR, CLINICAL, MEAN) if name in found]
    probes = {}
    for probe, runs in found.items():
        chance = permuted(test.y, predicted[probe], seed) if probe != MEAN else {}
        probes[probe] = {}
        for metric in METRICS:
            mine = [run[metric] for run in runs]
            entry = statistics.over_runs(mine, [run[metric] for run in compared.get(probe, ())], weights)
            if probe in PROBES:
                mean = statistics.mean_over_runs(mine)
                floors = {name: statistics.mean_over_runs([run[metric] for run in found[name]]) for name in baselines}
                changes = {name: statistics.difference(mean, other) for name, other in floors.items()}
                entry["gain"] = {name: statistics.interval(one, weights)._asdict() for name, one in changes.items()}
            if metric in chance:
                entry["permuted"] = chance[metric]
            probes[probe][metric] = entry
    sizes = {side: {"slides": len(one.ids), "patients": len(set(one.patients))} for side, one in column.sides.items()}
    return {
        "column": column.name,
        "clinical": column.clinical.names if column.clinical else [],
        "sides": sizes,
        "left_out": column.left_out,
        "chosen_on": "val" if "val" in column.sides else "nothing",
        "probes": probes,
    }


def permuted(values: Float[np.ndarray, "n"], runs: Sequence[np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """The 95% range of each metric over permuted values."""
    drawn = permuted_regression(values, runs, seed)
    ranges = {metric: np.quantile(found, [0.025, 0.975]) for metric, found in drawn.items()}
    return {metric: {"low": float(low), "high": float(high)} for metric, (low, high) in ranges.items()}


def warn_if_not_above(block: dict) -> list[str]:
    """Warnings about probes whose R2 is no better than that of the baselines, or 0."""
    found = []
    for probe in PROBES:
        gains = block["probes"][probe]["r2"]["gain"]
        if behind := [name for name, gain in gains.items() if not gain["low"] > 0]:
            found.append(
                f"regression, {block['column']}: R2 of {probe} no better than of {' and of '.join(behind)} (the 95% "
                "interval of the gain is not above 0)"
            )
    return found


def value_rows(column: Column, names: Sequence, runs: Sequence[Predicted]) -> list[dict]:
    """One row per run, probe and slide: the value and the predicted one."""
    found, test = [], column.sides["test"]
    for name, one in zip(names, runs, strict=True):
        for probe, predicted in one.items():
            for i, slide in enumerate(test.ids):
                row = {"run": name, "probe": probe, "slide_id": slide, "patient_id": test.patients[i]}
                found.append(row | {"value": float(test.y[i]), "predicted": float(predicted[i])})
    return found


def scatter(column: Column, predicted: Float[np.ndarray, "n"], probe: str) -> Figure:
    """Predicted against measured values, on equal scales, with the line of equality."""
    values = column.sides["test"].y
    figure, (axis,) = make_axes(4.4, 4.2)
    both = np.concatenate([values, predicted])
    margin = 0.04 * float(np.ptp(both))
    ends = float(both.min()) - margin, float(both.max()) + margin
    axis.plot(ends, ends, color=BASE, linewidth=1.5, linestyle=(0, (4, 2)))
    axis.scatter(values, predicted, s=18, color=MAIN, alpha=0.6, linewidths=0)
    axis.set(xlim=ends, ylim=ends, aspect="equal", xlabel=column.name, ylabel="predicted")
    axis.grid(color=GRID)
    set_title(axis, f"{column.name}: {probe}")
    return figure


def _headlines(found: dict) -> Iterator[Headline]:
    for block in found[KEY]:
        others = {"raw features": FLOOR, "clinical columns": CLINICAL, "training mean": MEAN}
        values = {shown: block["probes"][name]["r2"]["value"] for shown, name in others.items()
                  if name in block["probes"]}  # fmt: skip
        for probe in PROBES:
            yield make_headline(f"Regression: {block['column']}, {probe}: R2", block["probes"][probe]["r2"], values)


def _published(found: dict) -> Iterator[tuple[tuple, dict]]:
    for block in found[KEY]:
        for probe, metrics in block["probes"].items():
            yield (KEY, block["column"], probe), metrics


def _units(evaluation: Evaluation, table: str, probe: str) -> Units:
    """The slides of a probe as `pathflip compare` pairs them."""
    rows = [row for row in evaluation.rows(table) if row["probe"] == probe]
    runs = [sorted(run, key=lambda row: row["slide_id"]) for run in group_rows(rows, ("run",)).values()]
    values = np.array([float(row["value"]) for row in runs[0]])
    scored = [regression(values, np.array([float(row["predicted"]) for row in run])) for run in runs]
    keys, patients = [(row["slide_id"],) for row in runs[0]], [row["patient_id"] for row in runs[0]]
    metrics = {metric: [one[metric] for one in scored] for metric in METRICS}
    return Units(keys, patients, [row["value"] for row in runs[0]], metrics)


def _paired(evaluation: Evaluation) -> dict:
    return {
        (KEY, block["column"], probe): partial(_units, evaluation, block["figures"], probe)
        for block in evaluation.scores[KEY]
        for probe in PROBES
    }


TASK = Task(
    KEY,
    title="regression",
    needs="regression",
    wanted=lambda spec: bool(spec.regression),
    read=_read,
    embed=_embed,
    predict=_predict,
    score=_score,
    headlines=_headlines,
    section=Path(__file__).with_name("regression.html"),
    published=_published,
    paired=_paired,
    metric_names=METRICS,
)
