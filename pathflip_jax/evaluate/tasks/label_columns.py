"""Columns of labels as few-shot tasks: classes, labelled slides of each split, and the draws of training slides."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.identity import SlideNames, fold
from pathflip_jax.data.texts.tables import read_rows
from pathflip_jax.data.texts.text import row_slides
from pathflip_jax.evaluate.cohort import Cohort

ALL = "all"
SHOTS = (1, 4, 16)


class Slides(NamedTuple):
    """The labelled slides of one split."""

    ids: list[str]
    patients: list[str]
    classes: Int[np.ndarray, "n"]


class LabelColumn(NamedTuple):
    """A column of labels: its classes, the labelled slides of each split, the numbers of unlabelled ones, and shots.

    `val` is None if there is no validation split to choose settings on.
    """

    name: str
    classes: list[str]
    train: Slides
    val: Slides | None
    test: Slides
    unlabelled: dict[str, int]
    shots: tuple[int | str, ...]
    seeds: int

    @property
    def draws(self) -> dict[tuple[int | str, int], Int[np.ndarray, "n"]]:
        """The training slides of every draw, by number of shots and seed."""
        return {(k, seed): draw_shots(self.train, k, seed) for k in self.shots for seed in range(self.seeds)}


def read_shots(given: Sequence[str | int]) -> tuple[int | str, ...]:
    """Numbers of shots in ascending order, "all" last. Raises ValueError for anything else."""
    found: list[int | str] = []
    for shots in given or SHOTS:
        if str(shots) != ALL and not (str(shots).isdigit() and int(shots) > 0):
            raise ValueError(f"few-shot {shots!r}: expected numbers of slides per class, such as 1 4 16, or {ALL!r}")
        found.append(ALL if str(shots) == ALL else int(shots))
    return tuple(sorted(set(found), key=lambda shots: float("inf") if shots == ALL else shots))


def read_column(cohort: Cohort, column: str, table, shots: Sequence[str | int], seeds: int) -> LabelColumn:
    """A column of the slide table, or of a label table by slide_id or patient_id.

    Slides without a label are left out and counted. Raises ValueError for a missing column, a label of the split that
    no training slide has, a single class, and the training split as the split to score.
    """
    where = table if table is not None else "slide table"
    if cohort.split == "train":
        raise ValueError("few-shot draws training slides from split 'train'; score another split, such as test")
    if seeds < 1:
        raise ValueError(f"few-shot seeds {seeds}: expected at least 1")
    label_of = _column(cohort, column) if table is None else _label_table(cohort, column, table)
    rows = {name: cohort.rows(name) for name in ("train", "val", cohort.split)}
    labels = {name: [label_of.get(row["slide_id"], "") for row in found] for name, found in rows.items()}
    known = sorted({label for label in labels["train"] if label}, key=_numbers_first)
    foreign = sorted({label for label in labels[cohort.split] if label} - set(known))
    if foreign:
        raise ValueError(
            f"{where}, column {column!r}: split {cohort.split!r} has slides with the label {preview(foreign)}, but the "
            f"training split has none; its classes are {preview(known, 8) or '(none)'}. Make a new split of the table, "
            "or remove these slides"
        )
    if len({fold(label) for label in known}) < len(known):
        raise ValueError(
            f"{where}, column {column!r}: labels that differ only in spelling: {preview(known, 8)}; keep one spelling"
        )
    if len(known) < 2:
        listed = sum(row["split"] == "train" for row in cohort.table)
        raise ValueError(
            f"{where}, column {column!r}: the training split has {len(known)} classes; a probe needs two (the records "
            f"contain {len(rows['train'])} of its {listed} slides)"
        )
    if not any(labels[cohort.split]):
        raise ValueError(f"{where}, column {column!r}: no slide of split {cohort.split!r} has a label")
    parts = {name: _slides(rows[name], labels[name], known) for name in rows}
    val = parts["val"] if cohort.split != "val" and len(parts["val"].ids) else None
    if val and (lacking := [label for c, label in enumerate(known) if c not in val.classes]):
        cohort.warnings.append(
            f"few-shot, {column}: split 'val' has no slide of {preview(lacking)}, so settings are fixed"
        )
        val = None
    unlabelled = {name: sum(not label for label in found) for name, found in labels.items()}
    lost = sum(unlabelled.values())
    if lost:
        cohort.warnings.append(f"few-shot, {column}: {lost} slides have no label and are left out")
    shots = read_shots(shots)
    fewest = Counter(parts["train"].classes.tolist())
    for k in shots:
        short = [known[c] for c in fewest if k != ALL and fewest[c] < k]
        if short:
            text = f"few-shot, {column}: {preview(short)} have fewer than {k} training slides; all of them are used"
            cohort.warnings.append(text)
    return LabelColumn(column, known, parts["train"], val, parts[cohort.split], unlabelled, shots, seeds)


def _numbers_first(label: str) -> tuple:
    return (0, float(label), "") if label.replace(".", "", 1).isdigit() else (1, 0.0, label)


def _column(cohort: Cohort, column: str) -> dict[str, str]:
    if not any(column.lower() in row for row in cohort.table):
        raise ValueError(f"slide table: no column {column!r}; its columns are {', '.join(cohort.table[0])}")
    return {row["slide_id"]: row.get(column.lower(), "") for row in cohort.table}


def _label_table(cohort: Cohort, column: str, table) -> dict[str, str]:
    """The labels of a table by slide or patient. Raises ValueError for two labels of one slide."""
    names = SlideNames([row["slide_id"] for row in cohort.table], [row["patient_id"] for row in cohort.table])
    found: dict[str, str] = {}
    for row in read_rows(table):
        if column.lower() not in row.values:
            raise ValueError(f"{row.place}: no column {column!r}; its columns are {', '.join(row.values)}")
        slides, case = row_slides(row)
        label = row.text(column.lower())
        for slide in [
            slide for name in slides or (case,) for slide in names.find(name) or names.of_case(name) if label
        ]:
            if found.setdefault(slide, label) != label:
                raise ValueError(f"{row.place}: {column} of {slide} is {found[slide]!r} and {label!r}; keep one")
    if not found:
        ids = [row["slide_id"] for row in cohort.table]
        raise ValueError(
            f"{table}: no row labels a slide of the slide table ({preview(ids)}); name slides by slide_id or patient_id"
        )
    return found


def _slides(rows: list[dict], labels: list[str], classes: list[str]) -> Slides:
    kept = [(row, classes.index(label)) for row, label in zip(rows, labels, strict=True) if label in classes]
    numbers = np.array([number for _, number in kept], int)
    return Slides([row["slide_id"] for row, _ in kept], [row["patient_id"] for row, _ in kept], numbers)


def draw_shots(train: Slides, shots: int | str, seed: int) -> Int[np.ndarray, "n"]:
    """The training slides of a draw: `shots` of each class, of different patients as far as possible.

    The draws of a seed are nested (4 shots include the 1 shot) and the same for every model.
    """
    if shots == ALL:
        return np.arange(len(train.ids))
    rng = np.random.default_rng(seed)
    drawn = []
    for c in range(train.classes.max() + 1):
        order = rng.permutation(np.flatnonzero(train.classes == c))
        seen: Counter = Counter()
        nth = []  # 0 for a patient's first slide, 1 for the second, ...
        for i in order:
            nth.append(seen[train.patients[i]])
            seen[train.patients[i]] += 1
        drawn.append(order[np.argsort(nth, kind="stable")][:shots])
    return np.concatenate(drawn)
