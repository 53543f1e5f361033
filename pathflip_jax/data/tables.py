"""Tables of any kind as rows: CSV, JSON and JSON Lines, told apart by what they hold, not by their names.

Every row knows its place ("reports.csv, line 17"), so that what is wrong with it can be found.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pathflip_jax.data.storage import Place, as_path, file_sizes, is_url, read_bytes

LARGEST_JSON = 512 * 2**20  # bytes of a file that has to be parsed in one go
LONGEST_RECORD = 16 * 2**20  # characters of a line of JSON, or of a row of a csv over all its lines
_SNIFFED = 2**20  # characters among which a table must begin
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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

    CSV and JSON Lines are read row by row, so memory holds the rows and never the file. Raises ValueError with file and
    line for a file that is none of these, and for a row or a JSON file beyond all measure; FileNotFoundError for a
    missing one.
    """
    path = as_path(path)
    with _opened(path) as file:
        lines = _Lines(path, file)
        try:
            head = file.read(_SNIFFED).lstrip()
            file.seek(0)
            if not head:
                raise ValueError(f"{path}: the file is empty; a table of CSV, JSON or JSON Lines is needed")
            if head[0] == "[":
                rows = _json_rows(path, file)
            elif head[0] == "{":
                rows = _json_line_rows(path, file, lines)
            else:
                rows = _csv_rows(path, lines, head)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 near line {lines.number}; save the table as UTF-8") from None
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns as CSV; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def parse_json(text: str, **options: Any) -> Any:
    """JSON as Python's own, with one kind of error: ValueError, for what nests too deeply and is no Unicode, too.

    `options` are those of `json.loads`. Half a surrogate pair (`"\\ud800"`) is a text that nothing can write again.
    """
    try:
        found = json.loads(text, **options)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {error.object[error.start]!r}, which is no character") from None
    return found


def json_object(path: Place, data: bytes) -> dict[str, Any]:
    """The object that a small JSON file holds. Raises ValueError, naming the file, where it is anything else."""
    try:
        found = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not an object; copy the file again")
    return found


def _opened(path: Place) -> TextIO:
    if not is_url(path):
        return open(path, encoding="utf-8-sig", newline="")
    return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig", newline="")


class _Lines:
    """The lines of a table; `record` counts the characters since the row began, and is to be set to 0 after each."""

    def __init__(self, path: Place, file: TextIO) -> None:
        self.path, self.file, self.number, self.record = path, file, 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST_RECORD + 1)
        if not line:
            raise StopIteration
        self.record += len(line)
        if self.record > LONGEST_RECORD:
            found = f"a row of more than {LONGEST_RECORD / 1e6:.0f} million characters"
            raise ValueError(f"{self.path}, line {self.number}: {found}; is it a table?")
        self.number += 1
        return line


def _json_rows(path: Place, file: TextIO) -> list[Row]:
    try:
        found = parse_json(_whole(path, file))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}); was the file cut short?") from error
    return [_json_row(f"{path}, entry {number}", value) for number, value in enumerate(found, 1)]


def _whole(path: Place, file: TextIO) -> str:
    size = file_sizes([path])[0] or 0
    if size > LARGEST_JSON:
        most = f"{LARGEST_JSON / 1e6:.0f}"
        raise ValueError(f"{size / 1e6:.0f} MB to be read at once, expected at most {most}; write it as JSON Lines")
    return file.read()


def _json_line_rows(path: Place, file: TextIO, lines: _Lines) -> list[Row]:
    rows = []
    for line in lines:
        lines.record = 0
        if line.strip():
            place = f"{path}, line {lines.number - 1}"
            try:
                value = parse_json(line)
            except ValueError as error:
                file.seek(0)
                return [_whole_object(path, file, place, error)]
            rows.append(_json_row(place, value))
    return rows


def _whole_object(path: Place, file: TextIO, place: str, error: ValueError) -> Row:
    """One object written over several lines, or broken JSON Lines."""
    try:
        return _json_row(str(path), parse_json(_whole(path, file)))
    except ValueError:
        raise ValueError(f"{place}: broken JSON ({error}); was the file cut short?") from error


def _json_row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a {type(value).__name__}, where an object with named values was expected")
    return Row(place, {name.strip().lower(): item for name, item in value.items()})


def _csv_rows(path: Place, lines: _Lines, head: str) -> list[Row]:
    header = head.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    rows = []
    line = 1
    try:
        for fields in reader:
            place, line, lines.record = f"{path}, line {line}", reader.line_num + 1, 0
            if not any(field.strip() for field in fields):
                continue
            if not names:
                names = [field.strip().lower() for field in fields]
                twice = sorted(name for name, count in Counter(filter(None, names)).items() if count > 1)
                if twice:
                    raise ValueError(f"{place}: the column {twice[0]!r:.60} occurs twice; rename one")
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
