"""Figures of an evaluation, each with its interval, its baselines and the compared runs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.texts.text import SlideText
from pathflip_jax.evaluate import colour
from pathflip_jax.evaluate import prompt_files as zero_shot
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.tasks import few_shot, froc
from pathflip_jax.evaluate.tasks import map_scores as grounding
from pathflip_jax.evaluate.tasks.region_texts import RegionText
from pathflip_jax.evaluate.tasks.truth import Outlined
from pathflip_jax.scores import retrieval
from pathflip_jax.scores import statistics as scores

GALLERY = 100
DIRECTIONS = {"slide_to_text": "slide to text", "text_to_slide": "text to slide"}
REGION_DIRECTIONS = {"region_to_text": "region to text", "text_to_region": "text to region"}


class Tasks(NamedTuple):
    """What is to be scored on a cohort; a task without its input is None."""

    pairs: list[SlideText] | None = None
    regions: list[RegionText] | None = None
    prompts: zero_shot.Prompts | None = None
    labels: np.ndarray | None = None  # [n] the class of each slide, a number within the prompts
    probed: Sequence[few_shot.Task] = ()
    outlined: Outlined | None = None


class Outcome(NamedTuple):
    """What one run did on every slide or text, before anything is averaged.

    The ranks named `with_twins` are those of galleries that keep rows with the caption of the query's row; None where
    there are none.
    """

    ranks: dict[str, retrieval.Ranks] | None
    probabilities: np.ndarray | None  # [n, C]
    maps: grounding.MapScores | None  # of the slides with outlines
    no_text: grounding.MapScores | None  # of attention that no text guides
    region_ranks: dict[str, retrieval.Ranks] | None = None
    beliefs: Sequence[dict[tuple, np.ndarray]] = ()  # of each few-shot task: (probe, shots) -> [seeds, n, C]
    ranks_with_twins: dict[str, retrieval.Ranks] | None = None
    region_ranks_with_twins: dict[str, retrieval.Ranks] | None = None


def _entry(ours: list, theirs: list, weights, **baselines) -> dict:
    """A figure with its interval and baselines; with runs to compare to, theirs and the paired difference."""
    statistic = scores.mean_over_runs(ours)
    entry = scores.interval(statistic, weights)._asdict() | baselines
    if len(ours) > 1:
        entry["by_run"] = [scores.interval(one, weights).value for one in ours]
    if theirs:
        other = scores.mean_over_runs(theirs)
        entry["compared"] = scores.interval(other, weights)._asdict()
        entry["difference"] = scores.interval(scores.difference(statistic, other), weights)._asdict()
    return entry


def score_retrieval(
    found_ranks: list[dict[str, retrieval.Ranks]],
    compared: list[dict[str, retrieval.Ranks]],
    patients: list[str],
    seed: int,
) -> dict:
    """R@k and median rank both ways, in the whole gallery and in galleries of 100.

    The gallery stays as it is in the bootstrap; the patients whose slides and texts ask are drawn.
    """
    weights = scores.patient_weights(patients, seed=seed)
    found = {}
    for key in found_ranks[0]:
        ours, theirs = [ranks[key] for ranks in found_ranks], [ranks[key] for ranks in compared]
        sizes = retrieval.gallery_sizes(ours[0])
        galleries = {"all": None} | ({f"of_{GALLERY}": GALLERY} if sizes.max() >= GALLERY else {})
        found[key] = {}
        for name, gallery in galleries.items():
            block = {"gallery": int(retrieval.gallery_sizes(ours[0], gallery).max()), "queries": len(patients)}
            for k in retrieval.RECALLS:
                ones = [[scores.mean(retrieval.recall(r, k, gallery)) for r in side] for side in (ours, theirs)]
                block[f"R@{k}"] = _entry(*ones, weights, chance=retrieval.chance(ours[0], k, gallery))
            ones = [[scores.median(retrieval.expected_rank(r, gallery)) for r in side] for side in (ours, theirs)]
            block["median_rank"] = _entry(*ones, weights, chance=retrieval.chance_median_rank(ours[0], gallery))
            found[key][name] = block
    return found


def say_twins(what: str, captions: int, ranks: dict, with_twins: dict | None, directions: dict) -> list[str]:
    """What the rule about captions of several patients did to R@1 of the first run; nothing where none is one."""
    if with_twins is None:
        return []
    left = int(max((with_twins[key].others - ranks[key].others > 0).sum() for key in ranks))
    changed = "; ".join(
        f"{name} {retrieval.recall(with_twins[key], 1).mean():.3f} without the rule, "
        f"{retrieval.recall(ranks[key], 1).mean():.3f} with it"
        for key, name in directions.items()
    )
    return [
        f"{left} of {captions} captions of {what} are those of another patient's too, word for word: such rows leave "
        f"each other's gallery, for finding one of them is no miss. R@1 {changed}"
    ]


def score_zero_shot(
    outcomes: list[Outcome],
    compared: list[Outcome],
    cohort: Cohort,
    prompts,
    labels,
    files: dict,
    seed: int,
    published: bool = False,
) -> dict:
    """The scores of the classification beside a guess, the majority class and the nearest colour.

    `published` adds F1 as published scripts compute it.
    """
    names = list(prompts.classes)
    weights = scores.patient_weights(cohort.patients, seed=seed)

    def statistics(belief):
        found = scores.classification(labels, belief.argmax(1), belief)
        if published:
            found["published_f1"] = scores.published_f1(labels, belief.argmax(1), len(names))
        return found

    ours, theirs = ([statistics(o.probabilities) for o in side] for side in (outcomes, compared))
    counted = [names.index(row["label"]) for row in cohort.train if row.get("label") in names]
    majority = int(np.bincount(counted if counted else labels, minlength=len(names)).argmax())
    blind = scores.baselines(labels, len(names), majority)
    belief = colour_belief(cohort, names, files)
    by_colour = None if belief is None else statistics(belief)
    metrics = {}
    for metric in ours[0]:
        baselines = {name: blind[name][metric] for name in blind}
        if by_colour is not None:
            baselines["mean_colour"] = scores.interval(by_colour[metric], weights)._asdict()
        metrics[metric] = _entry([o[metric] for o in ours], [o[metric] for o in theirs], weights, **baselines)
    first = outcomes[0].probabilities
    return {
        "task": prompts.task,
        "classes": {name: int((labels == i).sum()) for i, name in enumerate(names)},
        "texts": prompts.classes,
        "majority_class": names[majority],
        "majority_from": "train" if counted else "this split",
        "metrics": metrics,
        "per_class": scores.per_class(labels, first.argmax(1), first, names),
    }


def colour_belief(cohort: Cohort, names, files) -> np.ndarray | None:
    """The belief by the nearest training slide in mean colour [n, C]; None where there are no slide files for it."""
    label_of = {row["slide_id"]: row.get("label") for row in cohort.train}

    def mean(slide):
        known = slide.slide_id in files and slide.coords is not None and slide.patch_size > 0
        return colour.patch_colours(files[slide.slide_id], slide.coords, slide.patch_size).mean(0) if known else None

    labelled = [(label_of[s.slide_id], mean(s)) for s in cohort.train_features()]
    train = [(names.index(label), rgb) for label, rgb in labelled if label in names and rgb is not None]
    test = [mean(cohort.features(slide)) for slide in cohort.slide_ids]
    if not train or any(rgb is None for rgb in test):
        return None
    return colour.nearest_class(
        np.stack([rgb for _, rgb in train]),
        np.array([label for label, _ in train]),
        np.stack(test),
        len(names),
    )


def colour_maps(cohort: Cohort, outlined: Outlined, files, outlines, smooth: float, seed) -> grounding.MapScores | None:
    """The scores of the mean-colour map; None where there are no slide files for it."""
    if not set(outlined.truth) <= set(files) or not cohort.train:
        return None
    colour_map = grounding.ColourMap(cohort.train_features(seed), files, outlines, list(outlined.concepts), seed)
    training = {slide: known for slide, known in outlined.training.items() if slide in files}
    return grounding.score_maps(
        colour_map, cohort.features, outlined.truth, training, outlined.lesions, smooth, name="mean colour"
    )


def slide_means(values: np.ndarray) -> np.ndarray:
    """The mean of each slide over its concepts [n, C] -> [n], NaN for a slide with none."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def score_grounding(
    outcomes: list[Outcome], compared: list[Outcome], cohort: Cohort, outlined: Outlined, by_colour, seed: int
) -> dict:
    """AUC, pointing game and Dice over slides and by concept, beside what knows less; runs are compared by slide."""
    patient = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    weights = scores.patient_weights([patient[slide] for slide in outlined.truth], seed=seed)
    ours, theirs = [o.maps for o in outcomes], [o.maps for o in compared]
    blind = {"no_text": [o.no_text for o in outcomes]}
    if by_colour is not None:
        blind["mean_colour"] = [by_colour]
    chance = grounding.chance(outlined.truth)
    metrics = [name for name in grounding.METRICS if np.isfinite(getattr(ours[0], name)).any()]

    def scored(of_slides, with_difference: bool) -> dict:
        """Every metric of one choice of values [n, C] -> [n]."""
        found = {}
        for metric in metrics:

            def over_runs(side, metric=metric):
                return [scores.mean(of_slides(getattr(maps, metric))) for maps in side]

            by_chance = scores.interval(over_runs([chance])[0], weights).value
            entry = _entry(over_runs(ours), over_runs(theirs), weights, chance=by_chance)
            for name, side in blind.items():
                other = scores.mean_over_runs(over_runs(side))
                entry[name] = scores.interval(other, weights)._asdict()
                if with_difference:
                    gain = scores.difference(scores.mean_over_runs(over_runs(ours)), other)
                    entry.setdefault("gain", {})[name] = scores.interval(gain, weights)._asdict()
            found[metric] = entry
        return found

    rows = []
    for c, concept in enumerate(outlined.concepts):
        row = {"concept": concept, "slides": int(np.isfinite(ours[0].auc[:, c]).sum())}
        row |= scored(lambda values, c=c: values[:, c], with_difference=False)
        rows.append(row | {"thresholds": [float(maps.thresholds[c]) for maps in ours]})
    return {
        "slides": int(np.isfinite(slide_means(ours[0].auc)).sum()),
        "threshold_slides": len(outlined.training),
        "texts": outlined.concepts,
        **scored(slide_means, with_difference=True),
        "per_concept": [row for row in rows if row["slides"]],
    }


