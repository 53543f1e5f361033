"""Scores against scikit-learn and against slow loops that draw patients one by one."""

import numpy as np
import pytest
from sklearn import metrics

from pathflip_jax.scores import statistics


@pytest.fixture
def case():
    rng = np.random.default_rng(3)
    n, classes = 60, 4
    labels = rng.integers(0, classes, n)
    belief = rng.normal(size=(n, classes)).round(1) + 1.5 * np.eye(classes)[labels]  # rounded, so that ties occur
    patients = [f"P{i}" for i in rng.integers(0, 25, n)]
    return labels, belief.argmax(1), belief, patients


def sklearn_scores(labels, predictions, belief):
    present = np.unique(labels)
    return {
        "accuracy": metrics.accuracy_score(labels, predictions),
        "balanced_accuracy": np.mean([np.mean(predictions[labels == c] == c) for c in present]),
        "auc": np.mean([metrics.roc_auc_score(labels == c, belief[:, c]) for c in present]),
        "weighted_f1": metrics.f1_score(labels, predictions, average="weighted", zero_division=0),
        "macro_f1": metrics.f1_score(labels, predictions, average="macro", zero_division=0),
    }


def test_point_estimates_are_those_of_scikit_learn(case):
    labels, predictions, belief, _ = case
    expected = sklearn_scores(labels, predictions, belief)
    ones = np.ones((1, len(labels)))
    found = {name: s(ones)[0] for name, s in statistics.classification(labels, predictions, belief).items()}
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name
    balanced = metrics.balanced_accuracy_score(labels, predictions)
    assert found["balanced_accuracy"] == pytest.approx(balanced, abs=1e-12)
    probabilities = np.exp(belief) / np.exp(belief).sum(1, keepdims=True)
    ovr = metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    by_probability = statistics.classification(labels, predictions, probabilities)["auc"](ones)[0]
    assert by_probability == pytest.approx(ovr, abs=1e-12)


def test_each_draw_equals_the_slides_repeated(case):
    """A draw's value is scikit-learn's on the list in which every slide of a drawn patient stands as often as drawn."""
    labels, predictions, belief, patients = case
    weights = statistics.patient_weights(patients, draws=40, seed=1)
    found = {name: s(weights) for name, s in statistics.classification(labels, predictions, belief).items()}
    for draw in range(40):
        rows = np.repeat(np.arange(len(labels)), weights[draw].astype(int))
        expected = sklearn_scores(labels[rows], predictions[rows], belief[rows])
        for name in expected:
            assert found[name][draw] == pytest.approx(expected[name], abs=1e-9), (name, draw)


def test_slides_of_one_patient_have_no_interval():
    """Nor have the slides of a patient who is the only one with a value; a difference of theirs has no p-value."""
    weights = statistics.patient_weights(["P1", "P1", "P1"], draws=50)
    several = statistics.patient_weights(["P1", "P1", "P2", "P3"], draws=50)
    one = statistics.mean([0.25, 0.5, 0.75])
    assert statistics.interval(one, weights)[0] == 0.5 and np.isnan(statistics.interval(one, weights)[1:]).all()
    assert np.isnan(statistics.interval(statistics.median([1.0, 2.0, 3.0]), weights)[1:]).all()
    assert np.isnan(statistics.p_value(one, weights))
    known = statistics.mean([0.25, 0.75, np.nan, np.nan])
    assert statistics.interval(known, several)[0] == 0.5 and np.isnan(statistics.interval(known, several)[1:]).all()
    assert np.isfinite(statistics.interval(statistics.mean([0.25, 0.5, 1.0, np.nan]), several)).all()


def test_patients_are_drawn_whole(case):
    *_, patients = case
    weights = statistics.patient_weights(patients, draws=200, seed=0)
    for patient in set(patients):
        columns = weights[:, [p == patient for p in patients]]
        assert np.all(columns == columns[:, :1])
    names = np.unique(patients)
    first = [patients.index(p) for p in names]
    assert np.all(weights[:, first].sum(1) == len(names))
    assert np.array_equal(weights, statistics.patient_weights(patients, draws=200, seed=0))
    assert not np.array_equal(weights, statistics.patient_weights(patients, draws=200, seed=1))


