"""Published splits of CLAM and Patho-Bench: checked for leaks, and joined with a table of labels and patients."""

import csv
import json

import pytest

from pathflip_jax import cli

LABELS = "case_id,slide_id,label\n" + "".join(f"P{i // 2},S{i}.svs,{'ab'[i % 2]}\n" for i in range(10))
LISTS = ",train,val,test\n0,S0,S4,S6\n1,S1,S5,S7\n2,S2,,\n3,S3,,\n"


@pytest.fixture
def labels(tmp_path):
    (tmp_path / "labels.csv").write_text(LABELS)
    (tmp_path / "splits_0.csv").write_text(LISTS)
    return tmp_path / "labels.csv"


def split(capsys, *options):
    code = cli.main(["split", *map(str, options)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_clam_split_is_joined_with_its_labels_and_patients(tmp_path, labels, capsys):
    out = tmp_path / "slides.csv"
    code, said = split(capsys, labels, "--from", tmp_path / "splits_0.csv", "--out", out, "--json")
    assert code == 0
    check = json.loads(said)
    assert {side: found["slides"] for side, found in check["sides"].items()} == {"train": 4, "val": 2, "test": 2}
    assert [(finding["kind"], finding["of"]) for finding in check["findings"]] == [("slides on no side", ["S8", "S9"])]
    with open(out, newline="") as file:
        rows = {row["slide_id"]: (row["patient_id"], row["label"], row["split"]) for row in csv.DictReader(file)}
    assert rows["S4"] == ("P2", "a", "val") and rows["S9"] == ("P4", "b", "") and len(rows) == 10


def test_the_check_finds_patients_and_slides_on_two_sides_of_a_clam_split(tmp_path, labels, capsys):
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,S0,S2,S1\n1,S3,,S3\n2,X1,,\n")
    code, said = split(capsys, "--check", labels, "--from", tmp_path / "splits_0.csv", "--json")
    found = {finding["kind"]: finding for finding in json.loads(said)["findings"]}
    assert code == 1
    assert found["shared patients"]["of"] == ["P0", "P1"] and found["slides listed twice"]["of"] == ["S3"]
    assert found["slides not in the table"]["of"] == ["X1"] and not found["slides not in the table"]["fault"]
    out = tmp_path / "slides.csv"
    code, said = split(capsys, labels, "--from", tmp_path / "splits_0.csv", "--out", out)
    assert code == cli.WRONG_INPUT and "(S3: train and test)" in said and not out.exists()


def test_a_clam_split_alone_is_checked_too(tmp_path, labels, capsys):
    (tmp_path / "s.csv").write_text(",train,val,test\n0,TCGA-AA-0001-01Z-00-DX1,S2,TCGA-AA-0001-01Z-00-DX2\n")
    code, said = split(capsys, "--check", tmp_path / "s.csv")
    assert code == 1 and "TCGA-AA-0001" in said


@pytest.fixture
def task(tmp_path):
    """A Patho-Bench task of two folds, of which the second shares a patient."""
    rows = ["case_id\tslide_id\ter\tfold_0\tfold_1", "c1\tS1\t0\ttrain\ttrain", "c1\tS2\t0\ttrain\ttest"]
    rows += ["c2\tS3\t1\ttrain\ttrain", "c3\tS4\t0\ttest\ttest", "c4\tS5\t1\ttest\ttest"]
    (tmp_path / "k=all.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "config.yaml").write_text("task_col: er\nlabel_dict: {0: negative, 1: positive}\n")
    return tmp_path / "k=all.tsv"


def test_each_fold_of_a_task_is_checked(task, capsys):
    code, said = split(capsys, "--check", task, "--fold", "0")
    assert code == 0 and "train  3 slides of 2 patients: negative 2, positive 1" in said
    assert "no column label" not in said
    code, said = split(capsys, "--check", task, "--fold", "fold_1")
    assert code == 1 and "c1" in said
    code, said = split(capsys, "--check", task)
    assert code == cli.WRONG_INPUT and "2 folds (fold_0, fold_1): choose one with --fold" in said
    code, said = split(capsys, "--check", task, "--fold", "2")
    assert code == cli.WRONG_INPUT and "no fold '2'; its folds are fold_0, fold_1" in said


def test_a_fold_of_a_task_for_the_slides_of_another_table(tmp_path, task, capsys):
    (tmp_path / "mine.csv").write_text(
        "slide_id,patient_id,label\n" + "".join(f"s{i}.svs,P{i},x\n" for i in range(1, 7))
    )
    out = tmp_path / "out.csv"
    code, _ = split(capsys, tmp_path / "mine.csv", "--from", task, "--fold", "0", "--out", out)
    assert code == 0
    with open(out, newline="") as file:
        found = {row["slide_id"]: row["split"] for row in csv.DictReader(file)}
    assert found == {"s1": "train", "s2": "train", "s3": "train", "s4": "test", "s5": "test", "s6": ""}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--from", "other.csv", "--out", "o.csv"], "none of its 1 slides (Y1) is among the 10 slides of the table"),
        (["--from", "labels.csv", "--out", "o.csv"], "labels.csv: no slide in it is in a split"),
        (["--from", "splits_0.csv", "--out", "o.csv", "--folds", "5"], "drop --shares, --folds and --by-site"),
        (["--from", "splits_0.csv"], "no output file"),
    ],
)
def test_what_cannot_be_joined_is_named(tmp_path, labels, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("slide_id,split\nY1,train\n")
    code, said = split(capsys, labels, *options)
    assert code == cli.WRONG_INPUT and message in said and not (tmp_path / "o.csv").exists()
