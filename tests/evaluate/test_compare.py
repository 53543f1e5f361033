"""Comparison of evaluations: the same figures as each report, paired, and refused where the slides differ."""

import csv
import json
import shutil

import numpy as np
import pytest
from scipy import stats

from pathflip_jax import cli
from pathflip_jax.data.texts.tables import write_csv
from pathflip_jax.evaluate import compare, run
from pathflip_jax.evaluate.published import FIGURES, published
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.inference.predictor import Embedding
from pathflip_jax.scores import statistics

PROMPTS = {"task": "TCGA-NSCLC", "classes": {"glandular": ["glands"], "solid": ["solid sheets"]}}


class Guessing:
    """Sees each slide's number, with an error that its seed draws."""

    name, config = "guessing", {}

    def __init__(self, error, seed):
        self.error, self.rng = error, np.random.default_rng(seed)

    def encode_slides(self, slides):
        for slide in slides:
            vector = np.eye(26)[int(slide.slide_id[1:])] + np.eye(26)[24 + int(slide.slide_id[1:]) % 2]
            vector = vector + self.error * self.rng.normal(size=26)
            yield Embedding(slide.slide_id, vector, vector[None], np.zeros((1, 2)))

    def encode_text(self, texts):
        if "glands" in texts:
            return np.eye(26)[[25, 24]]
        return np.eye(26)[18 : 18 + len(texts)]


def evaluate(run_folder, **fields):
    return run.evaluate(EvaluationSpec(run=run_folder, **fields))


