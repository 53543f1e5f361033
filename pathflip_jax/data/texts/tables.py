"""Tables as rows: CSV, JSON, JSON Lines and Parquet, detected by content, not by file name.

Every row carries its location ("reports.csv, line 17") for error messages.
"""

import codecs
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from pathflip_jax.data.storage.files import Place, as_path, file_sizes, read_bytes
from pathflip_jax.data.storage.json_values import parse_json
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.data.texts.cells import as_list, as_text
from pathflip_jax.data.texts.identity import is_empty, is_missing

LARGEST_JSON = 512 * 2**20  # bytes of a file that must be parsed as a whole, and of a Parquet file's values
LONGEST_RECORD = 16 * 2**20  # characters of a line of JSON, or of a CSV row over all its lines
_SNIFFED = 2**20  # characters within which a table must begin
_SEPARATOR = re.compile(r"\ufeff?\"?sep=(.)\"?\r?\n", re.IGNORECASE)  # Excel's separator declaration
_PARQUET, _ZIP = b"PAR1", b"PK\x03\x04"


class Row(NamedTuple):
    """Table row: its location for messages, and its values under lower-case names."""

    place: str
    values: dict[str, Any]

    def first(self, *names: str) -> Any:
        """First of these columns that is not missing (`is_missing`); "" if all are."""
        return self._first(names, is_missing)

    def first_nonempty(self, *names: str) -> Any:
        """First non-empty of these free-text columns; "" if all are empty. "None" and "unknown" are not empty.

        For answers, questions and options only: elsewhere these words mean a missing value.
        """
        return self._first(names, is_empty)

    def text(self, *names: str) -> str:
        """`first` as text, with ids that became floats (123.0) restored."""
        return as_text(self.first(*names))

    def listed(self, *names: str) -> Any:
        """`first` as a list or object, parsed from text if necessary; other values are unchanged."""
        try:
            return as_list(self.first(*names))
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from error

    def _first(self, names: Sequence[str], lacks: Callable[[Any], bool]) -> Any:
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str):
                value = value.strip()
            if not lacks(value) and value not in ([], {}):
                return value
        return ""


def read_rows(path: str | Place) -> list[Row]:
    """Rows of a table: CSV (comma, semicolon or tab), JSON (a list of objects), JSON Lines or Parquet.

    Texts are UTF-8 with or without a BOM, or UTF-16 with one, as written by Excel. CSV and JSON Lines are read row by
    row, so memory holds the rows and never the file. Raises ValueError with file and line for a file in another format,
    and for an oversized row or JSON file; FileNotFoundError for a missing one.
    """
    path = as_path(path)
    with _opened(path) as binary:
        begins = binary.read(4)
        binary.seek(0)
        if begins == _ZIP:
            raise ValueError(f"{path}: a zip archive or an Excel workbook, not a table; save it as CSV (UTF-8)")
        rows = _parquet_rows(path, binary) if begins == _PARQUET else _text_rows(path, binary, _encoding(begins))
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns as CSV, atomically."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def _opened(path: Place) -> BinaryIO:
    return io.BytesIO(read_bytes(path)) if is_url(path) else open(path, "rb")


def _encoding(begins: bytes) -> str:
    return "utf-16" if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _text_rows(path: Place, binary: BinaryIO, encoding: str) -> list[Row]:
    with io.TextIOWrapper(binary, encoding=encoding, newline="") as file:
        lines = _Lines(path, file)
        try:
            return _sniffed_rows(path, file, lines)
        except UnicodeError:
            kind = "UTF-16" if encoding == "utf-16" else "UTF-8"
            raise ValueError(f"{path}: not {kind} near line {lines.number}; save the table as UTF-8") from None


def _sniffed_rows(path: Place, file: TextIO, lines: "_Lines") -> list[Row]:
    """Rows of a text table whose format is detected from its beginning."""
    head = file.read(_SNIFFED).lstrip()
    file.seek(0)
    if not head:
        raise ValueError(f"{path}: the file is empty; a table of CSV, JSON, JSON Lines or Parquet is needed")
    if "\0" in head:
        raise ValueError(f"{path}: zero bytes in it: UTF-16 without a BOM, or not a table; save the table as UTF-8")
    if head[0] == "[":
        return _json_rows(path, file)
    return _json_line_rows(path, file, lines) if head[0] == "{" else _csv_rows(path, lines, head)


