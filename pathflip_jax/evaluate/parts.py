"""The parts of an evaluation, one for each task: what runs answered, made into scores, figures and tables."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pathflip_jax.evaluate import figures, protocols, summary, tables
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.summary import DIRECTIONS, REGION_DIRECTIONS, Outcome, Tasks
from pathflip_jax.evaluate.tasks import few_shot
from pathflip_jax.evaluate.tasks import map_scores as grounding
from pathflip_jax.evaluate.tasks.truth import Outlined
from pathflip_jax.grounding import heatmap
from pathflip_jax.grounding.outlines import of_concept, read_outlines
from pathflip_jax.grounding.surface import smooth_patches
from pathflip_jax.inference.predictor import Predictor

EXAMPLES = {"good": 0.9, "typical": 0.5, "poor": 0.1}  # quantiles of the slides' AUC that the report shows


class Mapping(NamedTuple):
    """How slides are mapped, and the outlines that their maps are held against."""

    how: dict  # of Predictor.ground: method, window, context
    smooth: float  # patch edges
    clear: float | None
    outlines: str | os.PathLike | None
    lesions: str | None


class Answers(NamedTuple):
    """What runs, and those that they are compared to, answered to the tasks of a cohort."""

    cohort: Cohort
    tasks: Tasks
    runs: list  # folders
    ours: list[Outcome]
    others: list
    theirs: list[Outcome]
    files: dict[str, Path]  # slide files by slide id
    seed: int


class Part(NamedTuple):
    """What a task adds to scores.json, and its figures and tables by name."""

    scores: dict
    pictures: dict[str, Figure]
    tables: dict[str, list[dict]]


def score_tasks(answers: Answers, predictor: Predictor, mapping: Mapping, rules: protocols.Protocol) -> list[Part]:
    """Score every task that there is; `predictor` is the first run, which draws the maps that are shown."""
    tasks, parts = answers.tasks, []
    if tasks.pairs is not None:
        parts.append(_retrieval(answers))
    if tasks.regions is not None:
        parts.append(_region_retrieval(answers))
    if tasks.prompts is not None:
        parts.append(_zero_shot(answers, rules))
    if tasks.probed:
        parts.append(_few_shot(answers, rules))
    if tasks.outlined is not None:
        parts.append(_grounding(answers, predictor, mapping))
    return parts


def _retrieval(answers: Answers) -> Part:
    """Slides by their texts, and texts by their slides."""
    case_of = dict(zip(answers.cohort.slide_ids, answers.cohort.patients, strict=True))
    pairs = answers.tasks.pairs
    slides, patients = [" ".join(text.slide_ids) for text in pairs], [case_of[text.slide_ids[0]] for text in pairs]
    ours, theirs = ([one.ranks for one in side] for side in (answers.ours, answers.theirs))
    twins = answers.ours[0].ranks_with_twins
    answers.cohort.warnings.extend(summary.say_twins("slides", len(pairs), ours[0], twins, DIRECTIONS))
    return _ranking("", answers, ours, theirs, DIRECTIONS, slides, patients)


def _region_retrieval(answers: Answers) -> Part:
    """Regions by their texts, and texts by their regions."""
    texts = answers.tasks.regions
    slides, patients = [text.slide_id for text in texts], [text.patient for text in texts]
    ours, theirs = ([one.region_ranks for one in side] for side in (answers.ours, answers.theirs))
    twins = answers.ours[0].region_ranks_with_twins
    answers.cohort.warnings.extend(summary.say_twins("regions", len(texts), ours[0], twins, REGION_DIRECTIONS))
    return _ranking("region_", answers, ours, theirs, REGION_DIRECTIONS, slides, patients)


def _ranking(prefix: str, answers: Answers, ours: list, theirs: list, directions, slides: list[str], patients) -> Part:
    """The ranks of a retrieval, scored; `prefix` is what its names begin with."""
    curves = {name: ours[0][key] for key, name in directions.items()}
    return Part(
        {f"{prefix}retrieval": summary.score_retrieval(ours, theirs, patients, answers.seed)},
        {f"{prefix}retrieval": figures.recall_curves(curves)},
        {f"{prefix}ranks": tables.rank_rows(answers.runs, ours, slides, patients)},
    )


def _zero_shot(answers: Answers, rules: protocols.Protocol) -> Part:
    """Slides by the texts of their classes."""
    cohort, tasks, names = answers.cohort, answers.tasks, list(answers.tasks.prompts.classes)
    found = summary.score_zero_shot(
        answers.ours, answers.theirs, cohort, tasks.prompts, tasks.labels, answers.files, answers.seed,
        rules.published_f1,
    )  # fmt: skip
    return Part(
        {"zero_shot": found},
        {"confusion": figures.confusion(tasks.labels, answers.ours[0].probabilities.argmax(1), names)},
        {"predictions": tables.prediction_rows(answers.runs, answers.ours, cohort, names)},
    )


def _few_shot(answers: Answers, rules: protocols.Protocol) -> Part:
    """Probes of every label column, and a warning where they do not beat the patch features themselves."""
    blocks, pictures, rows = [], {}, {}
    for number, task in enumerate(answers.tasks.probed):
        ours, theirs = ([one.beliefs[number] for one in side] for side in (answers.ours, answers.theirs))
        key = f"few_shot_{number + 1}"
        blocks.append(few_shot.score_task(task, ours, theirs, rules, answers.seed) | {"figures": key})
        answers.cohort.warnings.extend(few_shot.unbeaten(blocks[-1]))
        pictures |= figures.few_shot(blocks[-1], task.test.classes, ours[0])
        rows[key] = few_shot.probe_rows(task, answers.runs, ours)
    return Part({"few_shot": blocks}, pictures, rows)


def _grounding(answers: Answers, predictor: Predictor, mapping: Mapping) -> Part:
    """Maps of concepts against their outlines, beside attention that no text guides and the mean colour."""
    cohort, outlined, seed = answers.cohort, answers.tasks.outlined, answers.seed
    ours, theirs = answers.ours, answers.theirs
    by_colour = summary.colour_maps(cohort, outlined, answers.files, mapping.outlines, mapping.smooth, seed)
    found = summary.score_grounding(ours, theirs, cohort, outlined, by_colour, seed)
    method = mapping.how["method"] or predictor.default_method
    found["how"] = mapping.how | {"method": method, "smooth": mapping.smooth, "clear": mapping.clear}
    pictures = {}
    if mapping.lesions is not None:
        found["froc"] = summary.score_lesions(ours, theirs, cohort, outlined, by_colour, seed)
        pictures["froc"] = figures.froc_curves(
            {"this run": ours[0].maps, "attention, no text": ours[0].no_text, "mean colour": by_colour}
        )
    second = Path(answers.others[0]).name if answers.others else None
    pictures["concepts"] = figures.concept_dots(found["per_concept"], second)
    for kind, slide_id in _examples(ours[0].maps.auc, list(outlined.truth)).items():
        pictures[f"grounding_{kind}"] = _panels(predictor, cohort, outlined, slide_id, mapping, answers.files)
    rows = tables.grounding_rows(answers.runs, ours, cohort, outlined, by_colour)
    return Part({"grounding": found}, pictures, {"grounding": rows})


def _examples(aucs: np.ndarray, slide_ids: list[str]) -> dict[str, str]:
    """Slides to show, by their place among all: a good, a typical and a poor one, never only the best."""
    means = summary.slide_means(aucs)
    order = [i for i in np.argsort(means, kind="stable") if np.isfinite(means[i])]
    chosen: dict[str, str] = {}
    for kind, place in EXAMPLES.items():
        slide_id = slide_ids[order[round(place * (len(order) - 1))]]
        if slide_id not in chosen.values():  # a cohort of one or two slides
            chosen[kind] = slide_id
    return chosen


def _panels(
    predictor: Predictor, cohort: Cohort, outlined: Outlined, slide_id: str, mapping: Mapping, files: dict[str, Path]
) -> Figure:
    """The maps of the concepts present in a slide, the true outline on each."""
    slide = cohort.features(slide_id)
    inside, counts = outlined.truth[slide_id]
    raw = grounding.concept_scores(predictor, slide, outlined.concepts, **mapping.how)
    found = smooth_patches(raw, slide.coords, slide.patch_size, mapping.smooth)
    aucs = grounding.concept_aucs(inside, found, counts)
    present = [c for c in np.argsort(-inside.sum(1), kind="stable") if np.isfinite(aucs[c])][:3]
    names = list(outlined.concepts)
    true = read_outlines(Path(mapping.outlines) / f"{slide_id}.geojson")
    if slide_id in files:
        canvas = heatmap.read_thumbnail(files[slide_id])
    else:
        canvas = heatmap.blank_canvas(slide.coords, slide.patch_size, slide.width, slide.height)
    return heatmap.draw_panels(
        canvas,
        [f"“{outlined.concepts[names[c]][0]}”" for c in present],
        raw[present],
        slide.coords,
        slide.patch_size,
        mpp=slide.mpp,
        outlines=[of_concept(true, names[c]) for c in present],
        notes=[f"{names[c]}: ROC AUC {aucs[c]:.2f}" for c in present],
        heading=slide_id,
        smooth=mapping.smooth,
    )
