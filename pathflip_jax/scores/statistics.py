"""Scores of predictions, with the interval and the baselines that make a figure believable.

A statistic here is a function of weights: ones give the point estimate, and how often the bootstrap drew each
slide's patient gives a draw. The unit that is drawn is the patient, never the slide: two slides of one patient
are no two observations, and intervals that take them for such come out too narrow (DESIGN section 8).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn import metrics

Statistic = Callable[[Float[np.ndarray, "W n"]], Float[np.ndarray, "W"]]

DRAWS = 2000
TEXT_ONLY = "text only"  # the baseline of a language model that is asked the same without the slide


class Interval(NamedTuple):
    """A point estimate with its bootstrap interval; NaN where a value cannot be had."""

    value: float
    low: float
    high: float


def patient_weights(patients: Sequence[str], draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, "W n"]:
    """How often each slide counts in each bootstrap draw, when whole patients are drawn with replacement."""
    if len(patients) == 0:
        raise ValueError("no patients to draw from: the list of slides is empty")
    names, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(names), size=(draws, len(names)))
    flat = (drawn + len(names) * np.arange(draws)[:, None]).ravel()
    counts = np.bincount(flat, minlength=draws * len(names)).reshape(draws, len(names))
    return counts[:, index].astype(np.float64)  # [W, n]


def interval(statistic: Statistic, weights: Float[np.ndarray, "W n"], level: float = 0.95) -> Interval:
    """The statistic of all slides, and the percentile interval of its bootstrap draws.

    Draws in which the statistic does not exist (an AUC with one class only) are left out of the percentiles. Slides of
    one patient have no interval: NaN.
    """
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    draws = _draws(statistic, weights)
    if not np.isfinite(value) or len(draws) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _draws(statistic: Statistic, weights: Float[np.ndarray, "W n"]) -> Float[np.ndarray, "D"]:
    """The statistic of each draw in which it exists; of one patient alone no draw says anything."""
    if _one_patient(weights):
        return np.empty(0)
    draws = statistic(weights)
    return draws[np.isfinite(draws)]


def _one_patient(weights: Float[np.ndarray, "W n"]) -> bool:
    """Whether all slides count together in every one of several draws: they are of one patient."""
    return len(weights) > 1 and weights.shape[1] > 0 and bool((weights == weights[:, :1]).all())


def difference(first: Statistic, second: Statistic) -> Statistic:
    """The paired difference of two statistics: both see the same drawn patients."""
    return lambda weights: first(weights) - second(weights)


def p_value(change: Statistic, weights: Float[np.ndarray, "W n"]) -> float:
    """The two-sided bootstrap p-value of a paired difference: twice the share of draws on the far side of 0.

    The observed slides count as one draw more, so that it is never 0; NaN where no draw has a difference.
    """
    draws = _draws(change, weights)
    if len(draws) == 0:
        return float("nan")
    return float(min(1.0, 2 * min((draws <= 0).sum() + 1, (draws >= 0).sum() + 1) / (len(draws) + 1)))


def beside(statistic: Statistic, baselines: Mapping[str, Statistic], weights: Float[np.ndarray, "W n"]) -> dict:
    """A figure with its interval, that of each baseline, and the paired difference to each (above 0: better than it).

    All see the same drawn patients. The entries are {value, low, high}, ready for JSON.
    """
    return interval(statistic, weights)._asdict() | {
        "baselines": {name: interval(other, weights)._asdict() for name, other in baselines.items()},
        "difference": {
            name: interval(difference(statistic, other), weights)._asdict() for name, other in baselines.items()
        },
    }


def unbeaten(entries: Mapping[str, dict]) -> list[str]:
    """A warning for every baseline that figures made by `beside` do not beat, with the names of these figures.

    Not beaten: the interval of the paired difference holds 0 or lies below it, or there is none.
    """
    behind: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for baseline, found in entry["difference"].items():
            if not found["low"] > 0:
                behind.setdefault(baseline, []).append(name)
    return [
        f"no better than {'without the slide' if baseline == TEXT_ONLY else f'the baseline {baseline!r}'} in "
        f"{', '.join(names)}: the 95% interval of the difference to {baseline!r} is not above 0"
        for baseline, names in behind.items()
    ]


def mean_over_runs(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of one statistic over several runs (seeds); all runs see the same drawn patients."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def mean(values: Float[np.ndarray, "n"]) -> Statistic:
    """The mean over slides; slides with NaN (nothing to measure there) are left out.

    Where all that is left is of one patient, no draw has a mean, and so there is no interval.
    """
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)

    def statistic(weights):
        kept = weights[:, known]
        if _one_patient(kept):
            return np.full(len(kept), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            return kept @ values[known] / kept.sum(1)

    return statistic


def median(values: Float[np.ndarray, "n"]) -> Statistic:
    """The weighted median over slides, equal to `np.median` of the slides repeated as drawn."""
    values = np.asarray(values, np.float64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def statistic(weights):
        cumulative = np.cumsum(weights[:, order], axis=1)  # [W, n]
        total = cumulative[:, -1:]
        lower = np.argmax(cumulative >= np.ceil(total / 2), axis=1)
        upper = np.argmax(cumulative >= np.floor(total / 2) + 1, axis=1)
        return (ordered[lower] + ordered[upper]) / 2

    return statistic


def auc(positive: Bool[np.ndarray, "n"], scores: Float[np.ndarray, "n"]) -> Statistic:
    """The area under the ROC curve, ties counting half; NaN where one of the two sides is missing."""
    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(scores)[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))  # first of each group of ties
    positive = np.asarray(positive, bool)[order]

    def statistic(weights):
        weights = weights[:, order]
        right = np.add.reduceat(weights * positive, starts, axis=1)  # [W, groups]
        wrong = np.add.reduceat(weights * ~positive, starts, axis=1)
        below = np.cumsum(wrong, axis=1) - wrong
        with np.errstate(invalid="ignore", divide="ignore"):
            return (right * (below + wrong / 2)).sum(1) / (right.sum(1) * wrong.sum(1))

    return statistic


def _confusion(labels, predictions, classes):
    """Weights -> confusion matrix of each draw [W, truth, prediction]."""
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), np.asarray(labels) * classes + np.asarray(predictions)] = 1
    return lambda weights: (weights @ cells).reshape(-1, classes, classes)


def _f1(confusion):
    """F1 per class [W, C], 0 where nothing is right, and the classes that occur in truth or prediction."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    occurs = confusion.sum(1) + confusion.sum(2)
    return 2 * right / np.maximum(occurs, 1), occurs > 0


