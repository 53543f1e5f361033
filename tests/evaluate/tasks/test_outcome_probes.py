"""Probes of outcomes: coefficients against lifelines and scikit-survival, direction of risk, learning and chance."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from pathflip_jax.evaluate.protocols import Attention
from pathflip_jax.evaluate.tasks import outcome_probes
from pathflip_jax.evaluate.tasks.outcome_probes import Measured, Survived
from pathflip_jax.scores import survival
from pathflip_jax.scores.survival import Outcomes

lifelines = pytest.importorskip("lifelines")
sksurv = pytest.importorskip("sksurv")

import pandas  # noqa: E402
from sksurv.linear_model import CoxPHSurvivalAnalysis  # noqa: E402
from sksurv.util import Surv  # noqa: E402


def patients(n, seed, width=6, strata=1, effect=1.5):
    """Times in whole months, with ties, that fall with the first feature; a third are censored."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    stratum = rng.integers(0, strata, n)
    until = rng.exponential(12 * np.exp(-effect * x[:, 0]) * (1 + 9 * stratum))
    last = rng.uniform(6, 40, n)
    return Survived(x, Outcomes(np.ceil(np.minimum(until, last)), until <= last, stratum))


def c_index(given, risk):
    return survival.concordance(given.y, risk)(np.ones((1, len(risk))))[0]


def fitted_by_lifelines(given, penalty):
    """The penalty of lifelines is on columns divided by their deviation, per patient."""
    x = given.x / given.x.std(0, ddof=1)
    table = pandas.DataFrame(x).assign(time=given.y.time, event=given.y.event)
    strata = ["stratum"] if given.y.stratum.any() else None
    table = table if strata is None else table.assign(stratum=given.y.stratum)
    how = {"fit_options": {"precision": 1e-12}}
    fitter = lifelines.CoxPHFitter(penalizer=penalty / len(x), strata=strata)
    return x, fitter.fit(table, "time", "event", **how).params_.to_numpy()


@pytest.mark.parametrize("penalty", [0.0, 5.0])
@pytest.mark.parametrize("strata", [1, 3])
def test_coefficients_are_those_of_lifelines_on_tied_data(penalty, strata):
    given = patients(80, 0, strata=strata)
    assert len(np.unique(given.y.time)) < 40
    x, theirs = fitted_by_lifelines(given, penalty)
    assert outcome_probes.fit_cox(x, given.y, penalty) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 20.0])
def test_the_fit_in_strata_is_scikit_survivals_where_there_is_one_stratum(penalty):
    """A second stratum of one patient, who is compared with nobody, changes nothing."""
    given = patients(70, 1)
    x, y = np.concatenate([given.x, np.ones((1, 6))]), [np.append(part, 1) for part in given.y]
    y = Outcomes(y[0], y[1].astype(bool), y[2])
    theirs = CoxPHSurvivalAnalysis(penalty, ties="efron", tol=1e-12)
    theirs.fit(given.x, Surv.from_arrays(given.y.event, given.y.time))
    assert outcome_probes.fit_cox(x, y, penalty) == pytest.approx(theirs.coef_, abs=1e-6)
    assert outcome_probes.fit_cox(given.x, given.y, penalty) == pytest.approx(theirs.coef_, abs=1e-6)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_fit_of_many_columns_is_scikit_survivals(penalty):
    given = patients(130, 2, width=150)
    x = outcome_probes.scaling(given.x)(given.x)
    assert x.shape[1] > outcome_probes.NEWTON_COLUMNS
    theirs = CoxPHSurvivalAnalysis(penalty, ties="efron", tol=1e-12)
    theirs.fit(x, Surv.from_arrays(given.y.event, given.y.time))
    found = outcome_probes.fit_cox(x, given.y, penalty)
    assert found == pytest.approx(theirs.coef_, rel=1e-6, abs=1e-6)  # some are above 10


