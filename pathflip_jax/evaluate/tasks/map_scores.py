"""Scores of maps against annotated outlines, over the patches of a slide, per slide and concept.

- ROC AUC: the probability that a patch inside an outline scores above one outside. A random map has 0.5.
- Pointing game: whether the highest patch lies inside. A random map has the fraction of patches inside.
- Dice of the patches above a threshold with those inside. The threshold of a concept is the best one on training
  slides; the scored slides are not used to choose it.

A slide's score is the mean over the concepts present in it, a cohort's the mean over slides. Maps that ignore the
text (the cross-attention of the Q-Former) and morphology (mean colour) are scored by the same rules.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.evaluate import colour
from pathflip_jax.evaluate.tasks import froc
from pathflip_jax.evaluate.tasks.truth import LesionTask, Truth, true_patches
from pathflip_jax.grounding.surface import smooth_patches
from pathflip_jax.scores import statistics

TRAIN_PATCHES = 100  # per training slide, for the colour baseline
TRAIN_SLIDES = 100
CANDIDATES = 400  # quantiles of the scores that are tried as thresholds
METRICS = ("auc", "pointing", "dice")


class MapScores(NamedTuple):
    """The metrics of maps on each slide and concept: NaN if no patch or every patch of the slide is inside.

    `thresholds` are those of the Dice, NaN if no training slide shows the concept; `found` are the detections of
    lesions in each slide, if lesions are scored.
    """

    auc: Float[np.ndarray, "n C"]
    pointing: Float[np.ndarray, "n C"]
    dice: Float[np.ndarray, "n C"]
    thresholds: Float[np.ndarray, "C"]
    found: list[froc.Found] | None = None


def concept_scores(predictor, slide: SlideFeatures, concepts: dict[str, list[str]], **how) -> Float[np.ndarray, "C N"]:
    """The patch scores of each concept: the mean over its texts."""
    texts = [text for listed in concepts.values() for text in listed]
    found = predictor.ground(slide, texts, **how).patch_scores
    ends = np.cumsum([len(listed) for listed in concepts.values()])
    return np.stack([part.mean(0) for part in np.split(found, ends[:-1])])


def concept_aucs(
    inside: Bool[np.ndarray, "C N"], found: Float[np.ndarray, "C N"], counts=None
) -> Float[np.ndarray, "C"]:
    """The ROC AUC of each concept's map, NaN if no patch or every patch of the slide is inside."""
    counts = np.ones(inside.shape[1], bool) if counts is None else counts
    ones = np.ones((1, int(counts.sum())))
    return np.array([statistics.auc(t[counts], s[counts])(ones)[0] for t, s in zip(inside, found, strict=True)])


def pointing_hits(
    inside: Bool[np.ndarray, "C N"], found: Float[np.ndarray, "C N"], counts: Bool[np.ndarray, "N"]
) -> Float[np.ndarray, "C"]:
    """Whether the highest patch of each map lies inside; of tied patches, the fraction that do."""
    hits = np.full(len(inside), np.nan)
    for c, (true, score) in enumerate(zip(inside[:, counts], found[:, counts], strict=True)):
        if true.any() and not true.all():
            hits[c] = true[score == score.max()].mean()
    return hits


def dice_at(
    thresholds: Float[np.ndarray, "T"], true: Bool[np.ndarray, "N"], score: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "T"]:
    """The Dice of the patches at or above each threshold with the true ones: 2 |both| / (|marked| + |true|)."""
    marked = len(score) - np.searchsorted(np.sort(score), thresholds)
    both = true.sum() - np.searchsorted(np.sort(score[true]), thresholds)
    return 2 * both / np.maximum(marked + true.sum(), 1)


def choose_thresholds(maps: Iterable[tuple[Truth, Float[np.ndarray, "C N"]]], concepts: int) -> Float[np.ndarray, "C"]:
    """The threshold of each concept with the best mean Dice over the slides that show it; NaN if none does."""
    seen: list[list] = [[] for _ in range(concepts)]
    for (inside, counts), found in maps:
        for c, (true, score) in enumerate(zip(inside[:, counts], found[:, counts], strict=True)):
            if true.any() and not true.all():
                seen[c].append((true, score))
    chosen = np.full(concepts, np.nan)
    for c, slides in enumerate(seen):
        if slides:
            candidates = np.quantile(np.concatenate([score for _, score in slides]), np.linspace(0, 1, CANDIDATES))
            reached = np.mean([dice_at(candidates, true, score) for true, score in slides], axis=0)
            chosen[c] = candidates[reached.argmax()]
    return chosen


