"""Survival as a task: a model that knows is found out, patients are the units, faults of tables are named."""

import csv
import json

import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import finish_folder, shard_name, write_shard
from pathflip_jax.evaluate import run
from pathflip_jax.evaluate.protocols import Attention, read_protocol
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.inference.predictor import Embedding

pytest.importorskip("sksurv")

PATIENTS = {"train": 60, "val": 24, "test": 36}


def survival_rows(seed=0):
    """A row per slide: every fourth patient has two; the hidden risk decides the time, a quarter are censored."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient, split in enumerate(side for side, count in PATIENTS.items() for _ in range(count)):
        risk, until, last = rng.normal(), rng.exponential(), rng.uniform(10, 60)
        until *= 15 * np.exp(-1.5 * risk)
        for letter in "ab"[: 1 + (patient % 4 == 0)]:
            rows.append({
                "slide_id": f"S{patient:03d}{letter}", "patient_id": f"P{patient:03d}", "split": split,
                "os_months": f"{min(until, last) + 0.1:.1f}", "os_status": str(int(until <= last)),
                "site": ("north", "south", "west")[patient % 3], "age": str(60 + int(5 * risk + 3 * rng.normal()))
                if letter == "a" else "", "stage": "I" if patient % 2 else "II", "risk": risk,
            })  # fmt: skip
    return rows


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "risk"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Records of features without content, and the slide table."""
    folder, rows, rng = tmp_path_factory.mktemp("survival"), survival_rows(), np.random.default_rng(0)
    coords = (np.stack(np.meshgrid(np.arange(3), np.arange(2)), axis=-1).reshape(-1, 2) * 64).astype(np.int32)
    place = {"coords": coords, "patch_size": 64, "mpp": 0.5, "width": 192, "height": 128, "encoder": "tiny"}
    slides = [
        SlideFeatures(row["slide_id"], row["patient_id"], rng.normal(size=(6, 8)).astype(np.float32), **place)
        for row in rows
    ]
    (folder / "records").mkdir()
    write_shard(folder / "records" / shard_name(0), slides, edge_um=64.0)
    finish_folder(folder / "records", edge_um=64.0)
    return folder, rows


class Knowing:
    """A model that sees each patient's risk, and in one region of a slide more than in the others."""

    config = {}

    def __init__(self, rows, sign=1.0, noise=0.2):
        self.name, self.sign, self.noise = f"model {sign:g}", sign, noise
        self.risk = {row["slide_id"]: row["risk"] for row in rows}

    def encode_slides(self, slides):
        for slide in slides:
            rng = np.random.default_rng(int(slide.slide_id[1:4]))
            regions = self.noise * rng.normal(size=(3, 8)) + 1
            regions[:, 0] += self.sign * self.risk[slide.slide_id]
            yield Embedding(slide.slide_id, regions.mean(0), regions, np.zeros((3, 2)))


@pytest.fixture(scope="module")
def models(cohort):
    """Models by the names of their runs, and an attention MIL that is soon trained."""
    monkeypatch = pytest.MonkeyPatch()
    quick = read_protocol("strict")
    quick = quick._replace(attention=Attention(hidden=16, rounds=5, least_steps=15, learning_rate=1e-2))
    monkeypatch.setattr(run, "read_protocol", lambda name: quick)
    known = {"knowing": Knowing(cohort[1]), "blind": Knowing(cohort[1], sign=0.0)}
    monkeypatch.setattr(run, "load", lambda folder: known[str(folder)])
    monkeypatch.setattr(run, "is_language_run", lambda folder: False)
    yield known
    monkeypatch.undo()


@pytest.fixture(scope="module")
def scored(cohort, models, tmp_path_factory):
    """The scores of a model that knows, compared with a blind one."""
    folder = tmp_path_factory.mktemp("scored") / "out"
    return evaluate(cohort, folder, compare_to="blind", clinical=["stage"])["survival"]


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(run, "load", lambda folder: pytest.fail("a model was loaded"))
    monkeypatch.setattr(run, "is_language_run", lambda folder: False)


