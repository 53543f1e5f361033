"""Slide tables and the split files of other tools as rows with the columns `slide_id` and `split`.

CLAM writes `splits_0.csv` (columns train, val and test list slide ids) and `splits_0_bool.csv` (a row per slide, which
is True under its split); Patho-Bench writes `k=all.tsv` (a column per fold, whose values are train, val or test) beside
the `config.yaml` that names its column of labels and their classes.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.files import Place, as_path, read_bytes
from pathflip_jax.data.texts.cells import as_text
from pathflip_jax.data.texts.identity import is_missing
from pathflip_jax.data.texts.tables import Row, read_rows

SIDES = ("train", "val", "test")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test", "": ""}
FOLD = re.compile(r"(?:fold[_-]?)?(\d+)", re.IGNORECASE)
_FOLD_COLUMN = re.compile(r"fold[_-]?\d+")
_INDEX = ("", "unnamed: 0", "index")  # pandas' index of rows, as it writes it and as it reads it again
_TRUTH = {"true": True, "false": False}
_SLIDE = ("slide_id", "slide")
_TASK_FILE = "config.yaml"
# PyYAML does not catch errors of its own constructors ("!!int" without a value is an IndexError).
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Fold(NamedTuple):
    """One fold of a table that holds several: the table, and the fold's number or the name of its column."""

    table: Place | str
    name: str

    def __str__(self) -> str:
        return f"{self.table} --fold {self.name}"


SlideTableFile = Place | str | Fold


def one_fold(table: Place | str | None, fold: str | None) -> SlideTableFile | None:
    """The chosen fold of a table; the table itself without a choice, None without a table.

    Raises ValueError for a fold without a table.
    """
    if not fold:
        return table
    if not table:
        raise ValueError(f"fold {fold}: a fold is chosen from a slide table; name the table too")
    return Fold(table, str(fold))


def read_split_rows(table: SlideTableFile) -> list[Row]:
    """Rows of a slide table, or of a split file of CLAM or Patho-Bench; `split` is a side or empty.

    A slide under two sides of a file has two rows. The only fold of a table is chosen by itself; of several, none is
    without a `Fold`. Raises ValueError as `read_rows`, for a fold that the table lacks, and for a Patho-Bench task
    whose `config.yaml` contradicts its table.
    """
    path, fold = table if isinstance(table, Fold) else (table, "")
    rows = read_rows(path)
    names = rows[0].values.keys()
    if _lists_slides(rows):
        return _without_fold(path, fold, list(_listed(rows)))
    if _marks_sides(rows):
        return _without_fold(path, fold, list(_marked(rows)))
    folds = [name for name in names if is_fold(name)]
    if not folds:
        return _without_fold(path, fold, rows)
    if fold:
        column = _fold_column(path, fold, folds)
    else:
        column = folds[0] if len(folds) == 1 and "split" not in names and _names_sides(rows, folds[0]) else ""
    label_of = _task_labels(path, rows)
    return [
        Row(row.place, dict(row.values) | label_of(row) | ({"split": row.first(column)} if column else {}))
        for row in rows
    ]


def side_and_table(text: str) -> tuple[str, str]:
    """Split "test=FILE" into side and file; any other text is a file, also one with "=" in its name, as k=all.tsv."""
    side, equals, table = text.partition("=")
    return (side, table) if equals and side in SIDES else ("", text)


def is_fold(column: str) -> bool:
    """Whether a column is named as a fold: fold_0."""
    return _FOLD_COLUMN.fullmatch(column) is not None


def folds_hint(rows: Sequence[dict[str, str]]) -> str:
    """Sentence about the folds of a table of which none was chosen; "" for a table without folds."""
    folds = [name for name in (rows[0] if rows else ()) if is_fold(name)]
    if not folds:
        return ""
    return f"; the table has {len(folds)} folds ({preview(folds)}): choose one with --fold (training: data.fold)"


