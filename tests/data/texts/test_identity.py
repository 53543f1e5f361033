"""Identity of slides, cases and patients, against the spellings that tables come in and a plain graph search."""

import unicodedata
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pathflip_jax.data.texts.identity import (
    SlideNames,
    barcode_patient,
    clean_id,
    connected,
    fold,
    fold_slide,
    is_empty,
    is_missing,
    patient_keys,
    preferred_spelling,
)

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


NOT_AVAILABLE = ["NA", "n/a", "nan", "NaN", "None", "null", "Unknown", "#N/A", "'--", "Not Reported"]


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), Decimal("nan"), "", "  ", *NOT_AVAILABLE])
def test_what_tables_write_for_nothing_is_missing(value):
    assert is_missing(value)


@pytest.mark.parametrize("value", [0, False, 0.0, "0", "-", "Nan Ning", "no", "benign", [], "NA-12"])
def test_what_says_something_is_not_missing(value):
    assert not is_missing(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [("123", "123.0"), ("S1.svs.h5", "S1"), ("0045", "45"), ("p-01", "P-01"), ("Mu\u0308ller", "M\u00fcller"),
     (" A  1 ", "a 1"), ("S1.svs", "s1.SVS"), ("00", "0"), ("A\u00a01", "A 1"), ("Straße", "STRASSE")],
)  # fmt: skip
def test_spellings_of_one_id_fold_to_one(one, other):
    assert fold(one) == fold(other)


@pytest.mark.parametrize("value", ["None", "unknown", "NA", "n/a", "no", 0, False])
def test_a_free_text_may_be_a_word_that_elsewhere_is_missing(value):
    assert not is_empty(value)


@pytest.mark.parametrize("value", [None, float("nan"), "", " ", "nan", "<NA>", "null"])
def test_what_is_empty_even_as_free_text(value):
    assert is_empty(value) and is_missing(value)


def test_zeros_in_front_are_kept_where_asked():
    assert fold("0045", zeros=True) == fold_slide("x/0045.svs", zeros=True) == "0045"
    assert fold("123.0", zeros=True) == fold("123", zeros=True) == "123"


@pytest.mark.parametrize(
    ("spellings", "name"),
    [(["123.0", "123"], "123"), (["45", "45", "0045"], "0045"), (["p-1", "P-1", "P-1"], "P-1"), (["b", "a"], "b")],
)
def test_the_most_natural_spelling(spellings, name):
    assert preferred_spelling(spellings) == name


@pytest.mark.parametrize(
    ("one", "other"), [("P-1", "P-01"), ("1", "10"), ("S 1.v2", "S 1.v3"), ("12/100", "13/100"), ("1.5", "1")]
)
def test_other_ids_stay_apart(one, other):
    assert fold(one) != fold(other)


@given(IDS)
def test_folding_ignores_unicode_form_case_and_space_and_is_done_once(name):
    assert fold(fold(name)) == fold(name)
    assert fold(unicodedata.normalize("NFD", name)) == fold(unicodedata.normalize("NFC", name)) == fold(f" {name}\t")


def test_a_slide_is_compared_without_its_folder():
    assert fold_slide("C:\\scans\\0045.svs") == fold_slide("/mnt/45.h5") == "45"


def test_barcodes_name_their_patient():
    assert barcode_patient("tcga-a7-a0cj-01Z-00-DX1") == "TCGA-A7-A0CJ"
    assert barcode_patient("C3L-00001-21") == "C3L-00001"
    assert barcode_patient("TCGA-A7-A0CJX") == barcode_patient("S1") == ""


def test_a_barcode_names_the_patient_whatever_the_columns_say():
    one = patient_keys("TCGA-A7-A0CJ-01Z-00-DX1", "TCGA-A7-A0CJ-01Z-00-DX1", "nan")
    other = patient_keys("TCGA-A7-A0CJ-01Z-00-DX2.svs", "x", "y")
    assert one & other == {("patient", fold("TCGA-A7-A0CJ"))}
    assert not patient_keys("S1", "NA", "") & patient_keys("S2", "NA", "")