def test_scaling_changes_no_ridge_fit():
    """More columns than rows: the penalty is the same in all directions."""
    rng = np.random.default_rng(0)
    x, y, new = rng.normal(size=(20, 50)), rng.normal(size=20), rng.normal(size=(5, 50))
    scale, length = outcome_probes.scaling(x), np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    assert scale(x).shape == (20, 20) and (scale(x) ** 2).sum(1).mean() == pytest.approx(1)
    expected = Ridge(alpha=3).fit(x / length, y).predict(new / length)
    assert Ridge(alpha=3).fit(scale(x), y).predict(scale(new)) == pytest.approx(expected)
    assert (outcome_probes.scaling(np.ones((4, 3)))(np.ones((2, 3))) == 0).all()


@pytest.mark.parametrize("with_val", [True, False])
@pytest.mark.parametrize("strata", [1, 2])
def test_cox_finds_the_feature_that_counts_in_the_right_direction(with_val, strata):
    train, val, test = (patients(n, seed, strata=strata) for n, seed in ((90, 0), (40, 1), (80, 2)))
    (risk,) = outcome_probes.cox(train, val if with_val else None, [test.x])
    assert c_index(test, risk) > 0.75 and np.corrcoef(risk, test.x[:, 0])[0, 1] > 0.8
    blind = [patients(n, seed, strata=strata, effect=0) for n, seed in ((90, 0), (40, 1), (80, 2))]
    (risk,) = outcome_probes.cox(blind[0], blind[1], [blind[2].x])
    assert abs(c_index(blind[2], risk) - 0.5) < 0.12


def test_the_penalty_is_the_one_that_val_likes_best():
    train, val, test = patients(40, 0, 30), patients(60, 1, 30), patients(9, 2, 30)
    scale = outcome_probes.scaling(train.x)
    fits = [outcome_probes.fit_cox(scale(train.x), train.y, penalty) for penalty in outcome_probes.PENALTIES]
    likely = [outcome_probes.likelihood(scale(val.x) @ fit, val.y) for fit in fits]
    (risk,) = outcome_probes.cox(train, val, [test.x])
    assert risk == pytest.approx(scale(test.x) @ fits[int(np.argmax(likely))]) and len(set(likely)) == len(fits)


SETTINGS = {"settings": Attention(hidden=16, learning_rate=5e-3), "room": (6, 1200)}


def bags(rows, seed):
    """One region of a bag holds the features, the others are noise."""
    rng = np.random.default_rng(seed)
    found = []
    for row in rows:
        bag = rng.normal(size=(rng.integers(2, 6), 8)).astype(np.float32)
        bag[rng.integers(len(bag))] = [4.0 * row[0], 3.0, *np.zeros(6)]
        found.append(bag)
    return found


PARTS = [patients(n, seed) for n, seed in ((96, 0), (48, 1), (80, 2))]
TRAIN, VAL, TEST = (Survived(bags(part.x, seed), part.y) for seed, part in enumerate(PARTS))


@pytest.mark.parametrize("val", [VAL, None])
def test_attention_finds_the_region_that_counts_for_survival(val):
    (risk, seen) = outcome_probes.attention_cox(TRAIN, val, [TEST.x, TRAIN.x], **SETTINGS)
    assert risk.shape == (80,) and seen.shape == (96,) and c_index(TEST, risk) > 0.7 and c_index(TRAIN, seen) > 0.7


def test_nothing_about_the_tested_patients_but_their_regions_counts():
    (risk,) = outcome_probes.attention_cox(TRAIN, None, [TEST.x], **SETTINGS)
    (some,) = outcome_probes.attention_cox(TRAIN, None, [TEST.x[:70]], **SETTINGS)
    assert some == pytest.approx(risk[:70], abs=1e-5)


@pytest.mark.parametrize("with_val", [True, False])
def test_values_are_learnt_in_their_own_unit(with_val):
    parts = [Measured(part.x, 200 + 30 * part.x[:, 0]) for part in PARTS]
    (found,) = outcome_probes.ridge(parts[0], parts[1] if with_val else None, [parts[2].x])
    assert np.corrcoef(found, parts[2].y)[0, 1] > 0.95 and abs(found.mean() - 200) < 10
    train, val, test = (Measured(bag.x, part.y) for bag, part in zip((TRAIN, VAL, TEST), parts, strict=True))
    (found,) = outcome_probes.attention_value(train, val if with_val else None, [test.x], **SETTINGS)
    assert np.corrcoef(found, test.y)[0, 1] > 0.6 and abs(found.mean() - 200) < 15
