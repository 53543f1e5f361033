"""Columns of outcomes and clinical variables, by slide or by patient, from the slide table or a label table.

A column is taken from the label table if that holds it, else from the slide table. Patients are those of the cohort, so
several spellings of one patient are one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.identity import SlideNames
from pathflip_jax.data.texts.tables import Row, read_rows
from pathflip_jax.data.texts.text import row_slides
from pathflip_jax.evaluate.patients import name_sites
from pathflip_jax.evaluate.spec import TIME_UNITS
from pathflip_jax.evaluate.splits import site_of
from pathflip_jax.evaluate.task import Setting

SITE = "site"
LONGEST_YEARS = 120
_EVENT = re.compile(r"(0|1)(\.0+)?(\s*:.*)?")  # cBioPortal writes 0:LIVING and 1:DECEASED
_EVENT_WORDS = {"true": True, "false": False}
_WITH_UNIT = re.compile(r"[-+]?[\d.,]+\s*(d|day|wk|week|mo|mth|month|yr|y|year)s?\.?", re.IGNORECASE)


class Cell(NamedTuple):
    """The text of a cell with its place for messages; the text is "" if the value is missing."""

    place: str
    text: str


class Tables(NamedTuple):
    """The slide table, and the rows of the label table with the slides that each one names."""

    slides: str
    rows: list[dict[str, str]]
    labels: str
    label_rows: list[tuple[Row, list[str]]]

    def cells(self, column: str) -> dict[str, Cell]:
        """The cells of a column by slide id. Raises ValueError for a column that neither table has.

        The column `site` may be absent: TCGA barcodes name the site.
        """
        name = column.lower()
        if any(name in row.values for row, _ in self.label_rows):
            return self._label_cells(column)
        if not any(name in row for row in self.rows) and name != SITE:
            known = [*(self.label_rows[0][0].values if self.label_rows else []), *self.rows[0]]
            where = " and ".join(filter(None, [self.labels, self.slides]))
            raise ValueError(f"{where}: no column {column!r}; the columns are {', '.join(dict.fromkeys(known))}")
        texts = [site_of(row) if name == SITE else row.get(name, "") for row in self.rows]
        return {
            row["slide_id"]: Cell(f"{self.slides}, slide {row['slide_id']}", text)
            for row, text in zip(self.rows, texts, strict=True)
        }

    def _label_cells(self, column: str) -> dict[str, Cell]:
        found: dict[str, Cell] = {}
        for row, slides in self.label_rows:
            cell = Cell(row.place, row.text(column.lower()))
            for slide in slides if cell.text else ():
                first = found.setdefault(slide, cell)
                if not _same(first.text, cell.text):
                    raise ValueError(
                        f"{cell.place}: {column} of slide {slide} is {cell.text!r}, but {first.text!r} in "
                        f"{first.place}; expected one value, remove the wrong row"
                    )
        return found


def read_tables(setting: Setting) -> Tables:
    """The tables of an evaluation. Raises ValueError for a label table that names no slide of the slide table."""
    spec, cohort = setting.spec, setting.cohort
    rows, found = cohort.table, []
    if spec.label_table is not None:
        names = SlideNames([row["slide_id"] for row in rows], [row["patient_id"] for row in rows])
        for row in read_rows(spec.label_table):
            slides, case = row_slides(row)
            own = [slide for name in slides or (case,) for slide in names.find(name) or names.of_case(name)]
            found.append((row, own))
        if not any(own for _, own in found):
            ids = preview([row["slide_id"] for row in rows])
            raise ValueError(
                f"{spec.label_table}: no row names a slide of the slide table ({ids}); name slides by slide_id or "
                "patient_id"
            )
    return Tables(str(spec.slides), rows, str(spec.label_table or ""), found)


def sides(setting: Setting, task: str) -> dict[str, dict[str, list[str]]]:
    """The slides of each patient of train, val and the scored split; there is no val if that is the scored one.

    Raises ValueError for the training split as the one to score, and for a patient of two splits.
    """
    cohort = setting.cohort
    if cohort.split == "train":
        raise ValueError(f"{task}: a probe is trained on split 'train'; score another split, such as test")
    found: dict[str, dict[str, list[str]]] = {}
    side_of: dict[str, str] = {}
    for side in dict.fromkeys(("train", "val", cohort.split)):
        for row in cohort.rows(side):
            patient = row["patient_id"]
            if side_of.setdefault(patient, side) != side:
                raise ValueError(
                    f"{setting.spec.slides}, slide {row['slide_id']}: patient {patient} is in the splits "
                    f"{side_of[patient]!r} and {side!r}; {task} needs each patient in one split (pathflip split makes "
                    "one by patient)"
                )
            found.setdefault(side, {}).setdefault(patient, []).append(row["slide_id"])
    if "train" not in found:
        raise ValueError(
            f"{setting.spec.slides}: no slide of split 'train' is in the records; {task} trains a probe on it, so "
            "prepare these slides, or give the table a training split"
        )
    return found


def by_patient(
    column: str, cells: Mapping[str, Cell], patients: Mapping[str, Sequence[str]], parse: Callable[[str, Cell], object]
) -> dict[str, tuple[Cell, object]]:
    """The value of each patient whose slides have one, with its cell.

    Raises ValueError for two values of one patient, and what `parse` raises for a faulty one.
    """
    found: dict[str, tuple[Cell, object]] = {}
    for patient, slides in patients.items():
        for cell in (cells[slide] for slide in slides if slide in cells):
            if not cell.text:
                continue
            first, value = found.setdefault(patient, (cell, parse(column, cell)))
            if parse(column, cell) != value:
                raise ValueError(
                    f"{cell.place}: {column} of patient {patient} is {cell.text!r}, but {first.text!r} in "
                    f"{first.place}; expected one value for a patient, remove the wrong one"
                )
    return found


def parse_text(column: str, cell: Cell) -> str:
    """The text of a cell."""
    return cell.text


def parse_same(column: str, cell: Cell) -> str | float:
    """The number of a cell if it is one, so that 12 and 12.0 are the same value, else its text."""
    return float(cell.text) if _is_number(cell) else cell.text


def parse_number(column: str, cell: Cell) -> float:
    """The number of a cell. Raises ValueError for a text that is none, and for infinity."""
    try:
        value = float(cell.text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        hint = "with a decimal point" if re.fullmatch(r"[-+]?\d+,\d+", cell.text) else "or an empty cell if unknown"
        raise ValueError(f"{cell.place}: {column} is {cell.text!r}; expected a number, {hint}")
    return value


def parse_time(column: str, cell: Cell) -> float:
    """The time of a cell. Raises ValueError for a unit beside the number, and for a time that is not above 0."""
    if _WITH_UNIT.fullmatch(cell.text):
        raise ValueError(
            f"{cell.place}: {column} is {cell.text!r}; expected a number alone, in the same unit in every row: convert "
            "the times to one unit, and name it in the column's name (os_months) or by --survival-unit"
        )
    value = parse_number(column, cell)
    if value <= 0:
        raise ValueError(
            f"{cell.place}: {column} is {cell.text!r}; expected a time above 0: correct it, write the smallest time "
            "that was measured for an event on the first day, or empty time and event to leave the patient out"
        )
    return value


def parse_event(column: str, cell: Cell) -> bool:
    """Whether a cell tells of an event. Raises ValueError for anything but 0, 1, true, false and 1:DECEASED."""
    text = cell.text.strip().lower()
    if match := _EVENT.fullmatch(text):
        return match.group(1) == "1"
    if text not in _EVENT_WORDS:
        raise ValueError(
            f"{cell.place}: {column} is {cell.text!r}; expected 1 or true for an event and 0 or false for a censored "
            "time, or cBioPortal's 1:DECEASED and 0:LIVING: rewrite the column (R's 1 and 2 are 0 and 1 here)"
        )
    return _EVENT_WORDS[text]


def unit_of(column: str, unit: str | None) -> str | None:
    """The unit of a column of times, as given or as its name has it; None if neither does.

    Raises ValueError for a name that contradicts the given unit.
    """
    named = [known for known in TIME_UNITS if re.search(rf"(?<![a-z]){known[:-1]}s?(?![a-z])", column.lower())]
    if unit and named and unit not in named:
        raise ValueError(f"the column {column!r} is in {named[0]} by its name, but survival-unit is {unit!r}; keep one")
    return unit or (named[0] if named else None)


def check_longest(column: str, times: Sequence[tuple[Cell, float]], unit: str | None) -> None:
    """Raise ValueError for a time of more than 120 years, which is in another unit."""
    for cell, time in times:
        if unit and time > LONGEST_YEARS * TIME_UNITS[unit]:
            raise ValueError(
                f"{cell.place}: {column} is {cell.text!r}, which is more than {LONGEST_YEARS} years in {unit}; convert "
                "all times to one unit, or name another one by --survival-unit"
            )


def merge_sites(column: str, names: Sequence[str]) -> list[str]:
    """The names of strata, with several spellings of one site merged."""
    return name_sites(names) if column.lower() == SITE else list(names)


class Encoding(NamedTuple):
    """Clinical columns as numbers: the names of the variables, and a matrix for each side, standardised by training."""

    names: list[str]
    x: dict[str, Float[np.ndarray, "n V"]]


def encode(columns: Mapping[str, Mapping[str, Sequence[Cell]]]) -> Encoding:
    """Clinical columns, given as the cells of each side: numbers as they are, other columns one-hot.

    A column is a number if all its training cells are. A missing number is the mean of training, a missing category is
    a category of its own if training has one; a category that training lacks is all zeros. Raises ValueError for a
    column that is constant in training, and for a text of another side in a column of numbers.
    """
    names, parts = [], {side: [] for side in next(iter(columns.values()))}
    for column, cells in columns.items():
        known = [cell for cell in cells["train"] if cell.text]
        if len({parse_same(column, cell) for cell in known}) < 2:
            found = f"{known[0].text!r} or missing in all" if known else "missing in all"
            raise ValueError(
                f"{cells['train'][0].place}: the clinical column {column!r} is constant: it is {found} "
                f"{len(cells['train'])} training rows; expected values that differ, leave the column out"
            )
        if all(map(_is_number, known)):
            names.append(column)
            mean = float(np.mean([parse_number(column, cell) for cell in known]))
            encoded = {
                side: [[parse_number(column, cell) if cell.text else mean] for cell in own]
                for side, own in cells.items()
            }
        else:
            categories = sorted({cell.text for cell in cells["train"]})
            names += [f"{column} = {category or 'missing'}" for category in categories]
            encoded = {side: [[cell.text == one for one in categories] for cell in own] for side, own in cells.items()}
        train = np.array(encoded["train"], float)
        for side, rows in encoded.items():
            parts[side].append((np.array(rows, float).reshape(-1, train.shape[1]) - train.mean(0)) / train.std(0))
    return Encoding(names, {side: np.concatenate(found, axis=1) for side, found in parts.items()})


def _is_number(cell: Cell) -> bool:
    try:
        return math.isfinite(float(cell.text))
    except ValueError:
        return False


def _same(first: str, second: str) -> bool:
    """Whether two texts are the same value: 12 and 12.0 are."""
    try:
        return float(first) == float(second)
    except ValueError:
        return first == second
