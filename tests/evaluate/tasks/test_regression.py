"""Regression as a task: metrics, baselines and files of a model that knows and of one that does not; faulty columns."""

import csv
import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from pathflip_jax import cli
from pathflip_jax.evaluate import run
from pathflip_jax.evaluate.protocols import Attention, read_protocol
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.inference.predictor import Embedding


class Knowing:
    """A model that sees the value of each slide in all of its regions, or nothing."""

    config = {}

    def __init__(self, values, sight):
        self.name, self.values, self.sight = f"sight {sight:g}", values, sight

    def encode_slides(self, slides):
        for slide in slides:
            rng = np.random.default_rng(int(slide.slide_id[1:]))
            regions = 0.1 * rng.normal(size=(3, 6)) + 1
            regions[:, 0] += self.sight * (self.values[slide.slide_id] - 50) / 10
            yield Embedding(slide.slide_id, regions.mean(0), regions, np.zeros((3, 2)))


@pytest.fixture(scope="module")
def rows(tiny_cohort):
    """The slide table with a value, and the age of the patient, which says nothing."""
    rng = np.random.default_rng(0)
    with open(tiny_cohort.slides, newline="") as file:
        return [row | {"purity": f"{rng.uniform(20, 80):.1f}", "age": str(40 + int(row["patient_id"][1:]) * 7 % 30)}
                for row in csv.DictReader(file)]  # fmt: skip


