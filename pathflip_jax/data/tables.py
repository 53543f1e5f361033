"""Tables of any kind as rows: CSV, JSON and JSON Lines, told apart by what they hold, not by their names.

Every row knows its place ("reports.csv, line 17"), so that what is wrong with it can be found.
"""

import csv
import io
import json
from typing import Any, NamedTuple

from pathflip_jax.data.storage import Place, as_path, read_bytes


class Row(NamedTuple):
    """One row: its place for messages, and its values under lower-case names."""

    place: str
    values: dict[str, Any]

    def first(self, *names: str) -> Any:
        """The first of these columns that holds something; "" when none does."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str):
                value = value.strip()
            if value not in (None, "", []):
                return value
        return ""


def read_rows(path: str | Place) -> list[Row]:
    """The rows of a CSV (comma, semicolon or tab), JSON (a list of objects) or JSON Lines file, with a BOM or not.

    Raises ValueError with file and line for a file that is none of these, FileNotFoundError for a missing one.
    """
    path = as_path(path)
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the table as UTF-8 and try again") from error
    start = text.lstrip()[:1]
    if not start:
        raise ValueError(f"{path}: the file is empty; a table of CSV, JSON or JSON Lines is needed")
    if start == "[":
        rows = _json_rows(path, text)
    elif start == "{":
        rows = _json_line_rows(path, text)
    else:
        rows = _csv_rows(path, text)
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def _json_rows(path: Place, text: str) -> list[Row]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}); was the file cut short?") from error
    return [_json_row(f"{path}, entry {number}", value) for number, value in enumerate(found, 1)]


def _json_line_rows(path: Place, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                return [_whole_object(path, text, place, error)]
            rows.append(_json_row(place, value))
    return rows


def _whole_object(path: Place, text: str, place: str, error: ValueError) -> Row:
    """One object written over several lines, or broken JSON Lines."""
    try:
        return _json_row(str(path), json.loads(text))
    except ValueError:
        raise ValueError(f"{place}: broken JSON ({error}); was the file cut short?") from error


def _json_row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a {type(value).__name__}, where an object with named values was expected")
    return Row(place, {name.strip().lower(): item for name, item in value.items()})


def _csv_rows(path: Place, text: str) -> list[Row]:
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    rows = []
    line = 1
    try:
        for fields in reader:
            place, line = f"{path}, line {line}", reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if not names:
                names = [field.strip().lower() for field in fields]
                twice = sorted({name for name in names if name and names.count(name) > 1})
                if twice:
                    raise ValueError(f"{place}: the column {twice[0]!r} occurs twice; rename one")
                continue
            if len(fields) != len(names):
                raise ValueError(
                    f"{place}: {len(fields)} fields where the header names {len(names)}; "
                    'a field that holds the separator needs quotes ("a, b")'
                )
            rows.append(Row(place, dict(zip(names, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: broken CSV ({error})") from error
    return rows
