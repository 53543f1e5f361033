"""Patients of a slide table: merged over spellings, but never for lack of an id."""

from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.evaluate.patients import name_patients, name_sites, patients

SPELLINGS = ("{}", "{}.0", "0{}", " {} ", "00{}.0")


def row(slide, patient="", case="", split="train"):
    return {"slide_id": slide, "patient_id": patient, "case_id": case, "split": split}


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(SPELLINGS)), min_size=1, max_size=14))
def test_a_patient_is_one_in_every_spelling(slides):
    rows = [row(f"S{i}", spelling.format(number)) for i, (number, spelling) in enumerate(slides)]
    names = [found.name for found in patients(rows)]
    for (one, _), name in zip(slides, names, strict=True):
        assert {other for (number, _), other in zip(slides, names, strict=True) if number == one} == {name}
    assert len(set(names)) == len({number for number, _ in slides})
    assert [found["patient_id"] for found in name_patients(rows)] == names


def test_the_most_natural_spelling_names_a_patient():
    for spellings, name in ((["123.0", "123"], "123"), (["45", "45", "0045"], "0045"), (["p-1", "P-1", "P-1"], "P-1")):
        assert {found.name for found in patients([row(f"S{i}", p) for i, p in enumerate(spellings)])} == {name}


def test_nobody_is_not_one_patient():
    rows = [row(f"S{i}", missing) for i, missing in enumerate(["", "nan", "NA", "None", "unknown"])]
    assert [found.name for found in patients(rows)] == ["S0", "S1", "S2", "S3", "S4"]


def test_a_barcode_a_case_and_a_slide_join_what_columns_part():
    one = [row("TCGA-A7-A0CJ-01Z-00-DX1", "TCGA-A7-A0CJ-01Z-00-DX1"), row("TCGA-A7-A0CJ-01Z-00-DX2", "x")]
    assert {found.name for found in patients(one)} == {"TCGA-A7-A0CJ"}
    cptac = [row("C3L-00001-21", "C3L-00001-21"), row("C3L-00001-22", "C3L-00001-22"), row("C3L-00002-21", "y")]
    assert [found.name for found in patients(cptac)] == ["C3L-00001", "C3L-00001", "y"]
    chain = [row("S1", "P1", "C1"), row("S2", "P2", "C1"), row("S3", "P2"), row("S4", "P4")]
    assert [found.name for found in patients(chain)] == ["P2", "P2", "P2", "P4"]
    assert {found.name for found in patients([row("S1.svs", split="train"), row("s1", split="test")])} == {"S1.svs"}


def test_spellings_are_told_with_their_splits():
    first = patients([row("S1", "0045"), row("S2", "45", split="test"), row("S3", "45", split="")])[0]
    assert str(first) == "0045 (train), 45 (test)" and first.splits == ["train", "test", ""] and first.ids == 1
    assert str(patients([row("S1", "P1"), row("S2", "P1", split="test")])[0]) == "P1"


def test_sites_are_one_in_every_spelling():
    assert name_sites(["Site A", "site a", "Site A", "", "7.0", "7"]) == ["Site A"] * 3 + ["", "7", "7"]
