"""Intervals of scores of mosaics, by the cases that they are made of.

A mosaic shows several cases and a case is shown by several mosaics, so neither mosaics nor cases can be resampled as
independent units. Weighting a mosaic by the product of its cases' bootstrap counts gives nearly every mosaic of ten
cases the weight 0; the mean of the counts shrinks the spread of a case by the number of cases in a mosaic, and the
interval becomes several times too narrow. The variance is therefore taken from influence values, with every pair of
mosaics counted once for each case that they share, and each mosaic once with itself (cluster-robust variance of
multiple membership). It is never taken as less than that of independent mosaics. With several runs, the variance of
the mean over their seeds is added.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.scores.statistics import Statistic, difference, mean_over_runs

NORMAL = 1.959964  # 97.5% quantile
_STEP = 1e-3  # of a weight, for derivatives of a statistic


class Scored(NamedTuple):
    """A score: its mean over runs with the interval, and its value in each run."""

    value: float
    low: float
    high: float
    by_run: list[float]


def influences(statistic: Statistic, mosaics: int) -> Float[np.ndarray, "n"]:
    """The derivative of a statistic by the weight of each mosaic."""
    ones, steps = np.ones((mosaics, mosaics)), _STEP * np.eye(mosaics)
    return (statistic(ones + steps) - statistic(ones - steps)) / (2 * _STEP)


def case_variance(influence: Float[np.ndarray, "n"], cases: Sequence[Sequence[str]]) -> float:
    """The variance of a statistic over cases; `cases` are those of each mosaic."""
    names = {case: place for place, case in enumerate(sorted({case for listed in cases for case in listed}))}
    shows = np.zeros((len(cases), len(names)))
    for row, listed in zip(shows, cases, strict=True):
        row[[names[case] for case in listed]] = 1
    alone = influence**2
    shared = ((influence @ shows) ** 2).sum() - ((shows.sum(1) - 1) * alone).sum()
    return float(max(shared, alone.sum()))


def by_case(
    runs: Sequence[Statistic],
    cases: Sequence[Sequence[str]],
    others: Sequence[Statistic] | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Scored:
    """The mean of a statistic over runs with its 95% interval, or of its paired difference to other runs.

    `bounds` are those of the statistic itself: an interval does not exceed them.
    """
    pairs = runs if others is None else [difference(*pair) for pair in zip(runs, others, strict=True)]
    ones = np.ones((1, len(cases)))
    by_run = [float(one(ones)[0]) for one in pairs]
    variance = case_variance(influences(mean_over_runs(pairs), len(cases)), cases)
    if len(pairs) > 1:
        variance += np.var(by_run, ddof=1) / len(pairs)
    value, half = float(np.mean(by_run)), NORMAL * float(np.sqrt(variance))
    low, high = np.clip([value - half, value + half], *bounds)
    return Scored(value, float(low), float(high), by_run)
