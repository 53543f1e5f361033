"""Baselines and upper bounds of a cohort, from its records and outlines, scored as `pathflip evaluate` scores runs.

- Class probes: one logistic regression per class on the mean feature of a slide, told which training slides show the
  class. Its probabilities rank classes (zero-shot), patches (grounding) and sets of classes (retrieval).
- Outline probes: the same on single patches, told the outlines of the training slides. Upper bound of grounding.
- Linear model: mean features and counts of words, projected into a joint space with the slide loss (`linear.py`). It is
  told what a run is told, and no more.
- Exact class sets: slides and captions compared by the classes that they truly show. Upper bound of retrieval.
- Mean colour: as `pathflip evaluate` has it.

Settings of a probe are chosen on validation slides; scored slides are only predicted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.json_files import read_json
from pathflip_jax.data.texts.captions import split_sentences
from pathflip_jax.data.texts.text import read_texts
from pathflip_jax.evaluate.cohort import Cohort, read_cohort
from pathflip_jax.evaluate.tasks import map_scores, probes, zero_shot
from pathflip_jax.evaluate.tasks.grounding import slide_means
from pathflip_jax.evaluate.tasks.truth import true_patches
from pathflip_jax.grounding import maps
from pathflip_jax.scores import retrieval, statistics
from pathflip_jax.scores.statistics import Statistic
from real_tissue_parts import linear
from real_tissue_parts.mosaics import MASKS, OUTLINES

PATCHES = 40  # of a slide, for outline probes
ZERO_SHOT, ZERO_SHOT_WINDOWS, RETRIEVAL = "zero_shot", "zero_shot_windows", "retrieval"
GROUNDING = {"grounding": OUTLINES, "grounding_masks": MASKS}  # by the folder of true outlines
CLASS_PROBES, OUTLINE_PROBES, EXACT_SETS = "class probes (told the classes)", "outline probes", "exact class sets"
MEAN_COLOUR, LINEAR = "mean colour", "linear model of words and mean features"
K = 5


class Side(NamedTuple):
    """The slides of one split: their mean features and the classes that each shows."""

    ids: list[str]
    means: Float[np.ndarray, "n F"]
    shows: Bool[np.ndarray, "n C"]


class Slides(NamedTuple):
    """A cohort with its folder, classes, and the features of its slides."""

    cohort: Cohort
    folder: Path
    classes: list[str]
    features: Mapping[str, SlideFeatures]
    windows: Mapping[str, Float[np.ndarray, "N F"]]  # mean feature of the window around each patch, by slide

    @property
    def scored(self) -> "Side":
        """The slides to score."""
        return self.side(self.cohort.split)

    def validation(self) -> "Side | None":
        """The validation slides; None where they are the ones to score."""
        return None if self.cohort.split == "val" else self.side("val")

    def side(self, split: str) -> Side:
        """The slides of a split."""
        rows = self.cohort.rows(split)
        ids = [row["slide_id"] for row in rows]
        means = np.stack([np.asarray(self.features[slide].features, np.float32).mean(0) for slide in ids])
        shows = np.array([[name in row["classes"].split(";") for name in self.classes] for row in rows])
        return Side(ids, means, shows)


def read_slides(folder: Path, records: Path, classes: Sequence[str], split: str, window: int) -> Slides:
    """The cohort in `folder`, whose features are in `records`, with the split to score.

    Patches are described by the mean feature of a window of `window` patches around them, as maps of a run are.
    """
    cohort = read_cohort(records, folder / "slides.csv", split, images=folder)
    ids = [row["slide_id"] for row in cohort.table]
    features = {slide: cohort.features(slide) for slide in ids}
    windows = {slide: windowed(found, window) for slide, found in features.items()}
    return Slides(cohort, folder, list(classes), features, windows)


def score_baselines(slides: Slides) -> dict[str, dict[str, Statistic]]:
    """Name -> task -> statistic over the scored slides in the table's order."""
    test = slides.scored
    reports = {text.slide_ids[0]: text.caption for text in read_texts(slides.folder / "reports.jsonl")}
    captions = [reports[slide] for slide in test.ids]
    means, patches = class_probes(slides)
    found = {
        CLASS_PROBES: {
            ZERO_SHOT: _zero_shot(slides, means),
            ZERO_SHOT_WINDOWS: _by_windows(slides, patches),
            RETRIEVAL: _retrieval(test, _log_odds(means), _signs(test.shows), captions),
        },
        EXACT_SETS: {RETRIEVAL: _retrieval(test, _signs(test.shows), _signs(test.shows), captions)},
    }
    found[LINEAR], maps_of_words = _linear(slides, reports)
    found[OUTLINE_PROBES] = {}
    for task, folder in GROUNDING.items():
        if not (slides.folder / folder).is_dir():
            continue
        outlined = outline_probes(slides, folder)
        found[LINEAR][task] = _grounding(slides, maps_of_words, folder)
        found[CLASS_PROBES][task] = _grounding(slides, patches, folder)
        found[OUTLINE_PROBES][task] = _grounding(slides, outlined, folder)
        if folder == OUTLINES:
            found[OUTLINE_PROBES][ZERO_SHOT_WINDOWS] = _by_windows(slides, outlined)
    labelled = zero_shot.colour_probabilities(slides.cohort, slides.classes)
    if labelled is not None:
        found[MEAN_COLOUR] = {ZERO_SHOT: _zero_shot(slides, labelled)}
    return found


