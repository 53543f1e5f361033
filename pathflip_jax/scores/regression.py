"""Metrics of predicted values: R2, Pearson's and Spearman's correlation, and the mean absolute error."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from pathflip_jax.scores import statistics
from pathflip_jax.scores.statistics import Statistic

PERMUTATIONS = 500
METRICS = {"r2": "R²", "pearson": "Pearson", "spearman": "Spearman", "mae": "Mean absolute error"}


def regression(values: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"]) -> dict[str, Statistic]:
    """The metrics by name, as functions of slide weights.

    R2 is 1 minus the squared error divided by that of the mean of the scored values, so it may be negative.
    Correlations with a constant are NaN.
    """
    values, predicted = np.asarray(values, np.float64), np.asarray(predicted, np.float64)

    def r2(weights):
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = weights @ values / weights.sum(1)
            spread = (weights * (values - mean[:, None]) ** 2).sum(1)
            return np.where(spread > 0, 1 - weights @ (values - predicted) ** 2 / spread, np.nan)

    def pearson(weights):
        return _correlation(weights, values, predicted)

    def spearman(weights):
        return _correlation(weights, _ranks(weights, values), _ranks(weights, predicted))

    return {"r2": r2, "pearson": pearson, "spearman": spearman, "mae": statistics.mean(np.abs(values - predicted))}


def permuted_regression(
    values: Float[np.ndarray, "n"], runs: Sequence[Float[np.ndarray, "n"]], seed: int = 0
) -> dict[str, Float[np.ndarray, "n"]]:
    """The metrics of permuted values, each the mean over several runs' predictions: what chance gives."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permutation(np.asarray(values, np.float64)) for _ in range(PERMUTATIONS)])  # [P, n]
    once, ranked, spread = np.ones_like(drawn), rankdata(drawn, axis=1), ((values - values.mean()) ** 2).sum()
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    for predicted in runs:
        found["r2"].append(1 - ((drawn - predicted) ** 2).sum(1) / spread)
        found["pearson"].append(_correlation(once, drawn, predicted))
        found["spearman"].append(_correlation(once, ranked, rankdata(predicted)))
        found["mae"].append(np.abs(drawn - predicted).mean(1))
    return {metric: np.mean(values, axis=0) for metric, values in found.items()}


def _correlation(weights, x, y) -> Float[np.ndarray, "W"]:
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = x - (weights * x).sum(1, keepdims=True) / total
        y = y - (weights * y).sum(1, keepdims=True) / total
        spread = (weights * x**2).sum(1) * (weights * y**2).sum(1)
        # Rounding leaves a trace of spread in a constant.
        known = spread > 1e-20 * (weights * (x**2 + y**2)).sum(1) ** 2
        return np.where(known, (weights * x * y).sum(1) / np.sqrt(spread), np.nan)


def _ranks(weights: Float[np.ndarray, "W n"], values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "W n"]:
    """Mean ranks, as `rankdata` of the values repeated as often as they were drawn."""
    group = rankdata(values, "dense").astype(int) - 1
    counts = np.zeros((len(weights), group.max() + 1))
    np.add.at(counts.T, group, weights.T)
    below = np.cumsum(counts, axis=1) - counts
    return (below + (counts + 1) / 2)[:, group]
