"""Splits: no patient twice, labels even, and a check that finds exactly what is wrong."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from pathflip_jax import cli
from pathflip_jax.evaluate import splits

LABELS = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "labels"


def rows_of(patients, labels=None, sites=None):
    labels = labels or ["a"] * len(patients)
    sites = sites or [""] * len(patients)
    return [
        {"slide_id": f"S{i}", "patient_id": p, "label": label, "site": site, "split": ""}
        for i, (p, label, site) in enumerate(zip(patients, labels, sites, strict=True))
    ]


def cohort_of(seed, slides=400):
    """Slides of a few to a patient, of three labels of 60, 30 and 10 percent, from sites of very different size."""
    rng = np.random.default_rng(seed)
    patients = np.sort(rng.integers(0, slides // 2, slides))
    label_of = rng.choice(["a", "b", "c"], slides // 2, p=[0.6, 0.3, 0.1])
    site_of = rng.zipf(1.6, slides // 2) % 23
    return rows_of([f"P{p}" for p in patients], label_of[patients].tolist(), [f"T{site_of[p]}" for p in patients])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=40),
    st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5),
    st.integers(0, 5),
    st.booleans(),
)
def test_no_patient_and_where_asked_no_site_is_in_two_parts(slides, shares, seed, by_site):
    rows = rows_of([f"P{p}" for p, _, _ in slides], [x for _, x, _ in slides], [f"T{s}" for _, _, s in slides])
    part = splits.make_split(rows, shares, seed, by_site)
    assert part == splits.make_split(rows, shares, seed, by_site)
    for key in ("patient_id", "site") if by_site else ("patient_id",):
        assert len({(row[key], p) for row, p in zip(rows, part, strict=True)}) == len({row[key] for row in rows})


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_as_even_as_scikit_learns(seed):
    """Largest error of a label's share over folds: no worse than StratifiedGroupKFold's, which knows no sites."""
    rows = cohort_of(seed)
    labels, patients = (np.array([row[key] for row in rows]) for key in ("label", "patient_id"))
    theirs = np.zeros(len(rows), int)
    for fold, (_, test) in enumerate(
        StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, patients)
    ):
        theirs[test] = fold

    def error(part):
        shares = [np.mean(np.asarray(part)[labels == label] == fold) for label in "abc" for fold in range(5)]
        return np.abs(np.array(shares) - 0.2).max()

    assert error(splits.make_split(rows, [1] * 5, seed)) <= error(theirs) + 0.02


def test_sites_are_spread_and_shares_kept():
    rows = cohort_of(1)
    part = np.array(splits.make_split(rows, [0.6, 0.4], 0))
    assert np.mean(part == 0) == pytest.approx(0.6, abs=0.01)
    for site, count in Counter(row["site"] for row in rows).items():
        if count >= 40:
            inside = np.mean([p == 0 for row, p in zip(rows, part, strict=True) if row["site"] == site])
            assert inside == pytest.approx(0.6, abs=0.12), site
    assert part.tolist() != splits.make_split(rows, [0.6, 0.4], 1)


def test_whole_sites_keep_the_labels_near_their_shares():
    rows = cohort_of(2)
    part = np.array(splits.make_split(rows, [0.7, 0.3], 0, by_site=True))
    labels = np.array([row["label"] for row in rows])
    for label in "ab":
        assert np.mean(part[labels == label] == 0) == pytest.approx(0.7, abs=0.1)


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_command_writes_the_table_with_its_split(tmp_path, capsys):
    rows = [row | {"stain": "H&E"} for row in cohort_of(3, 120)]
    table = write_table(tmp_path / "slides.csv", rows)
    assert (
        cli.main(["split", str(table), "--shares", "0.5", "0.2", "0.3", "--out", str(tmp_path / "out.csv"), "--json"])
        == 0
    )
    check = json.loads(capsys.readouterr().out)
    assert not check["faulty"] and {name for name in check["sides"]} == {"train", "val", "test"}
    with open(tmp_path / "out.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["slide_id"] for row in found] == [row["slide_id"] for row in rows]
    assert {row["stain"] for row in found} == {"H&E"}
    assert Counter(row["split"] for row in found) == {name: side["slides"] for name, side in check["sides"].items()}


def test_every_fold_is_test_once_and_the_folder_is_whole(tmp_path, capsys):
    table = write_table(tmp_path / "slides.csv", cohort_of(4, 120))
    command = ["split", str(table), "--folds", "4", "--out", str(tmp_path / "folds")]
    assert cli.main(command) == 0
    tested = Counter()
    for path in sorted((tmp_path / "folds").iterdir()):
        with open(path, newline="") as file:
            tested.update(row["slide_id"] for row in csv.DictReader(file) if row["split"] == "test")
    assert set(tested.values()) == {1} and len(tested) == 120
    assert cli.main(command) == cli.WRONG_INPUT and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--shares", "0.5", "-0.5"], "numbers above 0"),
        (["--shares", "1"], "expected two"),
        (["--folds", "2"], "at least 3"),
        (["--by-site"], "the site of S0"),
        (["--check"], "no split to check"),
        (["--check", "--folds", "3"], "makes none"),
        ([], "where to write"),
    ],
)
def test_what_cannot_be_split_is_named(tmp_path, capsys, change, message):
    table = write_table(tmp_path / "slides.csv", rows_of(["P0", "P1", "P2"]))
    out = [] if "--check" in change or not change else ["--out", str(tmp_path / "out.csv")]
    assert cli.main(["split", str(table), *change, *out]) == cli.WRONG_INPUT
    assert message in capsys.readouterr().err and not (tmp_path / "out.csv").exists()


def test_a_slide_listed_twice_cannot_be_split_and_is_found_by_the_check(tmp_path, capsys):
    rows = rows_of(["P0", "P1", "P2", "P3"])
    table = write_table(tmp_path / "slides.csv", rows + rows[:1])
    assert cli.main(["split", str(table), "--out", str(tmp_path / "out.csv")]) == cli.WRONG_INPUT
    assert "S0" in capsys.readouterr().err
    found = splits.check_split([row | {"split": "train"} for row in rows + rows[:1]])
    assert [(finding.kind, finding.of) for finding in found.faults] == [("slides listed twice", ["S0"])]


def test_a_sound_split_has_no_fault_and_sites_are_told():
    rows = rows_of(["P0", "P1", "P2", "P3"], list("abab"), ["X", "X", "Y", "X"])
    rows = [row | {"split": side} for row, side in zip(rows, ("train", "train", "test", "test"), strict=True)]
    found = splits.check_split(rows)
    assert not found.faults and [finding.kind for finding in found.findings] == ["shared sites"]
    assert found.sites[0] == {"site": "X", "slides": {"train": 2, "test": 1}, "labels": {"a": 1, "b": 2}}


def test_a_label_that_a_side_lacks_and_tissue_under_a_wrong_label():
    ids = ["TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0002-11Z-00-DX1", "TCGA-BB-0003-11A-01-TS1", "TCGA-BB-0004-01Z-00-DX1"]
    labels, sides = ["tumor", "tumor", "Normal", "other"], ["train", "train", "train", "test"]
    rows = [
        {"slide_id": i, "patient_id": i[:12], "label": label, "split": side}
        for i, label, side in zip(ids, labels, sides, strict=True)
    ]
    wrong, *lacking = splits.check_split(rows).faults
    assert wrong.kind == "normal tissue under a tumor label" and wrong.of == [ids[1]]
    assert [finding.of for finding in lacking] == [["other"], ["Normal", "tumor"]]
    assert splits.site_of(rows[2]) == "BB"


def published(name):
    path = LABELS / name
    if not path.exists():
        pytest.skip(f"no real label files: {path} is absent, set PATHFLIP_TEST_DATA")
    return path


def test_the_published_rcc_split_shares_fourteen_patients(capsys):
    train, test = published("TCGA_RCC_train.csv"), published("TCGA_RCC_test.csv")
    assert cli.main(["split", "--check", f"train={train}", f"test={test}", "--json"]) == 1
    found = {finding["kind"]: finding["of"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    ids = {}
    for side, path in (("train", train), ("test", test)):
        with open(path, encoding="utf-8-sig", newline="") as file:
            ids[side] = [row["slide_id"] for row in csv.DictReader(file)]
    expected = {name[:12].upper() for name in ids["train"]} & {name[:12].upper() for name in ids["test"]}
    assert len(expected) == 14 and set(found["shared patients"]) == expected
    normal = {name for name in ids["train"] + ids["test"] if name[13:15] == "11"}
    assert len(normal) == 12 and set(found["normal tissue under a tumor label"]) == normal
    assert "slides listed twice" not in found and found["shared sites"]


def test_camelyon16_alone_has_no_fault(capsys):
    assert cli.main(["split", "--check", f"test={published('Camelyon16_test.csv')}"]) == 0
    assert "Normal 80, Tumor 49" in capsys.readouterr().out