def score_maps(
    map_of: Callable[[SlideFeatures], Float[np.ndarray, "C N"]],
    features: Callable[[str], SlideFeatures],
    truth: dict[str, Truth],
    training: dict[str, Truth],
    lesions: LesionTask | None = None,
    smooth: float = 0.0,
    name: str = "",
) -> MapScores:
    """The scores of a function from slides to maps, with thresholds from the `training` slides.

    Maps are scored with the smoothing with which they are shown, a Gaussian of `smooth` patch edges.
    """

    def smoothed(slide: SlideFeatures) -> Float[np.ndarray, "C N"]:
        return smooth_patches(map_of(slide), slide.coords, slide.patch_size, smooth)

    concepts = len(next(iter(truth.values()))[0])
    bar = tqdm(training.items(), desc=f"{name}: thresholds", unit="slide", leave=False)
    thresholds = choose_thresholds(((known, smoothed(features(slide))) for slide, known in bar), concepts)
    rows, detected = [], []
    for slide_id, (inside, counts) in tqdm(truth.items(), desc=f"{name}: grounding", unit="slide", leave=False):
        slide = features(slide_id)
        found = smoothed(slide)
        aucs = concept_aucs(inside, found, counts)
        dices = [
            dice_at(thresholds[c : c + 1], inside[c, counts], found[c, counts])[0] if known else np.nan
            for c, known in enumerate(np.isfinite(aucs) & np.isfinite(thresholds))
        ]
        rows.append((aucs, pointing_hits(inside, found, counts), np.array(dices)))
        if lesions is not None:
            detections = froc.detect(found[lesions.concept], slide.coords, slide.patch_size)
            detected.append(froc.match(lesions.slides[slide_id], detections))
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    return MapScores(*columns, thresholds, detected if lesions is not None else None)


def chance(truth: dict[str, Truth]) -> MapScores:
    """The expected scores of a random map: AUC 0.5, hits at the rate of patches inside, the Dice of marking all."""
    share = np.stack([inside[:, counts].mean(1) for inside, counts in truth.values()])
    share[(share == 0) | (share == 1)] = np.nan
    return MapScores(np.where(np.isnan(share), np.nan, 0.5), share, 2 * share / (1 + share), share.mean(0) * np.nan)


class ColourMap:
    """The mean-colour baseline: a patch scores the share of a concept among training patches of similar colour."""

    def __init__(self, slides, files: dict[str, Path], folder, concepts: list[str], seed: int = 0) -> None:
        """Read the colours of patches of training slides; `slides` yields their `SlideFeatures`."""
        rng = np.random.default_rng(seed)
        colours, inside, owners = [], [], []
        for slide in slides:
            if slide.slide_id not in files or not (Path(folder) / f"{slide.slide_id}.geojson").exists():
                continue
            kept = rng.permutation(len(slide.coords))[:TRAIN_PATCHES]
            colours.append(colour.patch_colours(files[slide.slide_id], slide.coords[kept], slide.patch_size))
            inside.append(true_patches(folder, slide, concepts)[0][:, kept].T)
            owners += [slide.slide_id] * len(kept)
            if len(colours) == TRAIN_SLIDES:
                break
        if not colours:
            raise ValueError(
                f"no training slide has both a slide file and outlines in {folder}, as the colour baseline needs"
            )
        self.files, self.owners = files, np.array(owners)
        self.colours, self.inside = np.concatenate(colours), np.concatenate(inside)

    def __call__(self, slide: SlideFeatures) -> Float[np.ndarray, "C N"]:
        """The scores of every concept on a slide with a slide file, from the patches of other slides."""
        found = colour.patch_colours(self.files[slide.slide_id], slide.coords, slide.patch_size)
        others = self.owners != slide.slide_id
        others |= not others.any()  # if this slide is the only one
        return colour.concept_shares(self.colours[others], self.inside[others], found).T
