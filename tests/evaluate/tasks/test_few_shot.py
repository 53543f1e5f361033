"""Few-shot classification: drawing of slides, labels that count, model selection, and scores."""

import csv

import numpy as np
import pytest
from sklearn import metrics

from pathflip_jax.evaluate.cohort import read_cohort
from pathflip_jax.evaluate.embeddings import embed_bags
from pathflip_jax.evaluate.protocols import read_protocol
from pathflip_jax.evaluate.tasks import few_shot, label_columns
from pathflip_jax.evaluate.tasks.few_shot import ATTENTION, FLOOR, LINEAR, NEAREST
from pathflip_jax.evaluate.tasks.label_columns import Slides
from pathflip_jax.inference.predictor import Embedding


class Knowing:
    """A model that sees the class of every slide, in each of its regions and in the slide as a whole."""

    name, config = "knowing", {}

    def __init__(self, label_of, noise=0.1):
        self.label_of, self.noise = label_of, noise

    def encode_slides(self, slides):
        for slide in slides:
            rng = np.random.default_rng(int(slide.slide_id[1:]))
            regions = rng.normal(size=(4, 8)) * self.noise
            regions += np.eye(8)[self.label_of[slide.slide_id]]
            yield Embedding(slide.slide_id, regions.sum(0), regions, np.zeros((4, 2)))


def bags_of(cohort, model):
    """All slides, whatever a task needs: attention MIL is compiled once for all tests."""
    return embed_bags(model, cohort, [row["slide_id"] for row in cohort.table], "model")


@pytest.fixture
def cohort(tiny_cohort):
    return read_cohort(tiny_cohort.records, tiny_cohort.slides, "test")


@pytest.fixture
def knowing(cohort):
    return Knowing({row["slide_id"]: int(row["label"] == "solid") for row in cohort.table})


def test_a_label_table_finds_slides_and_patients_however_they_are_spelt(cohort, tmp_path):
    rows = [(f"s{i:02d}.SVS", "unknown" if i == 0 else "ab"[i % 2]) for i in range(12)]
    rows += [(patient.lower(), "ab"[int(patient[1:]) % 2]) for patient in cohort.patients]
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,tp53\n" + "".join(f"{name},{label}\n" for name, label in rows))
    task = label_columns.read_column(cohort, "tp53", path, ["all"], 1)
    assert task.unlabelled["train"] == 1 and task.unlabelled["test"] == 0 and len(task.train.ids) == 11


def test_draws_are_balanced_nested_and_of_different_patients():
    patients = ["P0", "P0", "P0", "P1", "P2", "P3", "P4", "P5"]
    train = Slides([f"S{i}" for i in range(8)], patients, np.array([0, 0, 0, 0, 0, 1, 1, 1]))
    for seed in range(20):
        one, three, all_of_them = (label_columns.draw_shots(train, k, seed).tolist() for k in (1, 3, "all"))
        assert [train.classes[i] for i in three] == [0, 0, 0, 1, 1, 1]
        assert len({patients[i] for i in three[:3]}) == 3  # P0, P1 and P2, although P0 has most slides
        assert set(one) <= set(three) <= set(all_of_them) == set(range(8))
    assert len({tuple(label_columns.draw_shots(train, 1, seed)) for seed in range(20)}) > 3


def test_a_model_that_knows_beats_its_raw_features(cohort, knowing):
    task = label_columns.read_column(cohort, "label", None, ["4", "all"], 2)
    assert task.classes == ["glandular", "solid"] and task.val is not None and len(task.test.ids) == 6
    bags = bags_of(cohort, knowing)
    probabilities = few_shot.run_probes(task, bags, read_protocol("strict"), "knowing")
    assert {probe for probe, _ in probabilities} == set(few_shot.PROBES) and probabilities[LINEAR, 4].shape == (2, 6, 2)
    found = few_shot.score_column(task, [probabilities], [probabilities], read_protocol("strict"), 0)
    for probe in (ATTENTION, LINEAR, NEAREST):
        entry = found["probes"][probe]["all"]["metrics"]["balanced_accuracy"]
        assert entry["value"] == entry["low"] == 1 and entry["spread"] == 0 and entry["chance"] == 0.5
        assert entry["difference"] == {"value": 0, "low": 0, "high": 0}
    assert found["probes"][LINEAR]["4"]["metrics"]["auc"]["gain"]["value"] > 0
    assert "gain" not in found["probes"][FLOOR]["4"]["metrics"]["auc"]
    assert few_shot.warn_if_not_above_features(found) == []
    entry = found["probes"][LINEAR]["all"]["metrics"]["balanced_accuracy"]
    entry["gain"]["low"] = 0.0
    assert "label, all shots: linear no better than" in few_shot.warn_if_not_above_features(found)[0]
    assert found["chosen_on"] == "val" and found["classes"]["solid"] == {"train": 6, "val": 3, "test": 3}