@given(st.lists(st.lists(st.integers(0, 12), max_size=4), max_size=14))
def test_groups_are_those_of_a_plain_graph_search(keys):
    groups = connected(keys)
    for start, own in enumerate(keys):
        reached, open_ends = {start}, [start]
        while open_ends:
            here = set(keys[open_ends.pop()])
            new = {i for i, others in enumerate(keys) if here & set(others)} - reached
            reached |= new
            open_ends += new
        assert {i for i, group in enumerate(groups) if group == groups[start]} == reached, own
    assert list(dict.fromkeys(groups)) == sorted(set(groups))


A = "TCGA-AA-0001-01Z-00-DX1.0a1b2c3d-0000-4000-8000-00000000000a"
B = "TCGA-AA-0001-01Z-00-DX10.0a1b2c3d-0000-4000-8000-00000000000b"


@pytest.mark.parametrize(
    ("name", "slides", "expected"),
    [
        ("S1", ["S1", "S10"], "S1"),
        ("a/S1.h5", ["S10", "S1"], "S1"),
        ("s1", ["S1", "S10"], "S1"),
        ("S1", ["S1.svs"], "S1.svs"),
        ("123.0", ["123", "124"], "123"),
        ("45", ["0045", "0046"], "0045"),
        ("0045", ["45", "46"], "45"),
        ("Mu\u0308ller 7", ["M\u00fcller  7"], "M\u00fcller  7"),
        ("S1.ome.tif", ["S1.ome"], "S1.ome"),
        ("1", ["1", "01"], "1"),
        ("01.svs", ["1", "01"], "01"),
        ("001", ["1", "01"], None),  # two slides come into question
        ("s1", ["S1", "S1.svs"], None),
        ("S1.svs", ["S1", "S1.svs"], "S1.svs"),
        ("TCGA-AA-0001-01Z-00-DX1", [B, A], A),  # DX1 is not DX10
        (A, ["TCGA-AA-0001-01Z-00-DX10", "TCGA-AA-0001-01Z-00-DX1"], "TCGA-AA-0001-01Z-00-DX1"),
        (A.upper(), [A, B], A),
        ("TCGA-AA-0001-01Z-00-DX1", [A, A[:-1] + "c"], None),
        (A, [A[:-1] + "c"], None),  # another file of that name
        ("TCGA-AA-0001", [A], None),  # a patient is no slide
        ("S21", ["S21.5"], None),
        ("S21.5", ["S21.7", "S21"], None),
        ("S", ["S1"], None),
    ],
)
def test_a_name_finds_the_slide_it_means(name, slides, expected):
    assert SlideNames(slides).find(name) == ([expected] if expected else [])


@given(st.lists(IDS, min_size=1, max_size=6, unique=True))
def test_every_slide_is_found_by_its_own_spelling(slides):
    names = SlideNames(slides)
    assert [names.find(slide) for slide in slides] == [[slide] for slide in slides]


def test_a_case_finds_its_slides_however_it_is_spelt():
    names = SlideNames(["S1", "S2", "S3", A], ["0010", "10.0", "nan", ""])
    assert names.of_case("10") == ["S1", "S2"] and names.of_case("tcga-aa-0001") == [A]
    assert SlideNames(["S1", "S2"], [("C1", "P1"), ("C2", "P1")]).of_case("p1") == ["S1", "S2"]
    assert names.of_case("nan") == names.of_case("") == names.of_case("11") == []


@example("/\r0")  # a folder before a blank
@given(st.text())
def test_an_id_is_a_name_without_folder(name):
    clean = clean_id(name)
    assert "/" not in clean and "\\" not in clean and clean == clean.strip()
    assert clean_id(f"a/b/{clean}.h5") == clean or not clean
