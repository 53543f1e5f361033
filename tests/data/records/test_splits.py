"""Splits of a slide table: an unknown name, and the counts of each."""

import pytest

from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.splits import count_splits, describe, read_matched_table, unknown_split_message

ROWS = [{"split": split} for split in ("train", "train", "val", "")]


@pytest.mark.parametrize(
    "split, hint",
    [
        ("validation", "; did you mean val?"),
        ("VAL", "; did you mean val?"),
        ("trian", "; did you mean train?"),
        ("test", ""),
        ("nightly", ""),
    ],
)
def test_a_split_that_no_row_names(split, hint):
    assert unknown_split_message("t.csv", split, ROWS) == (
        f"t.csv: no slide is in split {split!r}; the splits are (empty) (1), train (2), val (1){hint}"
    )


def test_a_split_is_required_of_table_and_records(tiny_cohort, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,patient_id,split\ns00.svs,P00,train\nS01,P00,train\nX1,P9,train\nX2,P9,val\nS05,P5,\n")
    held, notes = read_matched_table(str(table), "records", Records(tiny_cohort.records))
    assert held.require("train", "") == ["S00", "S01"] and len(notes) == 2
    with pytest.raises(
        ValueError, match=r"none of the 1 slides of split 'val' \(X2\) is among the 24 slides of records"
    ):
        held.require("val", "mend it")
    with pytest.raises(ValueError, match="the splits are .*; mend it"):
        held.require("test", "mend it")
    counts = count_splits(held, Records(tiny_cohort.records), {"train": [("S00", "S01"), ("S00",)]})
    assert counts == {
        "train": {"slides": 2, "patients": 1, "texts": 2, "no_text": 0, "no_record": 1},
        "val": {"slides": 0, "patients": 0, "no_record": 1},
        "without a split": {"slides": 1, "patients": 1, "no_record": 0},
        "not_in_table": 21,
    }


def test_without_a_table_all_slides_are_one_split(tiny_cohort):
    counts = count_splits(None, Records(tiny_cohort.records), {"all": [("S00",)]})
    assert counts == {"all": {"slides": 24, "patients": 20, "texts": 1, "no_text": 23}}
    assert describe(counts, validates=False).startswith(
        "data: all 24 slides of 20 patients, 1 texts (23 have no text); no validation"
    )