def _without_fold(path: Place | str, fold: str, rows: list[Row]) -> list[Row]:
    if fold:
        raise ValueError(
            f"{path}: no fold {fold!r}, as it has no columns fold_0, fold_1, ...; leave the fold out, or name the file "
            "of that fold"
        )
    if not rows:
        raise ValueError(f"{path}: no slide in it, only the columns of a split")
    return rows


def _fold_column(path: Place | str, fold: str, folds: Sequence[str]) -> str:
    number = FOLD.fullmatch(fold.strip())
    found = [name for name in folds if number and FOLD.fullmatch(name).group(1) == number.group(1)]
    if not found:
        raise ValueError(f"{path}: no fold {fold!r}; its folds are {preview(folds, 8)}")
    return found[0]


def _names_sides(rows: Sequence[Row], column: str) -> bool:
    return all(row.text(column).lower() in SPLITS for row in rows)


def _lists_slides(rows: Sequence[Row]) -> bool:
    """Whether each column is a side with the slides in it, in no relation to the other columns of a row."""
    names = rows[0].values.keys() - set(_INDEX)
    known = "train" in names and len(names) > 1 and names <= set(SIDES)
    return known and not all(_truth(value) is not None for row in rows for value in _sides(row).values())


def _marks_sides(rows: Sequence[Row]) -> bool:
    """Whether each row is a slide, and True under its side."""
    names = rows[0].values.keys()
    known = "train" in names and len(names & set(SIDES)) > 1 and _slide_column(rows[0]) is not None
    return known and all(_truth(value) is not None for row in rows for value in _sides(row).values())


def _listed(rows: Sequence[Row]) -> Iterator[Row]:
    for side in SIDES:
        for row in rows:
            if not is_missing(value := row.values.get(side)):
                yield Row(f"{row.place}, column {side}", {"slide_id": value, "split": side})


def _marked(rows: Sequence[Row]) -> Iterator[Row]:
    slide = _slide_column(rows[0])
    for row in rows:
        values = {name: value for name, value in row.values.items() if name not in (*SIDES, slide)}
        values["slide_id"] = row.values.get(slide)
        sides = [side for side, value in _sides(row).items() if _truth(value)]
        for side in sides or [""]:
            place = f"{row.place}, column {side}" if len(sides) > 1 else row.place
            yield Row(place, values | {"split": side})


def _slide_column(row: Row) -> str | None:
    return next((name for name in (*_SLIDE, *_INDEX) if name in row.values), None)


def _sides(row: Row) -> dict[str, Any]:
    return {side: row.values[side] for side in SIDES if side in row.values}


def _truth(value: Any) -> bool | None:
    return (
        value if isinstance(value, bool) else _TRUTH.get(value.strip().casefold()) if isinstance(value, str) else None
    )


def _task_labels(path: Place | str, rows: Sequence[Row]):
    """Function from a row to its `label`, as the task's `config.yaml` names it; to {} without such a file."""
    task = _read_task(as_path(path).parent / _TASK_FILE)
    if task is None or "label" in rows[0].values:
        return lambda row: {}
    place, column = as_path(path).parent / _TASK_FILE, str(task["task_col"]).strip().lower()
    if column not in rows[0].values:
        raise ValueError(
            f"{place}: task_col {column!r} is not a column of {path} ({preview(rows[0].values, 12)}); keep the two "
            "files of one task together"
        )
    classes = task.get("label_dict")
    names = {as_text(key): as_text(name) for key, name in classes.items()} if isinstance(classes, dict) else None

    def label(row: Row) -> dict[str, str]:
        value = row.text(column)
        if value and names is not None and value not in names:
            raise ValueError(f"{row.place}: {column} {value!r} is not in label_dict of {place} ({preview(names, 12)})")
        return {"label": names[value] if value and names is not None else value}

    return label


def _read_task(place: Place) -> dict | None:
    """Patho-Bench's description of a task; None if there is no such file, or one of another kind."""
    try:
        content = yaml.safe_load(read_bytes(place))
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        raise ValueError(f"{place}: not valid YAML ({str(error)[:200] or 'nested too deeply'}); mend it") from None
    return content if isinstance(content, dict) and content.get("task_col") else None
