"""Zero-shot classification: a slide is assigned to the class whose texts are nearest to it.

The normalised embeddings of a class's texts are averaged (a prompt ensemble), which reduces the dependence on one
wording. No labels are used, not even to choose a threshold.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.evaluate import colour, figures
from pathflip_jax.evaluate.cohort import Cohort, name_labels
from pathflip_jax.evaluate.embeddings import slide_embeddings
from pathflip_jax.evaluate.prompt_files import Prompts, find_prompts, read_prompts
from pathflip_jax.evaluate.task import (
    Headline,
    LoadedRun,
    Part,
    Predictions,
    Setting,
    Task,
    baseline_values,
    make_headline,
)
from pathflip_jax.evaluate.units import Evaluation, classified_columns, classified_units
from pathflip_jax.scores import statistics
from pathflip_jax.scores.retrieval import normalise

KEY = "zero_shot"
CONFUSION, PREDICTIONS = "confusion", "predictions"  # names of the figure and of the table
TEMPERATURE = 0.1  # of the slide loss (DESIGN section 4): turns cosines into probabilities


class Classes(NamedTuple):
    """The prompts, the cohort with its labels spelt as the classes, and the class number of each slide."""

    prompts: Prompts
    cohort: Cohort
    labels: Int[np.ndarray, "n"]

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        return list(self.prompts.classes)


def class_embeddings(encode_text, classes: dict[str, list[str]]) -> Float[np.ndarray, "C D"]:
    """The unit embedding of each class: the mean of its texts' unit embeddings."""
    texts = [text for listed in classes.values() for text in listed]
    encoded = normalise(encode_text(texts))
    ends = np.cumsum([len(listed) for listed in classes.values()])
    return normalise(np.stack([part.mean(0) for part in np.split(encoded, ends[:-1])]))


