"""Metrics of predicted values against scikit-learn and scipy, also of patients drawn several times."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from pathflip_jax.scores import statistics
from pathflip_jax.scores.regression import METRICS, permuted_regression, regression

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 9, 50).astype(float)
ONCE = np.ones((1, 50))
PREDICTED = np.round(VALUES + RNG.normal(size=50) * 3, 0)


def test_metrics_are_those_of_the_libraries():
    found = regression(VALUES, PREDICTED)
    assert list(found) == list(METRICS)
    for weights in (np.ones(50), *statistics.patient_weights([str(i // 2) for i in range(50)], draws=4)):
        drawn = np.repeat(np.arange(50), weights.astype(int))
        truth, predicted = VALUES[drawn], PREDICTED[drawn]
        expected = {
            "r2": metrics.r2_score(truth, predicted),
            "pearson": stats.pearsonr(truth, predicted).statistic,
            "spearman": stats.spearmanr(truth, predicted).statistic,
            "mae": metrics.mean_absolute_error(truth, predicted),
        }
        assert {name: one(weights[None])[0] for name, one in found.items()} == pytest.approx(expected, abs=1e-10)


def test_permuted_values_are_chance_and_scored_as_the_others_are():
    found = permuted_regression(VALUES, [PREDICTED, PREDICTED])
    rng = np.random.default_rng(0)
    for number in range(3):
        expected = {name: one(ONCE)[0] for name, one in regression(rng.permutation(VALUES), PREDICTED).items()}
        assert {name: drawn[number] for name, drawn in found.items()} == pytest.approx(expected)
    assert found["pearson"].mean() == pytest.approx(0, abs=0.02) and 0.05 < found["spearman"].std() < 0.3


def test_a_constant_prediction_has_an_error_but_no_correlation():
    found = {name: one(np.ones((1, 50)))[0] for name, one in regression(VALUES, np.full(50, VALUES.mean())).items()}
    assert found["r2"] == pytest.approx(0) and found["mae"] == pytest.approx(np.abs(VALUES - VALUES.mean()).mean())
    assert np.isnan(found["pearson"]) and np.isnan(found["spearman"])
    assert np.isnan(regression(np.ones(50), PREDICTED)["r2"](np.ones((1, 50)))[0])