@pytest.fixture(scope="module")
def evaluated(tiny_cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    models = {"good": Guessing(0.1, 0), "bad": Guessing(3.0, 1)}
    inputs = {"records": tiny_cohort.records, "slides": tiny_cohort.slides, "texts": tiny_cohort.texts}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load", models.get)
        for name in models:
            run.evaluate(
                EvaluationSpec(
                    run=name, prompts=folder / "prompts.json", few_shot=[1], draws=2, out=folder / name, **inputs
                )
            )
    return folder


def test_every_score_is_as_in_the_reports_and_differences_are_paired(evaluated, tmp_path):
    found = compare.compare([evaluated / "good", evaluated / "bad"], tmp_path, command=["compare", "good", "bad"])
    rows = {(*row["task"], row["metric"]): row for row in found["rows"]}
    for place, name in enumerate(("good", "bad")):
        own = json.loads((evaluated / name / "scores.json").read_text())
        for metric in ("balanced_accuracy", "auc", "weighted_f1"):
            row = rows["zero_shot", "TCGA-NSCLC", metric]
            expected = {key: own["zero_shot"]["metrics"][metric][key] for key in ("value", "low", "high")}
            assert row["values"][place] == pytest.approx(expected)
        for k in (1, 5, 10):
            row = rows["retrieval", "slide_to_text", f"R@{k}"]
            assert row["values"][place]["value"] == pytest.approx(
                own["retrieval"]["slide_to_text"]["all"][f"R@{k}"]["value"]
            )
        probes = own["few_shot"][0]["probes"]
        del probes["mean patch feature"]  # of no model
        for probe, by_shots in probes.items():
            row = rows["few_shot", "label", probe, "1", "auc"]
            assert row["values"][place]["value"] == pytest.approx(by_shots["1"]["metrics"]["auc"]["value"], abs=1e-9)
    beside = {row["score"]: row for row in own["published"]}["zero shot, TCGA-NSCLC, balanced accuracy"]
    assert beside["ours"] == own["zero_shot"]["metrics"]["balanced_accuracy"]["value"]
    assert beside["rows"] == rows["zero_shot", "TCGA-NSCLC", "balanced_accuracy"]["published"]
    assert "github.com/MAGIC-AI4Med/KEEP" in (evaluated / "bad" / "report.html").read_text()
    row = rows["retrieval", "text_to_slide", "R@1"]
    assert row["differences"][0]["value"] == pytest.approx(row["values"][1]["value"] - row["values"][0]["value"])
    assert row["differences"][0]["value"] < 0 and row["differences"][0]["p"] < 0.05
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    page = (tmp_path / "compare.html").read_text()
    assert "KEEP" in page and "github.com/MAGIC-AI4Med/KEEP" in page and "pathflip compare good bad" in page


def test_grounding_is_compared_by_the_mean_of_each_slide(evaluated, tmp_path):
    """Means over the concepts of a slide, then over slides; a score that no row has is left out."""
    rng = np.random.default_rng(0)
    found = {}
    for name in ("good", "bad"):
        folder = shutil.copytree(evaluated / name, tmp_path / name)
        content = json.loads((folder / "scores.json").read_text()) | {"grounding": {}}
        (folder / "scores.json").write_text(json.dumps(content))
        found[name] = rng.random((6, 2)).round(6)
        rows = [
            {"run": name, "slide_id": f"S{18 + i}", "patient_id": f"P{i}", "concept": concept, "auc": auc,
             "pointing": 1.0, "dice": ""}
            for i, aucs in enumerate(found[name]) for concept, auc in zip(("fat", "mucin"), aucs, strict=True)
        ]  # fmt: skip
        write_csv(folder / "grounding.csv", rows)
    rows = compare.compare([tmp_path / "good", tmp_path / "bad"], tmp_path / "out")["rows"]
    rows = {row["metric"]: row for row in rows if row["task"] == ["grounding"]}
    assert set(rows) == {"auc", "pointing"}
    assert [x["value"] for x in rows["auc"]["values"]] == pytest.approx(
        [found[name].mean() for name in ("good", "bad")]
    )
    assert "ROC AUC of patches" in (tmp_path / "out" / "compare.html").read_text()


def test_an_evaluation_equals_itself(evaluated, tmp_path, capsys):
    again = shutil.copytree(evaluated / "good", tmp_path / "again")
    assert cli.main(["compare", str(evaluated / "good"), str(again), "--out", str(tmp_path / "out"), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["differences"] == [{"value": 0, "low": 0, "high": 0, "p": 1.0}]


def change(folder, table, edit):
    with open(folder / f"{table}.csv", newline="") as file:
        rows = [row for row in map(edit, csv.DictReader(file)) if row]
    with open(folder / f"{table}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("table", "edit", "message"),
    [
        ("predictions", lambda row: row if row["slide_id"] != "S20" else None, "different slides in zero_shot.*S20"),
        (
            "ranks",
            lambda row: row | {"slide_ids": row["slide_ids"].replace("S21", "S99")},
            "different slides.*S21, S99",
        ),
        ("ranks", lambda row: row | {"gallery": "9"}, "differ in the ground truth"),
        ("predictions", lambda row: row | {"label": "solid"}, "differ in the ground truth of S19"),
    ],
)
def test_evaluations_of_other_slides_or_labels_are_refused_by_name(evaluated, tmp_path, table, edit, message):
    other = shutil.copytree(evaluated / "good", tmp_path / "other")
    change(other, table, edit)
    with pytest.raises(ValueError, match=message):
        compare.compare([evaluated / "good", other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_named(evaluated, tmp_path):
    with pytest.raises(FileNotFoundError, match="no scores.json; expected"):
        compare.compare([evaluated / "good", tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two"):
        compare.compare([evaluated / "good"], tmp_path / "out")
    other = shutil.copytree(evaluated / "good", tmp_path / "other")
    (other / "ranks.csv").unlink()
    with pytest.raises(FileNotFoundError, match="ranks.csv: missing"):
        compare.compare([evaluated / "good", other], tmp_path / "out")


def test_folders_of_tasks_are_compared_task_by_task(evaluated, tmp_path):
    for name in ("good", "bad"):
        shutil.copytree(evaluated / name, tmp_path / name / "first")
    shutil.copytree(evaluated / "good", tmp_path / "good" / "second")
    found = compare.compare([tmp_path / "good", tmp_path / "bad"], tmp_path / "out")
    assert {row["part"] for row in found["rows"]} == {"first"} and found["left_out"] == ["second"]


def test_p_values_are_those_of_a_normal_mean():
    """For the mean of many slides the bootstrap's p is near that of the t-test."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.15, 1, 300)
    weights = statistics.patient_weights([str(i) for i in range(300)])
    assert statistics.p_value(statistics.mean(values), weights) == pytest.approx(
        stats.ttest_1samp(values, 0).pvalue, abs=0.02
    )
    assert statistics.p_value(statistics.mean(values + 9), weights) == pytest.approx(2 / (statistics.DRAWS + 1))


def test_published_rows_have_a_source_and_stand_where_the_protocol_matches():
    rows = json.loads(FIGURES.read_text())["rows"]
    assert all(row["source"] and row["differs"] and 0 < row["value"] < 1 for row in rows)
    strict, paper = ({"name": "slidebench", "protocol": {"name": name}} for name in ("strict", "paper"))
    assert published(strict, ("retrieval", "slide_to_text"), "R@1") == []
    (found,) = published(paper, ("retrieval", "slide_to_text"), "R@1")
    assert found["model"] == "PathFLIP"
    rcc = {"zero_shot": {"task": "TCGA-RCC"}, "protocol": {"name": "strict"}}
    assert {row["model"] for row in published(rcc, ("zero_shot", "TCGA-RCC"), "balanced_accuracy")} >= {"KEEP", "CONCH"}
    assert published(rcc, ("zero_shot", "TCGA-RCC"), "auc") == []


def test_groundings_are_compared_by_all_that_both_have(tmp_path):
    """By slide: the mean over its concepts; an evaluation without a Dice leaves the Dice out."""

    def write(name, dice, lift):
        (tmp_path / name).mkdir()
        rows = ["run,slide_id,patient_id,concept,auc,pointing,dice"]
        for i in range(6):
            for concept, own in (("fat", 0.1), ("ulcer", 0.3)):
                value = 0.5 + own + lift * (i + 1) / 10
                rows.append(f"r,S{i},P{i},{concept},{value},{i % 2},{value / 2 if dice else ''}")
        (tmp_path / name / "grounding.csv").write_text("\n".join(rows) + "\n")
        (tmp_path / name / "scores.json").write_text(json.dumps({"grounding": {}, "protocol": {"name": "strict"}}))
        return tmp_path / name

    first, second, third = write("a", True, 0.0), write("b", True, 0.5), write("c", False, 0.5)
    rows = {row["metric"]: row for row in compare.compare([first, second], tmp_path / "ab")["rows"]}
    assert list(rows) == ["auc", "pointing", "dice"]
    assert [x["value"] for x in rows["auc"]["values"]] == pytest.approx([0.7, 0.7 + 0.5 * 0.35])
    assert rows["auc"]["differences"][0]["low"] > 0 and rows["pointing"]["differences"][0]["value"] == 0
    rows = {row["metric"] for row in compare.compare([first, third], tmp_path / "ac")["rows"]}
    assert rows == {"auc", "pointing"}
