"""Patient-level bootstrap intervals, paired differences and baselines of metrics.

A statistic is a function of slide weights: unit weights give the point estimate, and the number of times that each
slide's patient was drawn gives a bootstrap replicate. Patients are resampled, never slides: slides of one patient are
not independent, and treating them as such makes intervals too narrow (DESIGN section 8).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn import metrics

Statistic = Callable[[Float[np.ndarray, "W n"]], Float[np.ndarray, "W"]]

DRAWS = 2000
TEXT_ONLY = "text only"  # baseline: the same language model, asked without the slide


class Interval(NamedTuple):
    """A point estimate with its bootstrap interval; NaN if undefined."""

    value: float
    low: float
    high: float


def patient_weights(patients: Sequence[str], draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, "W n"]:
    """Slide weights of bootstrap draws: how often each slide's patient is drawn, with replacement."""
    if len(patients) == 0:
        raise ValueError("no patients to resample: the list of slides is empty; pass at least one slide")
    names, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(names), size=(draws, len(names)))
    flat = (drawn + len(names) * np.arange(draws)[:, None]).ravel()
    counts = np.bincount(flat, minlength=draws * len(names)).reshape(draws, len(names))
    return counts[:, index].astype(np.float64)  # [W, n]


def check_lengths(patients: Sequence[str], lists: Mapping[str, Sequence], unit: str) -> None:
    """Raise ValueError naming the list that does not have one element per patient; `unit` names the scored items."""
    for name, listed in lists.items():
        if len(listed) != len(patients):
            raise ValueError(
                f"{name}: {len(listed)} for {len(patients)} {unit}s; pass one for each {unit}, in the same order"
            )


def interval(statistic: Statistic, weights: Float[np.ndarray, "W n"], level: float = 0.95) -> Interval:
    """The point estimate on all slides and the percentile interval over bootstrap draws.

    Draws in which the statistic is undefined (an AUC with a single class) are ignored. The slides of a single patient
    have no interval: NaN.
    """
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    draws = _draws(statistic, weights)
    if not np.isfinite(value) or len(draws) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _draws(statistic: Statistic, weights: Float[np.ndarray, "W n"]) -> Float[np.ndarray, "D"]:
    """The statistic in each draw in which it is defined; empty for a single patient."""
    if _one_patient(weights):
        return np.empty(0)
    draws = statistic(weights)
    return draws[np.isfinite(draws)]


def _one_patient(weights: Float[np.ndarray, "W n"]) -> bool:
    """Whether all slides have equal weights in every draw, which means that they belong to one patient."""
    return len(weights) > 1 and weights.shape[1] > 0 and bool((weights == weights[:, :1]).all())


def difference(first: Statistic, second: Statistic) -> Statistic:
    """The paired difference of two statistics, computed on the same draws."""
    return lambda weights: first(weights) - second(weights)


def p_value(change: Statistic, weights: Float[np.ndarray, "W n"]) -> float:
    """The two-sided bootstrap p-value of a paired difference: twice the fraction of draws beyond 0.

    The observed sample counts as one more draw, so that p is never 0; NaN if the difference is undefined in all draws.
    """
    draws = _draws(change, weights)
    if len(draws) == 0:
        return float("nan")
    return float(min(1.0, 2 * min((draws <= 0).sum() + 1, (draws >= 0).sum() + 1) / (len(draws) + 1)))


def paired(statistic: Statistic, others: Sequence[Statistic], weights: Float[np.ndarray, "W n"]) -> dict:
    """The mean of other runs' statistics and the paired difference to it; an empty dict without other runs."""
    if not others:
        return {}
    other = mean_over_runs(others)
    return {
        "compared": interval(other, weights)._asdict(),
        "difference": interval(difference(statistic, other), weights)._asdict(),
    }


def over_runs(
    ours: Sequence[Statistic], theirs: Sequence[Statistic], weights: Float[np.ndarray, "W n"], **baselines
) -> dict:
    """A metric of runs: interval of their mean, baselines, each run's value, and `paired` with `theirs`."""
    statistic = mean_over_runs(ours)
    entry = interval(statistic, weights)._asdict() | baselines
    if len(ours) > 1:
        entry["by_run"] = [interval(one, weights).value for one in ours]
    return entry | paired(statistic, theirs, weights)


def with_baselines(statistic: Statistic, baselines: Mapping[str, Statistic], weights: Float[np.ndarray, "W n"]) -> dict:
    """A metric with its interval, those of the baselines, and paired differences to them (above 0: better).

    All are computed on the same draws. Entries are {value, low, high}, ready for JSON.
    """
    return interval(statistic, weights)._asdict() | {
        "baselines": {name: interval(other, weights)._asdict() for name, other in baselines.items()},
        "difference": {
            name: interval(difference(statistic, other), weights)._asdict() for name, other in baselines.items()
        },
    }


def metrics_with_baselines(
    ours: Mapping[str, Statistic],
    baselines: Mapping[str, Mapping[str, Statistic]],
    weights: Float[np.ndarray, "W n"],
) -> dict[str, dict]:
    """`with_baselines` of every metric; `baselines` hold the same metrics, by name of the baseline."""
    return {
        metric: with_baselines(statistic, {name: other[metric] for name, other in baselines.items()}, weights)
        for metric, statistic in ours.items()
    }


def warn_if_not_above_baseline(entries: Mapping[str, dict]) -> list[str]:
    """One warning per baseline that metrics made by `with_baselines` do not exceed, naming these metrics.

    A metric exceeds a baseline if the interval of the paired difference lies above 0.
    """
    not_above: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for baseline, found in entry["difference"].items():
            if not found["low"] > 0:
                not_above.setdefault(baseline, []).append(name)
    return [
        f"no better than {'without the slide' if baseline == TEXT_ONLY else f'the baseline {baseline!r}'} in "
        f"{', '.join(names)}: the 95% interval of the difference to {baseline!r} is not above 0"
        for baseline, names in not_above.items()
    ]


def mean_over_runs(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of a statistic over several runs (seeds), computed on the same draws."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def mean(values: Float[np.ndarray, "n"]) -> Statistic:
    """The mean over slides, ignoring slides with NaN (nothing to measure).

    If the remaining slides belong to one patient, the mean has no interval.
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
    """The area under the ROC curve, ties counting half; NaN if either class is absent."""
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
    """F1 per class [W, C], 0 without true positives, and the classes that occur in labels or predictions."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    occurs = confusion.sum(1) + confusion.sum(2)
    return 2 * right / np.maximum(occurs, 1), occurs > 0


def classification(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], scores: Float[np.ndarray, "n C"]
) -> dict[str, Statistic]:
    """The metrics of a classification, by name; `scores` may be any monotone function of the class probabilities.

    AUC is the macro average of one class against the rest over the classes that occur; balanced accuracy and macro F1
    ignore classes that are absent from a draw, as scikit-learn does.
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
    """F1 as published scripts compute it: of the second of two classes, or weighted by class size."""
    confusion = _confusion(labels, predictions, classes)

    def statistic(weights):
        cm = confusion(weights)
        f1 = _f1(cm)[0]
        return f1[:, 1] if classes == 2 else (f1 * cm.sum(2)).sum(1) / cm.sum((1, 2))

    return statistic


def baselines(labels: Int[np.ndarray, "n"], classes: int, majority: int) -> dict[str, dict[str, float]]:
    """The metrics of two predictors that ignore the slide: a uniform guess and the majority class.

    `majority` is the most frequent class, among the training slides if they are known. The F1 of the guess is that of
    its expected confusion matrix.
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
    """One row per class: slides, precision, recall, F1 and one-against-the-rest AUC."""
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