OPTIONS = {"survival_time": "OS_MONTHS", "survival_event": "OS_STATUS"}
NONE = dict.fromkeys(OPTIONS)


def evaluate(cohort, out, rows=None, name="knowing", **fields):
    fields = OPTIONS | fields
    slides = write(out.with_suffix(".slides.csv"), rows or cohort[1])
    return run.evaluate(EvaluationSpec(run=name, records=cohort[0] / "records", slides=slides, out=out, **fields))


def test_a_model_that_knows_beats_every_baseline_and_a_blind_one_none(scored):
    found = scored
    for probe in ("Cox", "attention MIL"):
        entry = found["probes"][probe]["c_index"]
        assert entry["value"] > 0.75 > 0.65 > entry["permuted"]["high"] and entry["low"] > 0.6
        assert entry["gain"]["mean patch feature"]["low"] > 0 and entry["gain"]["clinical columns"]["low"] > 0
        assert entry["difference"]["low"] > 0 and 0.3 < entry["compared"]["value"] < 0.7
        groups = found["groups"][probe]
        assert groups["p"] < 0.01 and groups["high risk"]["median"] < (groups["low risk"]["median"] or np.inf)
        assert groups["high risk"]["patients"] + groups["low risk"]["patients"] == 36
    low, high = (entry["permuted"][side] for side in ("low", "high"))
    assert low < 0.5 < high and (low + high) / 2 == pytest.approx(0.5, abs=0.04)
    assert found["sides"]["test"] == {"patients": 36, "slides": 45, "events": found["sides"]["test"]["events"],
                                      "strata": 1}  # fmt: skip
    assert (
        found["unit"] == "months" and found["chosen_on"] == "val" and found["clinical"] == ["stage = I", "stage = II"]
    )


def test_runs_of_several_seeds_are_averaged(cohort, scored, models, tmp_path):
    found = evaluate(cohort, tmp_path / "out", name=["knowing", "blind"], split="val")["survival"]
    entry = found["probes"]["Cox"]["c_index"]
    assert entry["value"] == pytest.approx(np.mean(entry["by_run"])) and entry["by_run"][0] > entry["by_run"][1] + 0.1
    assert found["sides"]["test"]["patients"] == 24 and found["chosen_on"] == "nothing" and "val" not in found["sides"]
    with open(tmp_path / "out" / "survival.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == 24 * ["knowing"] + 24 * ["blind"] + 24 * [
            "knowing"
        ] + 24 * ["blind"] + 24 * [""]


def test_few_events_and_scores_of_chance_are_told(cohort, models, tmp_path, caplog):
    found = evaluate(cohort, tmp_path / "out", name="blind", clinical=["age"])
    said = "\n".join(found["warnings"])
    assert "events among the scored patients are too few" in said and "Collins et al." in said
    assert "within the 95% range of permuted outcomes" in said and "no better than a Cox model of" in said
    assert "events among the scored patients are too few" in caplog.text
    assert "events are few: at least 100" in (tmp_path / "out" / "report.html").read_text()
    assert found["survival"]["clinical"] == ["age"]  # a number; slide b of a patient has none, and takes that of a
    assert found["survival"]["probes"]["clinical columns"]["c_index"]["value"] > 0.65


def test_strata_compare_within_and_cbioportal_writes_events_its_way(cohort, scored, tmp_path):
    words = {"0": "0:LIVING", "1": "1:DECEASED"}
    rows = [row | {"os_status": words[row["os_status"]]} for row in cohort[1]]
    found = evaluate(cohort, tmp_path / "out", rows, survival_strata="site")["survival"]
    assert found["sides"]["test"]["strata"] == 3 and found["strata"] == "site"
    one, other = (block["probes"]["Cox"]["c_index"]["value"] for block in (scored, found))
    assert one != other and other > 0.7
    assert "Stratified by “site” (3 strata)" in (tmp_path / "out" / "report.html").read_text()