@pytest.fixture(scope="module")
def models(rows):
    """Models by the names of their runs, and an attention MIL that is soon trained."""
    values = {row["slide_id"]: float(row["purity"]) for row in rows}
    known = {"knowing": Knowing(values, 0.3), "blind": Knowing(values, 0.0)}
    quick = read_protocol("strict")
    quick = quick._replace(attention=Attention(hidden=16, rounds=15, dropout=0.0, learning_rate=2e-2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "read_protocol", lambda name: quick)
        patch.setattr(run, "load", lambda folder: known[str(folder)])
        patch.setattr(run, "is_language_run", lambda folder: False)
        yield known


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def evaluate(cohort, rows, out, name="knowing", **fields):
    slides = write(out.with_suffix(".slides.csv"), rows)
    fields = {"regression": ["purity"]} | fields
    return run.evaluate(EvaluationSpec(run=name, records=cohort.records, slides=slides, out=out, **fields))


def test_a_model_that_knows_is_better_than_what_knows_nothing(tiny_cohort, rows, models, tmp_path):
    found = evaluate(tiny_cohort, rows, tmp_path / "out", compare_to="blind", clinical=["age"])
    (block,) = found["regression"]
    with open(tmp_path / "out" / "regression_1.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for probe in ("ridge", "attention MIL"):
        entry, own = block["probes"][probe], [row for row in table if row["probe"] == probe]
        values, predicted = (np.array([float(row[name]) for row in own]) for name in ("value", "predicted"))
        assert len(own) == 6 and entry["r2"]["value"] == pytest.approx(metrics.r2_score(values, predicted))
        assert entry["pearson"]["value"] == pytest.approx(stats.pearsonr(values, predicted).statistic)
        assert entry["spearman"]["value"] == pytest.approx(stats.spearmanr(values, predicted).statistic)
        assert entry["mae"]["value"] == pytest.approx(metrics.mean_absolute_error(values, predicted))
        assert entry["r2"]["value"] > 0.7 > entry["r2"]["permuted"]["high"] and entry["mae"]["value"] < 10
        assert entry["r2"]["compared"]["value"] < 0.4 and entry["r2"]["difference"]["low"] > 0
        assert all(gain["low"] > 0 for gain in entry["r2"]["gain"].values())
    assert set(entry["r2"]["gain"]) == {"mean patch feature", "clinical columns", "training mean"}
    mean, truth = np.mean([float(row["purity"]) for row in rows if row["split"] == "train"]), values
    floor = block["probes"]["training mean"]
    assert floor["mae"]["value"] == pytest.approx(np.abs(truth - mean).mean()) and floor["r2"]["value"] <= 0
    assert floor["pearson"]["value"] is None and abs(entry["pearson"]["permuted"]["low"]) < 1
    assert found["warnings"] == [] and block["sides"]["test"] == {"slides": 6, "patients": 5}
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {"regression_1_1", "regression_1_2"}


def test_a_blind_model_is_no_better_and_the_report_says_so(tiny_cohort, rows, models, tmp_path):
    rows = [row | {"purity": "NA" if row["slide_id"] in ("S02", "S03") else row["purity"]} for row in rows]
    found = evaluate(tiny_cohort, rows, tmp_path / "out", name="blind", split="val")
    (block,) = found["regression"]
    assert any("R2 of ridge no better than of mean patch feature and of training mean" in w for w in found["warnings"])
    assert block["chosen_on"] == "nothing" and block["left_out"] == {"train": 2, "val": 0} and not block["clinical"]
    assert "Settings are fixed" in (tmp_path / "out" / "report.html").read_text()


def test_command_page_and_comparison(tiny_cohort, rows, models, tmp_path, capsys):
    slides = write(tmp_path / "slides.csv", rows)
    options = ["--records", str(tiny_cohort.records), "--slides", str(slides), "--regression", "purity", "age"]
    assert cli.main(["evaluate", "knowing", *options, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "Regression: purity, ridge: R2" in said and "Regression: age, attention MIL: R2" in said
    assert "training mean -" in said
    assert cli.main(["evaluate", "blind", *options, "--out", str(tmp_path / "b")]) == 0
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    compared = json.loads((tmp_path / "c" / "compare.json").read_text())["rows"]
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["regression"]
    assert len(compared) == 2 * 2 * 4 and compared[0]["task"] == ["regression", "purity", "ridge"]
    assert compared[0]["values"][0]["value"] == pytest.approx(scores[0]["probes"]["ridge"]["r2"]["value"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count('<section id="regression-') == 2 and page.count("Predicted against measured values of age") == 2


def one(rows, number=3, **values):
    return [row | (values if i == number else {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda rows: one(rows, purity="high"), {}, r"slides.csv, slide S03: purity is 'high'; expected a number"),
        (lambda rows: one(rows, purity="0,5"), {}, "'0,5'; expected a number, with a decimal point"),
        (lambda rows: [row | {"purity": "3"} for row in rows], {}, "constant, all 12 slides of split 'train' have 3"),
        (lambda rows: [row | {"purity": ""} for row in rows], {}, "0 slides of split 'train' have a value"),
        (lambda rows: rows, {"regression": ["ki67"]}, "no column 'ki67'; the columns are"),
        (lambda rows: one(rows, patient_id="P22"), {}, "patient P22 is in the splits 'train' and 'test'; regression"),
        (lambda rows: rows, {"clinical": ["split"]}, "'split' is constant: it is 'train'"),
        (lambda rows: rows, {"split": "train"}, "regression: a probe is trained on split 'train'"),
    ],
)
def test_faulty_columns_are_named_before_a_model_is_loaded(
    tiny_cohort, rows, models, monkeypatch, tmp_path, change, fields, message
):
    monkeypatch.setattr(run, "load", lambda folder: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_cohort, change(rows), tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_two_values_of_one_slide_are_named(tiny_cohort, rows, models, tmp_path):
    table = tmp_path / "values.csv"
    table.write_text("slide_id,ki67\nS00,12\ns00.svs,12.0\nS00,13\n")
    with pytest.raises(ValueError, match="values.csv, line 4: ki67 of slide S00 is '13', but '12' in .*line 2"):
        evaluate(tiny_cohort, rows, tmp_path / "out", regression=["ki67"], label_table=table)
    table.write_text("slide_id,ki67\nX,1\n")
    with pytest.raises(ValueError, match="values.csv: no row names a slide of the slide table"):
        evaluate(tiny_cohort, rows, tmp_path / "out", regression=["ki67"], label_table=table)