def classification(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], scores: Float[np.ndarray, "n C"]
) -> dict[str, Statistic]:
    """The statistics of a classification, by name; `scores` may be any number that grows with belief.

    AUC is one class against the rest, its mean over the classes that occur (macro OvR); balanced accuracy and macro
    F1 leave out classes that a draw does not hold, as scikit-learn does.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    classes = scores.shape[1]
    confusion = _confusion(labels, predictions, classes)
    per_class = [auc(labels == c, scores[:, c]) for c in range(classes) if 0 < np.sum(labels == c) < len(labels)]

    def accuracy(weights):
        cm = confusion(weights)
        return np.trace(cm, axis1=1, axis2=2) / cm.sum((1, 2))

    def balanced_accuracy(weights):
        cm = confusion(weights)
        support = cm.sum(2)
        recall = np.diagonal(cm, axis1=1, axis2=2) / np.maximum(support, 1)
        return recall.sum(1) / (support > 0).sum(1)

    def macro_auc(weights):
        if not per_class:
            return np.full(len(weights), np.nan)
        areas = np.stack([statistic(weights) for statistic in per_class])  # [C, W]
        known = np.isfinite(areas)
        with np.errstate(invalid="ignore"):
            return np.where(known, areas, 0).sum(0) / known.sum(0)

    def weighted_f1(weights):
        cm = confusion(weights)
        return (_f1(cm)[0] * cm.sum(2)).sum(1) / cm.sum((1, 2))

    def macro_f1(weights):
        score, occurs = _f1(confusion(weights))
        return score.sum(1) / occurs.sum(1)

    return {
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "auc": macro_auc,
        "weighted_f1": weighted_f1,
        "macro_f1": macro_f1,
    }


def published_f1(labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], classes: int) -> Statistic:
    """F1 as published scripts compute it: of the second class where there are two, else weighted by class size."""
    confusion = _confusion(labels, predictions, classes)

    def statistic(weights):
        cm = confusion(weights)
        f1 = _f1(cm)[0]
        return f1[:, 1] if classes == 2 else (f1 * cm.sum(2)).sum(1) / cm.sum((1, 2))

    return statistic


def baselines(labels: Int[np.ndarray, "n"], classes: int, majority: int) -> dict[str, dict[str, float]]:
    """What two answers that never look at the slide score: a uniform guess, and always the same class.

    `majority` is the most frequent class, of the training slides where they are known. The F1 of the guess is that
    of its expected confusion matrix.
    """
    labels = np.asarray(labels)
    share = np.bincount(labels, minlength=classes) / len(labels)
    guess_f1 = 2 * share / classes / (share + 1 / classes)
    always = np.full(len(labels), majority)
    once = np.ones((1, len(labels)))
    occurs = np.union1d(labels, [majority])
    return {
        "chance": {
            "accuracy": 1 / classes,
            "balanced_accuracy": 1 / classes,
            "auc": 0.5,
            "weighted_f1": float((share * guess_f1).sum()),
            "macro_f1": float(guess_f1.mean()),
            "published_f1": float(guess_f1[1] if classes == 2 else (share * guess_f1).sum()),
        },
        "majority": {
            "accuracy": float(metrics.accuracy_score(labels, always)),
            "balanced_accuracy": float(np.mean(labels == majority) > 0) / len(np.unique(labels)),
            "auc": 0.5,
            "weighted_f1": float(
                metrics.f1_score(labels, always, labels=occurs, average="weighted", zero_division=0.0)
            ),
            "macro_f1": float(metrics.f1_score(labels, always, labels=occurs, average="macro", zero_division=0.0)),
            "published_f1": float(published_f1(labels, always, classes)(once)[0]),
        },
    }


def per_class(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], scores: Float[np.ndarray, "n C"], names
) -> list[dict]:
    """One row per class: slides, precision, recall, F1 and its AUC against the rest."""
    classes = range(len(names))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predictions, labels=list(classes), zero_division=0.0
    )
    rows = []
    for c in classes:
        one = auc(np.asarray(labels) == c, np.asarray(scores)[:, c])(np.ones((1, len(labels))))[0]
        rows.append(
            {
                "class": names[c],
                "slides": int(support[c]),
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "auc": float(one),
            }
        )
    return rows
