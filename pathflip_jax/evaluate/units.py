"""Statistics restored from the tables of an evaluation, for comparing evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.texts.tables import read_rows
from pathflip_jax.scores import statistics

METRICS = {
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "auc": "AUC (one against the rest)",
    "weighted_f1": "F1, weighted",
    "macro_f1": "F1, macro",
    "published_f1": "F1 as published",
}
CLASSIFICATION = ("balanced_accuracy", "accuracy", "auc", "weighted_f1")  # metrics that `pathflip compare` compares


class Evaluation(NamedTuple):
    """A folder that `pathflip evaluate` wrote."""

    folder: Path
    scores: dict

    def rows(self, table: str) -> list[dict]:
        """The rows of a table. Raises FileNotFoundError for one that is missing."""
        path = self.folder / f"{table}.csv"
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: missing, although scores.json refers to it; run `pathflip evaluate` again"
            )
        return [row.values for row in read_rows(path)]


class Units(NamedTuple):
    """The slides or texts that were scored, by key, with their patients, true labels and the statistics of metrics."""

    keys: list[tuple]
    patients: list[str]
    truth: list[str]
    metrics: dict[str, list[statistics.Statistic]]  # over runs and seeds, in the order of `keys`


def group_rows(rows: list[dict], columns: Sequence[str]) -> dict[tuple, list[dict]]:
    """The rows by their values in some columns."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column, "") for column in columns), []).append(row)
    return found


def classified_columns(classes: Sequence[str], probabilities: Float[np.ndarray, "C"]) -> dict[str, str | float]:
    """Columns of a classified slide, as `classified_units` reads them: predicted class and all probabilities."""
    shares = zip(classes, probabilities, strict=True)
    predicted = {"predicted": classes[int(probabilities.argmax())]}
    return predicted | {f"p_{label}": round(float(p), 6) for label, p in shares}


def classified_units(evaluation: Evaluation, table: str, chosen: dict[str, str]) -> Units:
    """The classified slides of a table, of the rows that have the `chosen` values."""
    rows = [row for row in evaluation.rows(table) if all(row[name] == value for name, value in chosen.items())]
    runs = list(group_rows(rows, ("run", "seed")).values())
    runs = [sorted(run, key=lambda row: row["slide_id"]) for run in runs]
    names = [column for column in rows[0] if column.startswith("p_")]
    place = {name.removeprefix("p_"): i for i, name in enumerate(names)}
    metrics: dict[str, list] = {metric: [] for metric in CLASSIFICATION}
    for run in runs:
        labels, predicted = (np.array([place[row[name].lower()] for row in run]) for name in ("label", "predicted"))
        probabilities = np.array([[float(row[name]) for name in names] for row in run])
        found = statistics.classification(labels, predicted, probabilities)
        for metric in CLASSIFICATION:
            metrics[metric].append(found[metric])
    first = runs[0]
    keys = [(row["slide_id"],) for row in first]
    return Units(keys, [row["patient_id"] for row in first], [row["label"] for row in first], metrics)
