"""Tables as spreadsheets, data frames and data sets write them: separators, encodings, Parquet."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from pathflip_jax.data.texts import tables
from pathflip_jax.data.texts.tables import Row, read_rows


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=;\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_line_that_names_the_separator(tmp_path, first, encoding):
    path = tmp_path / "table.csv"
    path.write_bytes((first + "slide_id;note\nM\u00fcller;a,b\n").encode(encoding))
    (row,) = read_rows(path)
    assert row == Row(f"{path}, line 3", {"slide_id": "M\u00fcller", "note": "a,b"})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["slide_id\tcase\n123\t10\n", '{"slide_id": "123", "case": "10"}'])
def test_utf_16_is_read_with_a_mark_and_refused_without(tmp_path, encoding, text):
    path = tmp_path / "table"
    path.write_bytes(text.encode(encoding))
    if encoding == "utf-16":
        assert [row.values for row in read_rows(path)] == [{"slide_id": "123", "case": "10"}]
    else:
        with pytest.raises(ValueError, match="table: zero bytes.*save the table as UTF-8"):
            read_rows(path)


def test_utf_16_that_was_cut_short(tmp_path):
    path = tmp_path / "table"
    path.write_bytes("slide_id\n123\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match="table: not UTF-16 near line .*save the table as UTF-8"):
        read_rows(path)


def test_a_workbook_is_named(tmp_path):
    path = tmp_path / "slides.csv"
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(ValueError, match="slides.csv: a zip archive or an Excel workbook.*save it as CSV"):
        read_rows(path)


def test_parquet_is_read_whatever_it_is_called(tmp_path):
    path = tmp_path / "table.csv"
    rows = [{"Slide_ID": "S1", "choices": ["Yes", None], "n": 3, "at": {"x": 1.5}}, {"Slide_ID": "S2", "n": None}]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    first, second = read_rows(path)
    assert first == Row(f"{path}, row 1", {"slide_id": "S1", "choices": ["Yes", None], "n": 3, "at": {"x": 1.5}})
    assert (second.place, second.values["slide_id"]) == (f"{path}, row 2", "S2")
    assert second.values["n"] is second.values["choices"] is None


def test_parquet_that_is_damaged_empty_or_beyond_all_measure(tmp_path, monkeypatch):
    path = tmp_path / "table"
    parquet.write_table(pa.table({"slide_id": ["S1" * 999] * 999}), path)
    whole = path.read_bytes()
    monkeypatch.setattr(tables, "LARGEST_JSON", 100_000)
    with pytest.raises(ValueError, match="table: its values take more than 0 MB"):
        read_rows(path)
    parquet.write_table(pa.table({"slide_id": ["S\xe9"] * 3}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace("S\xe9".encode(), b"S\x80\x80"))
    with pytest.raises(ValueError, match="table: broken Parquet .*utf-8"):
        read_rows(path)
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="table: broken Parquet .*cut short"):
        read_rows(path)
    parquet.write_table(pa.table({"slide_id": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match="table: no rows in it"):
        read_rows(path)


@pytest.mark.parametrize("content", ["Label,label\na,b\n", '{"Label": "a", "label ": "b"}'])
def test_a_column_that_occurs_twice(tmp_path, content):
    path = tmp_path / "table"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1: the column 'label' occurs twice"):
        read_rows(path)


def test_a_row_tells_what_is_missing_from_what_is_said():
    row = Row("x", {"a": float("nan"), "b": " None ", "c": "x", "d": 0, "e": [], "f": "['Yes', None]"})
    assert row.first("a", "b", "c") == "x" and row.first("a", "b", "e") == ""
    assert row.first_nonempty("a", "b", "c") == "None" and row.first_nonempty("a", "e", "d") == 0
    assert row.text("d") == "0" and row.listed("f") == ["Yes", None]
