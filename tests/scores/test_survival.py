"""C-index, Kaplan-Meier curves and the log-rank test against lifelines and scikit-survival, on tied data."""

import jax
import numpy as np
import pytest
from scipy import stats

from pathflip_jax.losses.survival import log_partial_likelihood
from pathflip_jax.scores import statistics, survival
from pathflip_jax.scores.survival import Outcomes

lifelines = pytest.importorskip("lifelines")
sksurv = pytest.importorskip("sksurv")

from lifelines.statistics import logrank_test  # noqa: E402
from lifelines.utils import concordance_index  # noqa: E402
from sksurv.metrics import concordance_index_censored  # noqa: E402

ONCE = np.ones((1, 80))


def outcomes(n=80, seed=0, strata=1, ties=True):
    rng = np.random.default_rng(seed)
    time = rng.integers(1, 25, n).astype(float) if ties else rng.permutation(n) + 1.0
    return Outcomes(time, rng.random(n) < 0.6, rng.integers(0, strata, n))


def risks(n=80, seed=1):
    return np.random.default_rng(seed).integers(0, 20, n) / 10  # with ties


@pytest.mark.parametrize("seed", range(3))
def test_the_c_index_is_that_of_both_libraries(seed):
    given, risk = outcomes(seed=seed), risks(seed=seed + 9)
    found = survival.concordance(given, risk)(ONCE)[0]
    assert found == pytest.approx(concordance_index(given.time, -risk, given.event), abs=1e-12)
    assert found == pytest.approx(concordance_index_censored(given.event, given.time, risk)[0], abs=1e-12)


def test_weights_are_patients_drawn_several_times():
    given, risk = outcomes(), risks()
    statistic = survival.concordance(given, risk)
    for weights in statistics.patient_weights([str(i) for i in range(80)], draws=3):
        drawn = np.repeat(np.arange(80), weights.astype(int))
        expected = concordance_index(given.time[drawn], -risk[drawn], given.event[drawn])
        assert statistic(weights[None])[0] == pytest.approx(expected, abs=1e-12)


def test_a_higher_risk_means_an_earlier_event():
    given = Outcomes(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, True, True, False]), np.zeros(4, int))
    once = np.ones((1, 4))
    assert survival.concordance(given, np.array([4.0, 3.0, 2.0, 1.0]))(once)[0] == 1
    assert survival.concordance(given, np.array([1.0, 2.0, 3.0, 4.0]))(once)[0] == 0
    assert survival.concordance(given, np.zeros(4))(once)[0] == 0.5
    nobody = given._replace(event=np.zeros(4, bool))
    assert np.isnan(survival.concordance(nobody, np.zeros(4))(once)[0])


def test_pairs_of_two_strata_are_not_compared():
    given, risk = outcomes(strata=3), risks()
    right = pairs = 0.0
    for stratum in range(3):
        own = given.of(given.stratum == stratum)
        count = concordance_index_censored(own.event, own.time, risk[given.stratum == stratum])
        right += count[1] + count[3] / 2
        pairs += count[1] + count[2] + count[3]
    assert survival.concordance(given, risk)(ONCE)[0] == pytest.approx(right / pairs)


def test_permuted_outcomes_are_chance():
    given = outcomes(strata=2)
    found = survival.permuted_concordance(given, [-given.time])
    assert found.mean() == pytest.approx(0.5, abs=0.01) and len(found) == survival.PERMUTATIONS
    assert 0.02 < found.std() < 0.1 and (survival.concordance(given, -given.time)(ONCE)[0] > found).all()


def test_curves_are_those_of_lifelines():
    given = outcomes()
    curve = survival.kaplan_meier(given)
    theirs = lifelines.KaplanMeierFitter().fit(given.time, given.event)
    assert curve.survival == pytest.approx(theirs.survival_function_at_times(curve.time).to_numpy(), abs=1e-10)
    assert curve.median == theirs.median_survival_time_
    band = theirs.confidence_interval_.loc[curve.time].to_numpy()
    inside = (curve.survival > 0) & (curve.survival < 1)
    assert np.stack([curve.low, curve.high], 1)[inside] == pytest.approx(band[inside], abs=1e-6)
    assert curve.at(np.array([0.5, 1e9])).tolist() == [1.0, curve.survival[-1]]
    table = lifelines.utils.survival_table_from_events(given.time, given.event)
    assert survival.at_risk(given, table.index) == table["at_risk"].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_log_rank_test_is_lifelines(seed):
    given, high = outcomes(seed=seed), risks() > 0.9
    theirs = logrank_test(given.time[high], given.time[~high], given.event[high], given.event[~high])
    assert survival.log_rank(given, high) == pytest.approx(theirs.p_value, rel=1e-6)


def test_the_log_rank_test_in_strata_is_the_score_test_of_the_stratified_cox_model():
    given, high = outcomes(strata=3, ties=False), risks() > 0.9

    def likelihood(beta):
        return log_partial_likelihood(beta * high.astype(np.float32), given.time.astype(int), given.event,
                                      given.stratum)  # fmt: skip

    slope, curvature = jax.grad(likelihood)(0.0), jax.grad(jax.grad(likelihood))(0.0)
    expected = stats.chi2.sf(float(-(slope**2) / curvature), 1)
    assert survival.log_rank(given, high) == pytest.approx(expected, rel=1e-4)


def test_one_group_alone_has_no_p_value():
    assert np.isnan(survival.log_rank(outcomes(), np.ones(80, bool)))
