"""Split files of CLAM and Patho-Bench, as their tools write them, read as slide tables."""

import json
from itertools import zip_longest

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pathflip_jax.data.records.splits import unknown_split_message
from pathflip_jax.data.texts.split_files import Fold, one_fold, read_split_rows, side_and_table
from pathflip_jax.data.texts.text import match_rows, read_slide_table

SIDES = ("train", "val", "test")
TASK = (
    "datasets: [bracs]\ntask_col: Coarse\nlabel_dict:\n  0: Atypical tumor\n  1: Benign tumor\nsample_col: slide_id\n"
)


def clam(path, sides, boolean=False, index=True):
    """Write a split as CLAM's save_splits does: ids by side, shorter sides padded; or truth values by slide."""
    if boolean:
        rows = [(slide, *(own is side for own in sides)) for side in sides for slide in side]
    else:
        rows = [(number, *slides) for number, slides in enumerate(zip_longest(*sides, fillvalue=""))]
    lines = [("", *SIDES), *rows]
    path.write_text("".join(",".join(map(str, line if index else line[1:])) + "\n" for line in lines))
    return path


def patho_bench(folder, rows, folds=2, task=TASK):
    """Write a task as Patho-Bench does: k=all.tsv, and config.yaml unless `task` is empty."""
    lines = ["\t".join(["case_id", "slide_id", "Coarse", *(f"fold_{k}" for k in range(folds))])]
    (folder / "k=all.tsv").write_text("\n".join([*lines, *("\t".join(row) for row in rows)]) + "\n")
    if task:
        (folder / "config.yaml").write_text(task)
    return folder / "k=all.tsv"


def splits_of(table):
    return [(row["slide_id"], row["split"]) for row in read_slide_table(table)]


@pytest.mark.parametrize("boolean", [False, True], ids=["lists", "truth values"])
def test_clam_splits(tmp_path, boolean):
    sides = (["S1.svs", "S2", "TCGA-A7-A0CJ-01Z-00-DX2"], ["S4"], ["S5", "S6"])
    path = clam(tmp_path / "splits_0.csv", sides, boolean)
    assert splits_of(path) == [
        ("S1", "train"),
        ("S2", "train"),
        ("TCGA-A7-A0CJ-01Z-00-DX2", "train"),
        ("S4", "val"),
        ("S5", "test"),
        ("S6", "test"),
    ]
    assert read_slide_table(path)[2]["patient_id"] == "TCGA-A7-A0CJ"


def test_clam_lists_without_index_and_numbers_that_became_floats(tmp_path):
    # pandas fills a column that is shorter than the others with NaN, which makes floats of its numbers
    path = clam(tmp_path / "splits_0.csv", (["11", "12", "13"], ["14.0"], ["15.0"]), index=False)
    rows, _ = match_rows(read_slide_table(path), ["11", "12", "13", "14", "15"], path)
    assert [rows[str(slide)]["split"] for slide in range(11, 16)] == ["train", "train", "train", "val", "test"]


def test_clam_splits_as_pandas_writes_them_again(tmp_path):
    path = tmp_path / "splits_0.csv"
    path.write_text("Unnamed: 0,train,val,test\n0,S1,S3,S4\n1,S2,,\n")
    assert splits_of(path) == [("S1", "train"), ("S2", "train"), ("S3", "val"), ("S4", "test")]
    table = pa.table({"train": ["S1", "S2"], "val": ["S3", None], "test": ["S4", None], "Unnamed: 0": [0, 1]})
    parquet.write_table(table, tmp_path / "splits")
    assert splits_of(tmp_path / "splits") == splits_of(path)
    marks = pa.table({"Unnamed: 0": ["S1", "S2"], "train": [True, False], "val": [False, True], "test": [False] * 2})
    parquet.write_table(marks, tmp_path / "marks")
    assert splits_of(tmp_path / "marks") == [("S1", "train"), ("S2", "val")]


def test_a_slide_under_two_sides_is_named_with_both(tmp_path):
    path = clam(tmp_path / "splits_0.csv", (["S1", "S2"], ["S3"], ["S1.svs"]))
    with pytest.raises(ValueError, match=r"line 2, column test: slide S1 is listed .*first in .*line 2, column train"):
        read_slide_table(path)
    marks = tmp_path / "splits_0_bool.csv"
    marks.write_text(",train,val,test\nS1,True,False,True\nS2,False,False,False\n")
    assert [row.values["split"] for row in read_split_rows(marks)] == ["train", "test", ""]
    with pytest.raises(ValueError, match="column test: slide S1 is listed .*column train"):
        read_slide_table(marks)


