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


SPELLINGS = ("{}", "{}.0", "0{}", " {} ")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(SPELLINGS)), min_size=2, max_size=30),
    st.lists(st.floats(0.1, 1.0), min_size=2, max_size=4),
    st.integers(0, 5),
)
def test_no_patient_is_in_two_parts_however_it_is_spelt(slides, shares, seed):
    rows = rows_of([spelling.format(number) for number, spelling in slides])
    part = splits.make_split(rows, shares, seed)
    assert len({(number, p) for (number, _), p in zip(slides, part, strict=True)}) == len({n for n, _ in slides})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=6, max_size=60), st.integers(2, 4), st.integers(0, 5))
def test_every_part_has_every_label_of_which_there_are_enough(kinds, parts, seed):
    labels = ["abc"[max(0, kind - 7)] for kind in kinds]  # b and c are rare
    part = splits.make_split(rows_of([f"P{i}" for i in range(len(labels))], labels), [0.7, *[0.1] * (parts - 1)], seed)
    for label, count in Counter(labels).items():
        if count >= parts:
            assert {p for p, own in zip(part, labels, strict=True) if own == label} == set(range(parts))


def test_a_rare_label_is_exchanged_so_that_shares_stay():
    rows = rows_of([f"P{i}" for i in range(60)], ["b" if i < 3 else "a" for i in range(60)])
    part = splits.make_split(rows, [0.7, 0.1, 0.2], 0)
    assert sorted(part[:3]) == [0, 1, 2] and [part.count(p) for p in range(3)] == [42, 6, 12]


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


def test_a_label_of_any_name_is_balanced_and_written(tmp_path, capsys):
    rows = [{"slide_id": f"S{i}", "patient_id": f"P{i}", "Subtype": "LUSC" if i < 6 else "LUAD"} for i in range(60)]
    rows[7]["Subtype"] = "unknown"
    table, out = write_table(tmp_path / "slides.csv", rows), tmp_path / "out.csv"
    assert cli.main(["split", str(table), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no column label; columns that could be one: subtype (2 values); choose with --label" in said
    assert cli.main(["split", str(table), "--label", "Subtype", "--out", str(out), "--json"]) == 0
    check = json.loads(capsys.readouterr().out)
    assert not check["findings"] and all(side["labels"]["LUSC"] >= 1 for side in check["sides"].values())
    with open(out, newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["label"] for row in found] == ["" if i == 7 else row["Subtype"] for i, row in enumerate(rows)]
    assert cli.main(["split", str(out), "--check", "--label", "grade"]) == cli.WRONG_INPUT
    assert (
        "out.csv, line 2: no column 'grade', found slide_id, patient_id, label, split, subtype"
        in capsys.readouterr().err
    )


def test_the_table_that_is_written_calls_each_patient_by_one_name(tmp_path, capsys):
    rows = rows_of([f"{i % 20}{'.0' if i < 20 else ''}" for i in range(40)])
    table, out = write_table(tmp_path / "slides.csv", rows), tmp_path / "out.csv"
    assert cli.main(["split", str(table), "--out", str(out)]) == 0
    assert "20 patients are written in more than one way, and count as one each (0.0 = 0, " in capsys.readouterr().out
    with open(out, newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["patient_id"] for row in found} == {str(i) for i in range(20)}
    assert len({(row["patient_id"], row["split"]) for row in found}) == 20


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        ("S1,123.0", "S2,123", "123.0 (train), 123 (test)"),
        ("S1,0045", "S2,45", "0045 (train), 45 (test)"),
        ("S1,p-01", "S2,P-01", "p-01 (train), P-01 (test)"),
        ("S1,Mu\u0308ller", "S2,M\u00fcller", "Mu\u0308ller (train), M\u00fcller (test)"),
        ("TCGA-A7-A0CJ-01Z-00-DX1,a", "TCGA-A7-A0CJ-01Z-00-DX2,b", "a (train), b (test)"),
        ("C3L-00001-21,a", "C3L-00001-22,b", "a (train), b (test)"),
        ("S1.svs,", "s1.SVS,", "S1 (train), s1 (test)"),
        ("0045,nan", "45,unknown", "0045 (train), 45 (test)"),
    ],
)
def test_the_check_finds_a_patient_on_two_sides_in_two_spellings(tmp_path, capsys, train, test, names):
    for side, line in (("train", train), ("test", test)):
        (tmp_path / side).write_text(f"slide_id,patient_id\n{line}\nother-{side},other-{side}\n", encoding="utf-8")
    assert cli.main(["split", "--check", *(f"{side}={tmp_path / side}" for side in ("train", "test"))]) == 1
    said = capsys.readouterr().out
    assert f"FAULT  1 patients have slides in more than one split ({names})" in said
    assert ("spreadsheets lose" in said) == ("0045" in train)
    assert ("listed twice (S1 = s1)" in said) == ("S1.svs" in train)


def test_unknown_patients_are_not_one(tmp_path, capsys):
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,patient_id,split\nS1,nan,train\nS2,NA,test\nS3,Unknown,test\n")
    assert cli.main(["split", "--check", str(table)]) == 0
    assert "test   2 slides of 2 patients" in capsys.readouterr().out


def test_sites_and_labels_in_two_spellings():
    rows = rows_of(["P0", "P1", "P2", "P3"], ["a", "A ", "a", "b"], ["X", "x", "X ", "Y"])
    part = splits.make_split(rows, [0.5, 0.5], 0, by_site=True)
    assert part[0] == part[1] == part[2]
    found = splits.check_split([row | {"split": "train"} for row in rows])
    assert [(finding.kind, finding.of) for finding in found.faults] == [("labels in several spellings", ["A  = a"])]
    assert [site["site"] for site in found.sites] == ["X", "Y"]


def test_every_fold_is_test_once_and_the_folder_is_whole(tmp_path, capsys):
    table = write_table(tmp_path / "slides.csv", cohort_of(4, 120))
    command = ["split", str(table), "--folds", "4", "--out", str(tmp_path / "folds")]
    assert cli.main(command) == 0
    tested = Counter()
    for path in sorted((tmp_path / "folds").iterdir()):
        with open(path, newline="") as file:
            tested.update(row["slide_id"] for row in csv.DictReader(file) if row["split"] == "test")
    assert set(tested.values()) == {1} and len(tested) == 120
    assert cli.main(command) == cli.WRONG_INPUT and "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--shares", "1"], "expected two"),
        (["--folds", "2"], "at least 3"),
        (["--by-site"], "the site of S0"),
        (["--check"], "no split to check"),
        (["--check", "--folds", "3"], "only checks"),
        ([], "no output file"),
    ],
)
def test_what_cannot_be_split_is_named(tmp_path, capsys, change, message):
    table = write_table(tmp_path / "slides.csv", rows_of(["P0", "P1", "P2"]))
    out = [] if "--check" in change or not change else ["--out", str(tmp_path / "out.csv")]
    assert cli.main(["split", str(table), *change, *out]) == cli.WRONG_INPUT
    assert message in capsys.readouterr().err and not (tmp_path / "out.csv").exists()


def test_shares_are_numbers_above_0(tmp_path, capsys):
    table = write_table(tmp_path / "slides.csv", rows_of(["P0", "P1", "P2"]))
    with pytest.raises(SystemExit):
        cli.main(["split", str(table), "--shares", "0.5", "-0.5", "--out", str(tmp_path / "out.csv")])
    assert "--shares: -0.5: expected a finite number above 0" in capsys.readouterr().err


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