def test_a_label_table_by_patient_gives_the_same_scores(cohort, scored, tmp_path):
    patients = {row["patient_id"]: row for row in cohort[1]}.values()
    columns = {"os.time": "os_months", "os": "os_status"}
    rows = [{"patient_id": row["patient_id"].lower()} | {new: row[old] for new, old in columns.items()}
            for row in patients]  # fmt: skip
    rows[5] |= {"os.time": "NA", "os": ""}
    table, bare = write(tmp_path / "labels.csv", rows), [
        {name: row[name] for name in ("slide_id", "patient_id", "split")} for row in cohort[1]
    ]  # fmt: skip
    how = {"survival_time": "OS.time", "survival_event": "OS", "label_table": table}
    found = evaluate(cohort, tmp_path / "out", bare, **how)
    assert found["survival"]["sides"]["test"] == scored["sides"]["test"]
    assert found["survival"]["left_out"] == {"train": 1, "val": 0, "test": 0}
    assert "1 patients without time and event are left out" in "".join(found["warnings"])
    assert found["survival"]["unit"] is None and "a unit that neither" in (tmp_path / "out" / "report.html").read_text()


def test_command_page_tables_and_comparison(cohort, models, tmp_path, capsys):
    slides = write(tmp_path / "slides.csv", cohort[1])
    command = ["evaluate", "knowing", "--records", str(cohort[0] / "records"), "--slides", str(slides)]
    command += ["--survival-time", "os_months", "--survival-event", "os_status", "--clinical", "stage"]
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Survival: os_months, ")]
    assert len(lines) == 2 and all("0.50" in line and "clinical columns" in line for line in lines)
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    with open(tmp_path / "a" / "survival.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["probe"] == "Cox"]
    group = scores["survival"]["groups"]["Cox"]["high risk"]
    assert len(rows) == 36 and sum(row["group"] == "high risk" for row in rows) == group["patients"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("Kaplan-Meier curves of high and low risk by the probe") == 2 and "Log-rank p" in page
    assert all((tmp_path / "a" / "figures" / f"survival_{i}.png").stat().st_size > 5000 for i in (1, 2))
    assert cli.main([*(["evaluate", "blind"] + command[2:]), "--out", str(tmp_path / "b")]) == 0
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    compared = json.loads((tmp_path / "c" / "compare.json").read_text())["rows"]
    assert [(row["task"], row["name"]) for row in compared] == [
        (["survival", "os_months", probe], "C-index") for probe in ("Cox", "attention MIL")
    ]
    assert compared[0]["values"][0]["value"] == scores["survival"]["probes"]["Cox"]["c_index"]["value"]
    assert compared[0]["differences"][0]["value"] < -0.1 and compared[0]["units"] == 36


def every(rows, **values):
    return [row | {name: value(row) if callable(value) else value for name, value in values.items()} for row in rows]


def one(rows, number=3, **values):
    return [row | (values if i == number else {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda rows: one(rows, os_months="-3"), {}, r"slides.csv, slide S002a: OS_MONTHS is '-3'; .* above 0"),
        (lambda rows: one(rows, os_months="0"), {}, "S002a: OS_MONTHS is '0'; expected a time above 0"),
        (lambda rows: one(rows, os_months=""), {}, "S002a: patient P002 has OS_STATUS '.', but OS_MONTHS is missing"),
        (lambda rows: one(rows, os_status="NA"), {}, "P002 has OS_MONTHS .*, but OS_STATUS is missing"),
        (lambda rows: one(rows, os_months="long"), {}, "OS_MONTHS is 'long'; expected a number, or an empty cell"),
        (lambda rows: one(rows, os_months="12,5"), {}, "OS_MONTHS is '12,5'; expected a number"),
        (lambda rows: one(rows, os_months="inf"), {}, "OS_MONTHS is 'inf'; expected a number"),
        (lambda rows: one(rows, os_months="12 months"), {}, "'12 months'; expected a number alone, in the same unit"),
        (lambda rows: one(rows, os_months="3650"), {}, "'3650', which is more than 120 years in months; convert"),
        (lambda rows: one(rows, os_status="2"), {}, "OS_STATUS is '2'; expected 1 or true .* 1:DECEASED"),
        (lambda rows: one(rows, os_status="dead"), {}, "OS_STATUS is 'dead'; expected"),
        (lambda rows: one(rows, 0, os_months="3"), {}, "slide S000b: OS_MONTHS of patient P000 is .*, but '3' in "),
        (lambda rows: one(rows, 0, split="test"), {}, "S000a: patient P000 is in the splits 'train' and 'test'"),
        (lambda rows: every(rows, os_status=lambda row: "0" if row["split"] == "test" else row["os_status"]), {},
         "split 'test' has 0 events among 36 patients"),
        (lambda rows: every(rows, os_status=lambda row: "0" if row["split"] == "train" else row["os_status"]), {},
         "split 'train' has 0 events among 60 patients"),
        (lambda rows: every(rows, os_months=7), {}, "all 60 patients of split 'train' have the time 7"),
        (lambda rows: every(rows, split="test"), {}, "no slide of split 'train' is in the records"),
        (lambda rows: every(rows, site="here"), {"survival_strata": "site"}, "of the stratum 'here'; expected several"),
        (lambda rows: every(rows, site=lambda row: row["patient_id"]), {"survival_strata": "site"},
         "the 60 patients of split 'train' are of 60 strata, and no two of one stratum can be compared"),
        (lambda rows: one(rows, site=""), {"survival_strata": "site"}, "no site of P002 .1 patients."),
        (lambda rows: every(rows, stage="I"), {"clinical": ["stage"]}, "column 'stage' is constant: it is 'I'"),
        (lambda rows: every(rows, age=""), {"clinical": ["age"]}, "'age' is constant: it is missing in all 60"),
        (lambda rows: rows, {"clinical": ["grade"]}, "slides.csv: no column 'grade'; the columns are"),
        (lambda rows: one(rows, 0, stage="IV"), {"clinical": ["stage"]}, "stage of patient P000 is 'II', but 'IV'"),
        (lambda rows: one(rows, -1 + 150, age="old"), {"clinical": ["age"]}, "age is 'old'; expected a number"),
        (lambda rows: rows, {"survival_event": None}, "pass survival-event too"),
        (lambda rows: rows, {"survival_time": None}, "pass survival-time too"),
        (lambda rows: rows, {"survival_unit": "days"}, "in months by its name, but survival-unit is 'days'"),
        (lambda rows: rows, {"survival_unit": "moons"}, "survival-unit 'moons': expected one of days"),
        (lambda rows: rows, {"split": "train"}, "score another split, such as test"),
    ],
)  # fmt: skip
def test_faulty_columns_are_named_before_a_model_is_loaded(cohort, no_model, tmp_path, change, fields, message):
    with pytest.raises(ValueError, match=message):
        evaluate(cohort, tmp_path / "out", change(cohort[1]), **fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"survival_strata": "site"}, "survival-strata 'site' belongs to survival"),
        ({"survival_unit": "days"}, "survival-unit 'days' belongs to survival"),
        ({"clinical": ["age"]}, "clinical columns are a baseline of survival and regression"),
    ],
)
def test_options_without_survival_are_refused(cohort, no_model, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        evaluate(cohort, tmp_path / "out", few_shot=["all"], **NONE | fields)


def test_a_machine_without_scikit_survival_is_told_the_extra(cohort, no_model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sksurv", None)
    with pytest.raises(ImportError, match=r"pip install pathflip-jax\[survival\]"):
        evaluate(cohort, tmp_path / "out")