def class_probabilities(
    slides: Float[np.ndarray, "n D"], classes: Float[np.ndarray, "C D"]
) -> Float[np.ndarray, "n C"]:
    """Softmax over classes of the cosines, at the temperature of training."""
    logits = (normalise(slides) @ classes.T).astype(np.float64) / TEMPERATURE
    logits -= logits.max(1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def label_index(cohort: Cohort, classes: list[str], prompts) -> np.ndarray:
    """The class number of each slide. Raises ValueError for slides with no label, and labels with no prompts."""
    bare = [slide for slide, label in zip(cohort.slide_ids, cohort.labels, strict=True) if label is None]
    if bare:
        raise ValueError(
            f"slide table: no label for {preview(bare)}; fill in the column `label` or leave --prompts out"
        )
    foreign = sorted(set(cohort.labels) - set(classes))
    if foreign:
        raise ValueError(f"{prompts}: no class for the labels {preview(foreign)}; its classes are {', '.join(classes)}")
    return np.array([classes.index(label) for label in cohort.labels])


def read_classes(setting: Setting) -> Classes:
    """The prompts and labels; raises ValueError for labels without prompts and for slides without labels."""
    given = setting.spec.prompts
    prompts = read_prompts(find_prompts(given))
    if not setting.protocol.ensemble:
        prompts = prompts.first_texts()
    cohort = name_labels(setting.cohort, prompts.class_of)
    return Classes(prompts, cohort, label_index(cohort, list(prompts.classes), given))


def _predict(setting: Setting, classes: Classes, run: LoadedRun) -> Float[np.ndarray, "n C"]:
    slides = slide_embeddings(run.bags, classes.cohort.slide_ids)
    return class_probabilities(slides, class_embeddings(run.predictor.encode_text, classes.prompts.classes))


def _score(setting: Setting, classes: Classes, predictions: Predictions) -> Part:
    return score_part(setting, classes, predictions, CONFUSION, PREDICTIONS)


def score_part(setting: Setting, classes: Classes, predictions: Predictions, confusion: str, table: str) -> Part:
    """The results of a classification, with the names of its figure and table."""
    return Part(
        score_classes(setting, classes, predictions),
        {confusion: figures.confusion(classes.labels, predictions.ours[0].argmax(1), classes.names)},
        {table: prediction_rows(predictions.runs, predictions.ours, classes)},
    )


def score_classes(setting: Setting, classes: Classes, predictions: Predictions) -> dict:
    """The metrics of the classification with chance, the majority class and the nearest mean colour as baselines."""
    prompts, cohort, labels = classes
    names, seed = classes.names, setting.spec.seed
    weights = statistics.patient_weights(cohort.patients, seed=seed)

    def metrics_of(probabilities) -> dict[str, statistics.Statistic]:
        found = statistics.classification(labels, probabilities.argmax(1), probabilities)
        if setting.protocol.published_f1:
            found["published_f1"] = statistics.published_f1(labels, probabilities.argmax(1), len(names))
        return found

    ours, theirs = ([metrics_of(one) for one in side] for side in (predictions.ours, predictions.theirs))
    counted = [names.index(row["label"]) for row in cohort.train if row.get("label") in names]
    majority = int(np.bincount(counted if counted else labels, minlength=len(names)).argmax())
    blind = statistics.baselines(labels, len(names), majority)
    probabilities = colour_probabilities(cohort, names)
    by_colour = None if probabilities is None else metrics_of(probabilities)
    metrics = {}
    for metric in ours[0]:
        baselines = {name: blind[name][metric] for name in blind}
        if by_colour is not None:
            baselines["mean_colour"] = statistics.interval(by_colour[metric], weights)._asdict()
        sides = ([one[metric] for one in side] for side in (ours, theirs))
        metrics[metric] = statistics.over_runs(*sides, weights, **baselines)
    first = predictions.ours[0]
    return {
        "task": prompts.task,
        "classes": {name: int((labels == i).sum()) for i, name in enumerate(names)},
        "texts": prompts.classes,
        "majority_class": names[majority],
        "majority_from": "train" if counted else "this split",
        "metrics": metrics,
        "per_class": statistics.per_class(labels, first.argmax(1), first, names),
    }


def colour_probabilities(cohort: Cohort, names: list[str]) -> Float[np.ndarray, "n C"] | None:
    """The class probabilities by the nearest training slide in mean colour; None without slide files."""
    test = [cohort.mean_colour(slide) for slide in cohort.slide_ids]
    if any(rgb is None for rgb in test):
        return None
    labelled = [row for row in cohort.known_train if row["label"] in names]
    train = [(names.index(row["label"]), cohort.mean_colour(row["slide_id"])) for row in labelled]
    train = [(label, rgb) for label, rgb in train if rgb is not None]
    if not train:
        return None
    labels, colours = zip(*train, strict=True)
    return colour.nearest_class(np.stack(colours), np.array(labels), np.stack(test), len(names))


def prediction_rows(names, found: list[Float[np.ndarray, "n C"]], classes: Classes) -> list[dict]:
    """One row per run and slide: its label, the predicted class, the probability of each class."""
    rows, cohort = [], classes.cohort
    for name, probabilities in zip(names, found, strict=True):
        for i, slide_id in enumerate(cohort.slide_ids):
            row = {"run": name, "slide_id": slide_id, "patient_id": cohort.patients[i], "label": cohort.labels[i]}
            rows.append(row | classified_columns(classes.names, probabilities[i]))
    return rows


def make_headlines(task: dict, title: str) -> Iterator[Headline]:
    """The headline of a classification: balanced accuracy beside the majority class and mean colour."""
    entry = task["metrics"]["balanced_accuracy"]
    others = baseline_values(entry, {"majority": "majority class", "mean_colour": "mean colour"})
    yield make_headline(f"{title}, {len(task['classes'])} classes: balanced accuracy", entry, others)


def _published(found: dict):
    yield (KEY, found[KEY]["task"]), found[KEY]["metrics"]


def _paired(evaluation: Evaluation) -> dict:
    return {(KEY, evaluation.scores[KEY]["task"]): lambda: classified_units(evaluation, PREDICTIONS, {})}


TASK = Task(
    KEY,
    title="zero-shot",
    needs="prompts (zero-shot)",
    wanted=lambda spec: spec.prompts is not None,
    read=read_classes,
    embed=lambda setting, classes: setting.cohort.slide_ids,
    predict=_predict,
    score=_score,
    headlines=lambda found: make_headlines(found[KEY], "Zero-shot"),
    section=Path(__file__).with_name("zero_shot.html"),
    prominence=1,
    published=_published,
    paired=_paired,
)