def test_scores_are_the_mean_over_draws_of_scikit_learns(cohort, knowing):
    knowing.noise = 1.5
    task = label_columns.read_column(cohort, "label", None, [1], 3)
    bags = bags_of(cohort, knowing)
    probabilities = few_shot.run_probes(task, bags, read_protocol("strict"), "knowing")
    entries = few_shot.score_column(task, [probabilities], [], read_protocol("strict"), 0)["probes"][LINEAR]["1"][
        "metrics"
    ]
    truth = task.test.classes
    aucs = [metrics.roc_auc_score(truth, one[:, 1]) for one in probabilities[LINEAR, 1]]
    assert entries["auc"]["by_seed"] == pytest.approx(aucs) and entries["auc"]["value"] == pytest.approx(np.mean(aucs))
    assert entries["auc"]["spread"] == pytest.approx(np.std(aucs, ddof=1))
    f1 = [metrics.f1_score(truth, b.argmax(1), average="weighted", zero_division=0) for b in probabilities[LINEAR, 1]]
    assert entries["weighted_f1"]["value"] == pytest.approx(np.mean(f1))


def test_no_label_of_the_tested_slides_changes_a_probability(cohort, knowing):
    """With every test label turned round the predictions stay as they were; under `paper` the best epoch is kept."""
    task = label_columns.read_column(cohort, "label", None, [1], 1)
    bags = bags_of(cohort, knowing)
    turned = task._replace(test=task.test._replace(classes=1 - task.test.classes))
    strict = [few_shot.run_probes(t, bags, read_protocol("strict"), "") for t in (task, turned)]
    for key, found in strict[0].items():
        assert (found == strict[1][key]).all(), key

    def area(task, name):
        rules = read_protocol(name)
        if rules.test_chooses:
            rules = rules._replace(attention=read_protocol("strict").attention)
        found = few_shot.run_probes(task, bags, rules, "")[ATTENTION, 1][0]
        return metrics.roc_auc_score(task.test.classes, found[:, 1])

    no_val = [one._replace(val=None) for one in (task, turned)]
    assert all(area(one, "paper") >= area(one, "strict") for one in no_val)


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_label_table_by_patient_leaves_out_what_it_does_not_know(cohort, tmp_path):
    """Mutations: by patient, unknown for some, and the same task as any other."""
    mutated = {row["patient_id"]: str(i % 2) for i, row in enumerate(cohort.table)}
    mutated["P03"], unknown = "NA", {"P03"}
    table = write(tmp_path / "tp53.csv", [{"patient_id": p, "TP53": m} for p, m in mutated.items() if p != "P04"])
    task = label_columns.read_column(cohort, "TP53", table, [1], 1)
    assert task.classes == ["0", "1"]
    kept = [row for row in cohort.table if row["patient_id"] not in unknown | {"P04"}]
    assert len(task.train.ids) + len(task.val.ids) + len(task.test.ids) == len(kept)
    assert sum(task.unlabelled.values()) == len(cohort.table) - len(kept) and "TP53" in cohort.warnings[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "grade"}, "slide table: no column 'grade'; its columns are"),
        ({"column": "kras", "table": [{"slide_id": "S00", "tp53": "1"}]}, "line 2: no column 'kras'"),
        ({"column": "tp53", "table": [{"gene": "S00", "tp53": "1"}]}, "line 2: no slide; a column slide_id or case_id"),
        ({"column": "tp53", "table": [{"slide_id": "X", "tp53": "1"}]}, "no row labels a slide"),
        ({"column": "tp53", "table": [{"slide_id": "S00", "tp53": x} for x in "01"]}, "S00 is '0' and '1'"),
        ({"column": "tp53", "table": [{"slide_id": "S00", "tp53": "1"}]}, "the training split has 1 classes"),
        ({"column": "tp53", "table": [{"slide_id": f"S{i:02d}", "tp53": str(i // 9)} for i in range(24)]}, "label 2,"),
        ({"column": "tp53", "table": [{"slide_id": f"S{i:02d}", "tp53": str(i % 2)} for i in range(9)]}, "no slide of"),
        ({"column": "tp53", "table": [{"slide_id": f"S{i:02d}", "tp53": "aAb"[i % 3]} for i in range(24)]}, "g: A, a"),
        ({"shots": [0]}, "few-shot 0: expected numbers"),
        ({"shots": ["few"]}, "few-shot 'few'"),
        ({"seeds": 0}, "expected at least 1"),
        ({"split": "train"}, "draws training slides from split 'train'"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learnt_are_named(cohort, tmp_path, change, message):
    asked = {"column": "label", "table": None, "shots": [1], "seeds": 1} | change
    if asked["table"]:
        asked["table"] = write(tmp_path / "labels.csv", asked["table"])
    if split := asked.pop("split", ""):
        cohort = cohort._replace(split=split)
    with pytest.raises(ValueError, match=message):
        label_columns.read_column(cohort, **asked)


def test_the_paper_protocol_says_that_it_is_optimistic():
    assert "keeps the epoch with the best score on the test" in read_protocol("paper").words(["few_shot"])[0]
    assert read_protocol("strict").words(["few_shot", "zero_shot", "retrieval"]) == []