def score_lesions(
    outcomes: list[Outcome], compared: list[Outcome], cohort: Cohort, outlined: Outlined, by_colour, seed
) -> dict:
    """The detection of lesions: the challenge's score and the sensitivity at each rate of false positives."""
    patient = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    weights = scores.patient_weights([patient[slide] for slide in outlined.truth], seed=seed)
    blind = {"no_text": [o.no_text for o in outcomes]} | ({"mean_colour": [by_colour]} if by_colour is not None else {})

    def scored(rates) -> dict:
        def over_runs(side):
            return [froc.sensitivity(maps.found, rates) for maps in side]

        entry = _entry(over_runs([o.maps for o in outcomes]), over_runs([o.maps for o in compared]), weights)
        for name, side in blind.items():
            entry[name] = scores.interval(scores.mean_over_runs(over_runs(side)), weights)._asdict()
        return entry

    found = outcomes[0].maps.found
    return {
        "concept": list(outlined.concepts)[outlined.lesions.concept],
        "slides": len(found),
        "slides_with_lesions": sum(len(one.lesions) > 0 for one in found),
        "lesions": sum(len(one.lesions) for one in found),
        "score": scored(froc.RATES),
        "at": {f"{rate:g}": scored([rate]) for rate in froc.RATES},
    }
