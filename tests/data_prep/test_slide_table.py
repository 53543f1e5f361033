"""Slide tables in preparation: resolution by single cells, rows without a file."""

import pytest

from data_prep.slide_table import read_table


def _read(tmp_path, header, *rows, slides=("A", "B"), known=()):
    path = tmp_path / "slides.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return read_table(path, slides, known)


@pytest.mark.parametrize(
    ("header", "row", "mpp"),
    [
        ("slide_id,mpp", "A,0.25", 0.25),
        ("slide_id;mpp", "A;0,25", 0.25),
        ("slide_id,magnification", "A,40", 0.25),
        ("slide_id,Magnification", "A,20x", 0.5),
        ("slide_id,magnification", "A,40.0", 0.25),
        ("slide_id,mpp,magnification", "A,0.2527,40", 0.2527),
        ("slide_id,mpp,magnification", "A,NA,20", 0.5),
        ("slide_id,mpp", "A,nan", None),
        ("slide_id,mpp", "A,", None),
        ("slide_id,mpp", "A,unknown", None),
    ],
)
def test_a_slide_has_the_resolution_of_its_row(tmp_path, header, row, mpp):
    table = _read(tmp_path, header, row)
    assert table.mpp == ({} if mpp is None else {"A": pytest.approx(mpp)})
    assert bool(mpp) == any("mpp taken from" in note and "1 slides (A)" in note for note in table.notes)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("slide_id,mpp", "A,40", "slide A: mpp '40', expected a number from 0.05 to 10.*is it the magnification"),
        ("slide_id,mpp", "A,0", "mpp '0', expected"),
        ("slide_id,mpp", "A,-0.25", "expected"),
        ("slide_id,mpp", "A,inf", "expected"),
        ("slide_id,mpp", "A,0.25 um", "mpp '0.25 um', expected"),
        ("slide_id,mpp", "A,40x", "mpp '40x', expected"),
        ("slide_id,magnification", "A,0.25", "magnification '0.25', expected"),
        ("slide_id,mpp,magnification", "A,0.5,40", "mpp 0.5 and magnification 40 contradict each other"),
    ],
)
def test_a_resolution_that_cannot_be_is_refused_by_name(tmp_path, header, row, message):
    with pytest.raises(ValueError, match=rf"slides.csv: slide A: .*{message}" if "slide A" not in message else message):
        _read(tmp_path, header, row)


def test_rows_and_slides_without_each_other_are_named(tmp_path):
    table = _read(tmp_path, "slide_id,patient_id", "A.svs,P1", "C,P2", "D,P3", known=["D"])
    assert table.cases == {"A": "P1"} and table.unlisted == ["B"]
    assert [failure.slide for failure in table.absent] == ["C"] and "without a file" in table.absent[0].error
    assert any("1 of 3 rows" in note and "(C)" in note for note in table.notes)
    assert any("slides that are not in" in note and "1 (B)" in note for note in table.notes)