def test_two_slides_per_patient_widen_the_interval():
    """Every slide doubled under the same patient tells nothing new: the interval must stay as wide as before."""
    values = np.random.default_rng(0).normal(size=40)
    alone = statistics.interval(statistics.mean(values), statistics.patient_weights([str(i) for i in range(40)]))
    twice = np.repeat(values, 2)
    by_patient = statistics.interval(
        statistics.mean(twice), statistics.patient_weights([str(i // 2) for i in range(80)])
    )
    by_slide = statistics.interval(statistics.mean(twice), statistics.patient_weights([str(i) for i in range(80)]))
    assert by_patient == pytest.approx(alone)
    assert by_slide.high - by_slide.low < 0.8 * (by_patient.high - by_patient.low)


def test_interval_covers_at_its_level():
    rng = np.random.default_rng(5)
    patients = [str(i) for i in range(60)]
    weights = statistics.patient_weights(patients, draws=500, seed=2)
    inside = 0
    for _ in range(200):
        found = statistics.interval(statistics.mean(rng.normal(loc=1.0, size=60)), weights)
        inside += found.low <= 1.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_median_is_that_of_the_repeated_slides():
    rng = np.random.default_rng(7)
    values = rng.integers(0, 9, 31).astype(float)
    weights = rng.integers(0, 4, (50, 31)).astype(float)
    found = statistics.median(values)(weights)
    expected = [np.median(np.repeat(values, w.astype(int))) for w in weights]
    assert found == pytest.approx(expected)


def test_mean_leaves_out_what_cannot_be_measured():
    statistic = statistics.mean(np.array([1.0, np.nan, 3.0]))
    assert statistic(np.array([[1.0, 1.0, 1.0], [0.0, 5.0, 2.0]])) == pytest.approx([2.0, 3.0])
    found = statistics.interval(statistics.mean(np.array([np.nan, np.nan])), np.ones((3, 2)))
    assert np.isnan(found.value) and np.isnan(found.low)


def test_paired_difference_is_tighter_than_the_two_alone():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=50)
    better, worse = hard + 0.3, hard + rng.normal(scale=0.05, size=50)
    weights = statistics.patient_weights([str(i) for i in range(50)])
    found = statistics.interval(statistics.difference(statistics.mean(better), statistics.mean(worse)), weights)
    assert 0 < found.low < 0.3 < found.high + 0.1
    alone = statistics.interval(statistics.mean(better), weights)
    assert found.high - found.low < 0.3 * (alone.high - alone.low)


def test_mean_over_runs_averages_the_same_draws():
    weights = statistics.patient_weights(["a", "b", "c"], draws=10)
    one, two = np.array([0.0, 1.0, 2.0]), np.array([2.0, 3.0, 7.0])
    both = statistics.mean_over_runs([statistics.mean(one), statistics.mean(two)])
    assert both(weights) == pytest.approx(statistics.mean((one + two) / 2)(weights))


def test_auc_without_one_side_is_not_a_number():
    assert np.isnan(statistics.auc(np.ones(4, bool), np.arange(4.0))(np.ones((1, 4)))[0])
    labels = np.zeros(5, int)
    found = statistics.classification(labels, labels, np.zeros((5, 2)))["auc"](np.ones((2, 5)))
    assert np.isnan(found).all()


def test_baselines():
    labels = np.array([0, 0, 0, 1, 2])
    found = statistics.baselines(labels, 4, majority=0)
    always = np.zeros(5, int)
    assert found["majority"]["accuracy"] == pytest.approx(0.6)
    assert found["majority"]["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, always))
    expected = metrics.f1_score(labels, always, average="weighted", zero_division=0)
    assert found["majority"]["weighted_f1"] == pytest.approx(expected)
    assert found["chance"]["accuracy"] == found["chance"]["balanced_accuracy"] == 0.25
    foreign = statistics.baselines(labels, 4, majority=3)["majority"]
    assert foreign["accuracy"] == foreign["balanced_accuracy"] == foreign["macro_f1"] == 0
    rng = np.random.default_rng(0)
    truth = rng.choice(3, size=200_000, p=[0.6, 0.3, 0.1])
    guess = rng.integers(0, 3, truth.size)
    chance = statistics.baselines(truth, 3, majority=0)["chance"]
    assert metrics.f1_score(truth, guess, average="macro") == pytest.approx(chance["macro_f1"], abs=0.01)
    assert metrics.f1_score(truth, guess, average="weighted") == pytest.approx(chance["weighted_f1"], abs=0.01)


def test_per_class_table(case):
    labels, predictions, belief, _ = case
    rows = statistics.per_class(labels, predictions, belief, ["a", "b", "c", "d"])
    report = metrics.classification_report(labels, predictions, output_dict=True, zero_division=0)
    for c, row in enumerate(rows):
        assert row["recall"] == pytest.approx(report[str(c)]["recall"])
        assert row["slides"] == report[str(c)]["support"]
        assert row["auc"] == pytest.approx(metrics.roc_auc_score(labels == c, belief[:, c]))


def test_no_slides_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        statistics.patient_weights([])


@pytest.mark.parametrize(("classes", "how"), [(2, {"pos_label": 1}), (3, {"average": "weighted"})])
def test_the_published_f1_is_binary_for_two_classes_and_weighted_for_more(classes, how):
    rng = np.random.default_rng(5)
    labels, predictions = rng.integers(0, classes, (2, 50))
    found = statistics.published_f1(labels, predictions, classes)(np.ones((1, 50)))[0]
    assert found == pytest.approx(metrics.f1_score(labels, predictions, **how))
    blind = statistics.baselines(labels, classes, majority=1)
    always = metrics.f1_score(labels, np.ones(50, int), zero_division=0, **how)
    assert blind["majority"]["published_f1"] == pytest.approx(always)
    many, guess = np.tile(labels, 4000), rng.integers(0, classes, 200_000)
    assert blind["chance"]["published_f1"] == pytest.approx(metrics.f1_score(many, guess, **how), abs=0.01)