def _parquet_rows(path: Place, binary: BinaryIO) -> list[Row]:
    """Rows of a Parquet file, with lists and structs as Python objects."""
    import pyarrow as pa

    rows: list[Row] = []
    batches = _parquet_batches(binary)
    while True:
        try:
            found = next(batches, None)
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            OverflowError,
        ) as error:  # also non-UTF-8 text, and dates
            raise ValueError(f"{path}: broken Parquet ({error!s:.200}); was the file cut short?") from error
        if found is None:
            return rows
        size, values = found
        if size > LARGEST_JSON:
            most = f"{LARGEST_JSON / 1e6:.0f}"
            raise ValueError(f"{path}: its values take more than {most} MB; write only the columns that are needed")
        rows += [_row(f"{path}, row {len(rows) + n}", one.items()) for n, one in enumerate(values, 1)]


def _parquet_batches(binary: BinaryIO) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Cumulative bytes of all values, and the next rows, a few at a time, as one stored value may expand to many."""
    from pyarrow import parquet

    table, total = parquet.ParquetFile(binary), 0
    for group in range(table.num_row_groups):
        size = max(1, table.metadata.row_group(group).total_byte_size)
        if size > LARGEST_JSON:
            yield size, []
        for batch in table.iter_batches(max(1, min(1024, LARGEST_JSON // size)), row_groups=[group]):
            total += batch.nbytes
            yield total, [] if total > LARGEST_JSON else batch.to_pylist()


def _row(place: str, cells: Iterable[tuple[str, Any]]) -> Row:
    """Row from its cells, under lower-case names. Raises ValueError for a duplicate name."""
    cells = [(name.strip().lower(), value) for name, value in cells]
    if twice := sorted(name for name, count in Counter(name for name, _ in cells).items() if name and count > 1):
        raise ValueError(f"{place}: the column {twice[0]!r:.60} occurs twice; rename one")
    return Row(place, dict(cells))


class _Lines:
    """Lines of a table; `record` counts the characters of the current row, and must be reset to 0 after each."""

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
    text = _whole(path, file)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}); was the file cut short?") from error
    return [_json_row(f"{path}, entry {number}", value) for number, value in enumerate(found, 1)]


def _whole(path: Place, file: TextIO) -> str:
    size = file_sizes([path])[0] or 0
    if size > LARGEST_JSON:
        most = f"{LARGEST_JSON / 1e6:.0f}"
        raise ValueError(
            f"{path}: one JSON value of {size / 1e6:.0f} MB, expected at most {most} MB; write it as JSON Lines"
        )
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
    """Row of a single object that spans several lines; raises for broken JSON Lines."""
    if (file_sizes([path])[0] or 0) > LARGEST_JSON:  # too large for a single object, so a broken line
        raise ValueError(f"{place}: broken JSON ({error}); was the file cut short?") from error
    try:
        return _json_row(str(path), parse_json(file.read()))
    except ValueError:
        raise ValueError(f"{place}: broken JSON ({error}); was the file cut short?") from error


def _json_row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: found a {type(value).__name__}, expected an object with named values")
    return _row(place, value.items())


def _csv_rows(path: Path, lines: _Lines, head: str) -> list[Row]:
    declared = _SEPARATOR.match(head)
    if declared:
        next(lines)
        head = head[declared.end() :].lstrip()
    delimiter = declared.group(1) if declared else max(",;\t", key=head.split("\n", 1)[0].count)
    skipped = lines.number - 1
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    rows = []
    line = 1 + skipped
    try:
        for fields in reader:
            place, line, lines.record = f"{path}, line {line}", reader.line_num + 1 + skipped, 0
            if not any(field.strip() for field in fields):
                continue
            if not names:
                names = [field.strip().lower() for field in fields]
                _row(place, zip(names, names, strict=True))
                continue
            if len(fields) != len(names):
                raise ValueError(
                    f"{place}: {len(fields)} fields, the header has {len(names)}; "
                    'a field that contains the separator needs quotes ("a, b")'
                )
            rows.append(Row(place, dict(zip(names, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: broken CSV ({error})") from error
    return rows
