"""Scores of predicted risks: Harrell's C-index, Kaplan-Meier curves and the log-rank test, with or without strata.

A higher risk means an earlier event. Times are in one unit and above 0; `event` tells whether a patient's time is that
of the event, or of the last follow-up without it (censored). Curves and tests are those of scikit-survival.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from pathflip_jax.scores.statistics import Statistic

PERMUTATIONS = 500


class Outcomes(NamedTuple):
    """Times of patients, whether each is that of the event, and the patients' strata (all 0 without strata)."""

    time: Float[np.ndarray, "n"]
    event: Bool[np.ndarray, "n"]
    stratum: Int[np.ndarray, "n"]

    def of(self, chosen: np.ndarray) -> "Outcomes":
        """The outcomes of chosen patients, by index or mask."""
        return Outcomes(*(column[chosen] for column in self))

    @property
    def comparable(self) -> Bool[np.ndarray, "n n"]:
        """The pairs whose order is known: the patient of the row had the event before the time of the other one.

        A patient censored at the time of an event outlived it. Pairs of two strata are not compared.
        """
        later = (self.time[:, None] < self.time) | ((self.time[:, None] == self.time) & ~self.event)
        return self.event[:, None] & later & (self.stratum[:, None] == self.stratum)


class Curve(NamedTuple):
    """A Kaplan-Meier curve: the probability of survival from each time on, with its 95% interval (log-log)."""

    time: Float[np.ndarray, "t"]
    survival: Float[np.ndarray, "t"]
    low: Float[np.ndarray, "t"]
    high: Float[np.ndarray, "t"]

    def at(self, time: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """The probability of survival at these times."""
        return np.concatenate([[1.0], self.survival])[np.searchsorted(self.time, time, side="right")]

    @property
    def median(self) -> float:
        """The first time at which at most half survive; NaN if more do to the end."""
        below = np.flatnonzero(self.survival <= 0.5)
        return float(self.time[below[0]]) if len(below) else float("nan")


def import_survival():
    """The package scikit-survival; the ImportError names the extra that installs it."""
    try:
        import sksurv
    except ImportError:
        raise ImportError(
            "survival scores need scikit-survival: `pip install pathflip-jax[survival]`, or leave out --survival-time"
        ) from None
    return sksurv


def _ordered(risk: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n n"]:
    """Whether the risk of the row is higher than that of the column; half for equal risks."""
    return (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)


def concordance(outcomes: Outcomes, risk: Float[np.ndarray, "n"]) -> Statistic:
    """Harrell's C-index: the share of comparable pairs in which the patient with the earlier event has the higher risk.

    Equal risks count half. NaN without a comparable pair.
    """
    pairs = outcomes.comparable.astype(np.float64)
    right = pairs * _ordered(np.asarray(risk, np.float64))

    def statistic(weights):
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((weights @ right) * weights).sum(1) / ((weights @ pairs) * weights).sum(1)

    return statistic


def permuted_concordance(
    outcomes: Outcomes, risks: Sequence[Float[np.ndarray, "n"]], seed: int = 0
) -> Float[np.ndarray, "n"]:
    """C-indices of permuted outcomes, each the mean over several runs' risks: what chance gives.

    Outcomes are exchanged between patients of one stratum.
    """
    rng = np.random.default_rng(seed)
    first, second = np.nonzero(outcomes.comparable)
    order = np.mean([_ordered(np.asarray(risk, np.float64)) for risk in risks], axis=0)
    members = [np.flatnonzero(outcomes.stratum == stratum) for stratum in np.unique(outcomes.stratum)]
    found = np.full(PERMUTATIONS, np.nan)
    for number in range(PERMUTATIONS if len(first) else 0):
        other = np.arange(len(outcomes.time))
        for own in members:
            other[own] = rng.permutation(own)
        found[number] = order[other[first], other[second]].mean()
    return found


def kaplan_meier(outcomes: Outcomes) -> Curve:
    """The Kaplan-Meier curve of a group of patients, whatever their strata."""
    import_survival()
    from sksurv.nonparametric import kaplan_meier_estimator

    with np.errstate(invalid="ignore", divide="ignore"):
        time, survival, (low, high) = kaplan_meier_estimator(outcomes.event, outcomes.time, conf_type="log-log")
    return Curve(time, survival, low, high)


def at_risk(outcomes: Outcomes, times: Sequence[float]) -> list[int]:
    """The numbers of patients with neither event nor censoring before each time."""
    return [int((outcomes.time >= time).sum()) for time in times]


def log_rank(outcomes: Outcomes, high: Bool[np.ndarray, "n"]) -> float:
    """The p-value of the log-rank test of two groups, summed over strata; NaN without two groups or without events."""
    import_survival()
    from sksurv.compare import compare_survival
    from sksurv.util import Surv

    excess = variance = 0.0
    for stratum in np.unique(outcomes.stratum):
        own = outcomes.stratum == stratum
        if len(np.unique(high[own])) < 2 or not outcomes.event[own].any():
            continue
        given = Surv.from_arrays(outcomes.event[own], outcomes.time[own])
        _, _, table, covariance = compare_survival(given, high[own], return_stats=True)
        excess += float(table["observed"].iloc[0] - table["expected"].iloc[0])
        variance += float(covariance[0, 0])
    return float(stats.chi2.sf(excess**2 / variance, 1)) if variance > 0 else float("nan")