def test_truth_values_beside_a_slide_id_keep_the_other_columns(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("slide_id,label,train,test\nS1,a,TRUE,FALSE\nS2,b,false,true\n")
    assert [(row["label"], row["split"]) for row in read_slide_table(path)] == [("a", "train"), ("b", "test")]


ROWS = [("c1", "B1", "0", "train", "test"), ("c1", "B2", "1", "train", "test"), ("c2", "B3", "1", "test", "val")]


@pytest.mark.parametrize("fold, found", [("0", ["train", "train", "test"]), ("fold_1", ["test", "test", "val"])])
def test_a_fold_of_patho_bench(tmp_path, fold, found):
    rows = read_slide_table(Fold(patho_bench(tmp_path, ROWS), fold))
    assert [row["split"] for row in rows] == found
    assert [row["label"] for row in rows] == ["Atypical tumor", "Benign tumor", "Benign tumor"]
    assert [(row["patient_id"], row["coarse"]) for row in rows] == [("c1", "0"), ("c1", "1"), ("c2", "1")]


def test_without_a_choice_there_is_no_split_and_the_folds_are_named(tmp_path):
    rows = read_slide_table(patho_bench(tmp_path, ROWS))
    assert {row["split"] for row in rows} == {""}
    said = unknown_split_message("k=all.tsv", "test", rows)
    assert said.endswith("the table has 2 folds (fold_0, fold_1): choose one with --fold (training: data.fold)")
    only = read_slide_table(patho_bench(tmp_path, [row[:4] for row in ROWS], folds=1))
    assert [row["split"] for row in only] == ["train", "train", "test"]


def test_a_single_column_called_fold_need_not_be_a_split(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("slide_id,fold_1\nS1,3\nS2,7\n")
    assert [row["split"] for row in read_slide_table(path)] == ["", ""]
    with pytest.raises(ValueError, match="split '3' of slide S1; expected train, val, test"):
        read_slide_table(Fold(path, "1"))


def test_labels_without_a_description_of_the_task(tmp_path):
    rows = read_slide_table(Fold(patho_bench(tmp_path, ROWS, task=""), "0"))
    assert [(row["label"], row["coarse"]) for row in rows][:2] == [("", "0"), ("", "1")]
    (tmp_path / "config.yaml").write_text("task_col: Coarse\n")
    assert [row["label"] for row in read_slide_table(Fold(tmp_path / "k=all.tsv", "0"))] == ["0", "1", "1"]
    (tmp_path / "config.yaml").write_text("batch_size: 3\n")  # another tool's file
    assert read_slide_table(tmp_path / "k=all.tsv")[0]["label"] == ""


@pytest.mark.parametrize(
    "task, message",
    [
        ("task_col: ER\n", r"config.yaml: task_col 'er' is not a column of .*k=all.tsv \(case_id, slide_id"),
        ("task_col: Coarse\nlabel_dict: {0: a}\n", r"line 3: coarse '1' is not in label_dict of .*config.yaml \(0\)"),
        ("task_col: [", "config.yaml: not valid YAML"),
    ],
)
def test_a_description_that_contradicts_its_table(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        read_slide_table(patho_bench(tmp_path, ROWS, task=task))


@pytest.mark.parametrize("fold", ["2", "fold_9", "first"])
def test_a_fold_that_is_not_there(tmp_path, fold):
    with pytest.raises(ValueError, match=f"k=all.tsv: no fold '{fold}'; its folds are fold_0, fold_1"):
        read_slide_table(Fold(patho_bench(tmp_path, ROWS), fold))
    with pytest.raises(ValueError, match="splits_0.csv: no fold '2'.*name the file of that fold"):
        read_slide_table(Fold(clam(tmp_path / "splits_0.csv", (["S1"], ["S2"], ["S3"])), "2"))


CELLS = st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["", "S1", "True", "train", "nan", "0"])
NAMES = st.sampled_from(["", "Unnamed: 0", "train", "val", "test", "slide_id", "label", "split", "fold_0", "fold_1"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(NAMES, CELLS | st.lists(CELLS, max_size=2), max_size=6), min_size=1, max_size=5))
def test_any_table_is_read_or_refused_by_name(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for table in (path, Fold(path, "0")):
        try:
            found = read_slide_table(table)
        except ValueError as error:
            assert "any.jsonl" in str(error)
        else:
            assert all(row["slide_id"] and row["split"] in ("", *SIDES) for row in found)


def test_a_split_file_without_slides(tmp_path):
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,,,\n")
    with pytest.raises(ValueError, match="no slide in it"):
        read_slide_table(tmp_path / "splits_0.csv")


def test_a_fold_needs_a_table():
    assert one_fold("a.csv", "") == one_fold("a.csv", None) == "a.csv" and one_fold(None, "") is None
    assert str(one_fold("k=all.tsv", "0")) == "k=all.tsv --fold 0"
    with pytest.raises(ValueError, match="name the table too"):
        one_fold(None, "0")


@pytest.mark.parametrize(
    "text, found",
    [
        ("test=x.csv", ("test", "x.csv")),
        ("test=d/k=all.tsv", ("test", "d/k=all.tsv")),
        ("d/k=all.tsv", ("", "d/k=all.tsv")),
        ("tests=x.csv", ("", "tests=x.csv")),
    ],
)
def test_a_side_before_a_file(text, found):
    assert side_and_table(text) == found