def _linear(
    slides: Slides, reports: Mapping[str, str]
) -> tuple[dict[str, Statistic], dict[str, Float[np.ndarray, "C N"]]]:
    """Zero-shot and retrieval statistics of the linear model, and its map of each class on the scored slides."""
    train, test = slides.side("train"), slides.scored
    sentences = [split_sentences(reports[slide]) for slide in train.ids]
    model = linear.fit([slides.features[slide].features for slide in train.ids], sentences)
    captions = [reports[slide] for slide in test.ids]
    prompts = read_json(slides.folder / "prompts.json")["classes"]
    texts = read_json(slides.folder / "grounding.json")
    means, words = model.embed_features(test.means), model.embed_texts(captions)
    classes = np.stack([model.embed_texts(prompts[name]).mean(0) for name in slides.classes])
    windows = {slide: model.embed_features(slides.windows[slide]) for slide in test.ids}
    unit = retrieval.normalise(classes)
    shares = {slide: zero_shot.class_probabilities(rows, unit).T for slide, rows in windows.items()}
    found = {
        ZERO_SHOT: _zero_shot(slides, special.softmax(means @ classes.T, axis=1)),
        ZERO_SHOT_WINDOWS: _by_windows(slides, shares),
        RETRIEVAL: _retrieval(test, means, words, captions),
    }
    asked = np.stack([model.embed_texts(texts[name]).mean(0) for name in slides.classes])
    return found, {slide: asked @ rows.T for slide, rows in windows.items()}


def class_probes(slides: Slides) -> tuple[Float[np.ndarray, "n C"], dict[str, Float[np.ndarray, "C N"]]]:
    """The probability of each class in each scored slide, and in each of their patches."""
    train, val, test = slides.side("train"), slides.validation(), slides.scored
    described = [slides.windows[slide] for slide in test.ids]
    means, *patches = _probabilities(
        (train.means, train.shows), (val.means, val.shows) if val else None, [test.means, *described]
    )
    return means.T, dict(zip(test.ids, patches, strict=True))


def outline_probes(slides: Slides, folder: str) -> dict[str, Float[np.ndarray, "C N"]]:
    """The probability of each class in the patches of scored slides, learnt from outlined patches."""
    train = _outlined_patches(slides, folder, "train")
    val = None if slides.cohort.split == "val" else _outlined_patches(slides, folder, "val")
    ids = slides.cohort.slide_ids
    return dict(zip(ids, _probabilities(train, val, [slides.windows[slide] for slide in ids]), strict=True))


def windowed(slide: SlideFeatures, window: int) -> Float[np.ndarray, "N F"]:
    """The mean feature of the window around each patch, of the patches that are there."""
    slots = maps.window_slots(slide.coords, slide.patch_size, window)
    return maps.window_means(np.asarray(slide.features, np.float32), slots)


def _probabilities(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray] | None, asked: Sequence[np.ndarray]
) -> list[Float[np.ndarray, "C n"]]:
    """Probability of each class in each part [n, F] of `asked`, by a probe per class; pairs are [n, F] and [n, C]."""
    rows = np.concatenate(asked)
    found = [
        probes.linear(
            probes.Labelled(train[0], train[1][:, c].astype(int)),
            _usable(val[0], val[1][:, c]) if val else None,
            rows,
            2,
        )[:, 1]
        for c in range(train[1].shape[1])
    ]
    return np.split(np.stack(found), np.cumsum([len(part) for part in asked])[:-1], axis=1)


def _usable(x: np.ndarray, y: np.ndarray) -> probes.Labelled | None:
    """Validation rows, if both classes are among them."""
    return probes.Labelled(x, y.astype(int)) if 0 < y.sum() < len(y) else None


def _outlined_patches(slides: Slides, folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of patches drawn from every slide of a split, and the outlines that each lies in."""
    features, inside = [], []
    for number, row in enumerate(slides.cohort.rows(split)):
        slide = slides.features[row["slide_id"]]
        kept = np.random.default_rng(number).permutation(len(slide.coords))[:PATCHES]
        features.append(slides.windows[slide.slide_id][kept])
        inside.append(true_patches(slides.folder / folder, slide, slides.classes)[0].T[kept])
    return np.concatenate(features), np.concatenate(inside)


def _grounding(slides: Slides, found: Mapping[str, Float[np.ndarray, "C N"]], folder: str) -> Statistic:
    """ROC AUC of patches, smoothed as the maps of a run are."""
    truth = {slide: true_patches(slides.folder / folder, slides.features[slide], slides.classes) for slide in found}
    scores = map_scores.score_maps(
        lambda slide: found[slide.slide_id], slides.features.__getitem__, truth, {}, smooth=maps.SMOOTH, name="probes"
    )
    return statistics.mean(slide_means(scores.auc))


def _zero_shot(slides: Slides, probabilities: Float[np.ndarray, "n C"]) -> Statistic:
    labels = np.array([slides.classes.index(label) for label in slides.cohort.labels])
    return statistics.classification(labels, probabilities.argmax(1), probabilities)["balanced_accuracy"]


def _by_windows(slides: Slides, probabilities: Mapping[str, Float[np.ndarray, "C N"]]) -> Statistic:
    """Zero-shot classification by the mean of a slide's patches, as of a run by windows."""
    return _zero_shot(slides, np.stack([probabilities[slide].mean(1) for slide in slides.cohort.slide_ids]))


def _retrieval(test: Side, images: np.ndarray, texts: np.ndarray, captions: Sequence[str]) -> Statistic:
    """R@5, mean of both ways; equal vectors are ties, which count as ordered at random."""
    related = retrieval.relate(test.ids, captions)
    both = [retrieval.recall(retrieval.rank(*pair, related), K) for pair in ((images, texts), (texts, images))]
    return statistics.mean(np.mean(both, axis=0))


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Vectors whose product with signs of classes ranks sets of classes by their likelihood."""
    kept = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return np.log(kept / (1 - kept))


def _signs(shows: np.ndarray) -> np.ndarray:
    return np.where(shows, 1.0, -1.0)
