"""Assignment of slides to patients: slide table, records and text table agree, complete each other, or are reported."""

import pytest

from pathflip_jax.data.texts.cases import NO_TABLE, Sources, bag_keys, slides_of_case
from pathflip_jax.data.texts.identity import connected
from pathflip_jax.data.texts.text import SlideText

FILES = {"slides": "slides.csv", "records": "records/", "texts": "reports.jsonl"}


def table(**slides: tuple[str, str]) -> Sources:
    """A slide table of (case_id, patient_id) by slide."""
    return Sources({s: {"slide_id": s, "case_id": c, "patient_id": p} for s, (c, p) in slides.items()}, **FILES)


def groups(sources: Sources, records: dict[str, str], texts: dict[str, str] | None = None) -> list[int]:
    members = [(slide,) for slide in records]
    grouped = {bag: [SlideText(bag, (texts or {}).get(bag[0], ""), "x")] for bag in members}
    return connected(bag_keys(members, grouped, records, sources))


def test_the_patients_of_the_slide_table_join_slides_that_records_know_nothing_of():
    sources = table(a=("C1", "P1"), b=("C2", "P1"), c=("C3", "P2"))
    assert groups(sources, {"a": "a", "b": "b", "c": "c"}) == [0, 0, 1]
    assert groups(NO_TABLE, {"a": "a", "b": "b", "c": "c"}) == [0, 1, 2]


@pytest.mark.parametrize("spelt", ["p-1", " P-1 ", "P\uff0d1"])
def test_names_are_compared_folded(spelt):
    assert groups(table(a=("", "P-1"), b=("", spelt)), {"a": "a", "b": "b"}) == [0, 0]
    assert groups(table(a=("", "P-1")), {"a": spelt}) == [0]


def test_a_missing_cell_is_nobodys_name():
    assert groups(table(a=("nan", "NA"), b=("nan", "NA")), {"a": "a", "b": "b"}, {"a": "None", "b": "None"}) == [0, 1]


def test_a_text_fills_what_the_table_leaves_open_in_its_own_terms():
    """A name that the table has for a patient is that patient; one that it has for a case is that case."""
    sources = table(a=("", ""), b=("C9", "P1"), c=("C8", "P2"))
    records = {"a": "a", "b": "b", "c": "c"}
    assert groups(sources, records, {"a": "P1"}) == [0, 0, 1]
    assert groups(sources, records, {"a": "c8"}) == [0, 1, 0]
    assert groups(sources, records, {"a": "X"}) == [0, 1, 2]


def test_numbers_of_cases_and_of_patients_may_coincide():
    """Case 1 is of patient 2, case 2 of patient 1: the text's "1" agrees with a's case and says nothing of b."""
    sources = table(a=("1", "2"), b=("2", "1"))
    assert groups(sources, {"a": "a", "b": "b"}, {"a": "1", "b": "1"}) == [0, 1]


def test_barcodes_of_slide_ids_join_slides_and_disagree_with_no_other_numbering():
    records = {"TCGA-A7-A0CJ-01Z-00-DX1": "TCGA-A7-A0CJ", "TCGA-A7-A0CJ-01Z-00-DX2": "TCGA-A7-A0CJ"}
    one, other = records
    sources = Sources({s: {"slide_id": s, "case_id": p, "patient_id": p} for s, p in {one: "P1", other: "P2"}.items()})
    assert groups(sources, records) == [0, 0]
    assert groups(sources, records, {one: "TCGA-A7-A0CJ-01Z"}) == [0, 0]


@pytest.mark.parametrize(
    ("sources", "records", "texts", "said"),
    [
        (table(a=("C1", "P1")), {"a": "P2"}, {}, "slide a belongs to C1 / P1 in slides.csv, but to P2 in records/"),
        (table(a=("C1", "P1")), {"a": "a"}, {"a": "C2"}, "to C1 / P1 in slides.csv, but to C2 in reports.jsonl"),
        (
            table(a=("P1", "P1")),
            {"a": "P1"},
            {"a": "P3"},
            "slide a belongs to P1 in slides.csv, but to P3 in reports.jsonl",
        ),
        (Sources(**FILES), {"a": "P1"}, {"a": "P3"}, "slide a belongs to P1 in records/, but to P3 in reports.jsonl"),
    ],
)
def test_tables_that_disagree_are_named_with_both_values(sources, records, texts, said):
    with pytest.raises(ValueError) as error:
        groups(sources, records, texts)
    assert said in str(error.value) and "must agree" in str(error.value)


def test_records_of_the_case_and_texts_of_the_patient_agree_where_the_table_knows_both():
    assert groups(table(a=("C1", "P1"), b=("C2", "P1")), {"a": "C1", "b": "C2"}, {"a": "P1", "b": "p1"}) == [0, 0]


def test_a_case_of_the_table_finds_its_slides_else_a_patient_does():
    rows = table(a=("1", "2"), b=("2", "1"), c=("", "P7"), d=("", "p7")).rows.values()
    find = slides_of_case(rows)
    assert find("1") == ("a",) and find("p7") == ("c", "d") and find("nan") == find("Q") == ()
