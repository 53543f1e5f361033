"""One evaluation of one or several runs: what `pathflip evaluate` does, from records to report.

The figures are worth what their protocol is worth: the split is the table's, no label or outline of it chooses
anything, intervals draw patients, and every figure stands beside what knows nothing (DESIGN section 8).
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pathflip_jax.evaluate import (
    colour,
    few_shot,
    figures,
    grounding,
    protocols,
    published,
    report,
    retrieval,
    scores,
    summary,
    zero_shot,
)
from pathflip_jax.evaluate.cohort import Cohort, label_index, name_labels, read_cohort, read_pairs
from pathflip_jax.evaluate.language import evaluate_language
from pathflip_jax.evaluate.region_texts import embed_regions, read_region_texts
from pathflip_jax.evaluate.summary import DIRECTIONS, REGION_DIRECTIONS, Outcome, Tasks
from pathflip_jax.evaluate.truth import read_outlined
from pathflip_jax.grounding import heatmap, maps
from pathflip_jax.grounding.outlines import read_outlines
from pathflip_jax.grounding.surface import SMOOTH, smooth_patches
from pathflip_jax.inference import Predictor, load
from pathflip_jax.llm.assistant import is_language_run
from pathflip_jax.llm.generate import Sampling
from pathflip_jax.metrics import METRICS, read_metrics

log = logging.getLogger(__name__)
MAX_TOKENS = 384  # of a caption or an answer, unless the caller says otherwise

EXAMPLES = {"good": 0.9, "typical": 0.5, "poor": 0.1}  # quantiles of the slides' AUC that the report shows


def evaluate(
    run_folder,
    *,
    records,
    slides,
    out,
    split: str = "test",
    texts=None,
    region_texts=None,
    prompts=None,
    shots: Sequence[str | int] | None = None,
    labels: Sequence[str] = ("label",),
    label_table=None,
    draws: int = few_shot.SEEDS,
    grounding=None,
    outlines=None,
    images=None,
    compare_to=None,
    language=None,
    questions=None,
    phrasings=None,
    sampling=None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    method: str | None = None,
    window: int = maps.WINDOW,
    context: int = maps.CONTEXT,
    clear: float | None = None,
    smooth: float = SMOOTH,
    lesions: str | None = None,
    protocol: str = protocols.STRICT,
    strict: bool = False,
    name: str = "",
) -> dict:
    """Score a run on a split and write scores.json, CSVs, figures and report.html into `out`.

    `texts` scores retrieval, `region_texts` that of regions, `prompts` (a file, or the name of a shipped one) zero-shot
    classification, `grounding` with `outlines` grounding; `shots` (numbers of slides per class, "all") few-shot probes
    of each column of `labels`, in the slide table or in `label_table`, with `draws` draws of each number of shots.
    `images` (slide files) adds thumbnails and the mean-colour baselines; `compare_to` is a second run, compared slide
    by slide. `protocol` is "strict" or "paper" (protocols.py); `strict` makes a faulty split an error. `name` is what
    the benchmark is called, for published rows beside it.
    `method`, `window` and `context` say how to ground (`Predictor.ground`); with `clear` (0 to 0.5) patches that an
    outline cuts by more than this share of their area do not count; maps are smoothed by `smooth` patch edges;
    `lesions` names the concept whose outlines are lesions to detect (`evaluate/froc.py`). A list of run folders
    (seeds of one experiment) is scored as their mean, and `compare_to` is then a list too. `language` is a run of the
    language stage, whose captions are scored against `texts` (with the phrasings of concepts, a JSON, also by what
    they assert) and whose answers to `questions`; `sampling` says how it writes. `run_folder` may be such a run
    itself, to be scored alone.
    Returns what scores.json holds.
    """
    if (grounding is None) != (outlines is None):
        raise ValueError("grounding needs both the texts of the concepts and the folder of their true outlines")
    if lesions is not None and grounding is None:
        raise ValueError(f"lesions of {lesions!r} are detected by grounding: give the texts of concepts and outlines")
    if clear is not None and not 0 <= clear < 0.5:
        raise ValueError(f"clear {clear}: expected a share of a patch's area, at least 0 and below 0.5")
    if all(given is None for given in (texts, region_texts, prompts, shots, grounding, questions)):
        raise ValueError(
            "nothing to score: give texts (retrieval, captions), region texts, prompts (zero-shot), shots (few-shot), "
            "questions, or grounding with outlines"
        )
    rules = protocols.read_protocol(protocol)
    folders, others = _as_list(run_folder), _as_list(compare_to)
    if is_language_run(folders[0]):
        aligned = (language, prompts, grounding, region_texts, shots)
        if len(folders) > 1 or others or any(given is not None for given in aligned):
            raise ValueError(
                f"{folders[0]}: a run of the language stage is scored by itself, with texts and questions; put it "
                "beside an alignment run by language (--language)"
            )
        language, folders = folders[0], []
    if language is None and (questions is not None or phrasings is not None):
        raise ValueError("questions and concepts of captions are for a language stage: name its run (--language)")
    if others and len(others) != len(folders):
        raise ValueError(f"{len(folders)} runs cannot be paired with {len(others)} runs to compare to")
    cohort = read_cohort(records, slides, split, strict)
    tasks = _read_tasks(cohort, texts if folders else None, prompts, grounding, outlines, clear, lesions, seed)
    if region_texts is not None:
        tasks = tasks._replace(regions=read_region_texts(region_texts, cohort))
    if shots is not None:
        probed = [few_shot.read_task(cohort, column, label_table, shots, draws) for column in labels]
        tasks = tasks._replace(probed=probed)
    truth = None
    if tasks.prompts is not None:
        if not rules.ensemble:
            tasks = tasks._replace(prompts=tasks.prompts.first_texts())
        cohort = name_labels(cohort, tasks.prompts.class_of)
        truth = label_index(cohort, list(tasks.prompts.classes), prompts)
    how = {"method": method, "window": window, "context": context}
    predictors = [load(folder) for folder in folders]
    outcomes = [_outcome(predictor, cohort, tasks, how, smooth, rules) for predictor in predictors]
    compared = [_outcome(load(folder), cohort, tasks, how, smooth, rules) for folder in others]

    found = {
        "name": name,
        "runs": [str(folder) for folder in folders],
        "compared_to": [str(folder) for folder in others],
        "split": split,
        "slides": len(cohort.slide_ids),
        "patients": len(set(cohort.patients)),
        "interval": f"95%, bootstrap by patient, {scores.DRAWS} draws, seed {seed}",
    }
    pictures, tables = {}, {}
    if tasks.pairs is not None:
        case_of = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
        patients = [case_of[text.slide_ids[0]] for text in tasks.pairs]
        found["retrieval"], pictures["retrieval"], tables["ranks"] = _score_ranks(
            [one.ranks for one in outcomes], [one.ranks for one in compared], DIRECTIONS,
            [" ".join(text.slide_ids) for text in tasks.pairs], patients, folders, seed,
        )  # fmt: skip
    if tasks.regions is not None:
        found["region_retrieval"], pictures["region_retrieval"], tables["region_ranks"] = _score_ranks(
            [one.region_ranks for one in outcomes], [one.region_ranks for one in compared], REGION_DIRECTIONS,
            [text.slide_id for text in tasks.regions], [text.patient for text in tasks.regions], folders, seed,
        )  # fmt: skip
    files = colour.slide_files(images) if images is not None else {}
    if tasks.prompts is not None:
        found["zero_shot"] = summary.score_zero_shot(
            outcomes, compared, cohort, tasks.prompts, truth, files, seed, rules.published_f1
        )
        names = list(tasks.prompts.classes)
        pictures["confusion"] = figures.confusion(truth, outcomes[0].probabilities.argmax(1), names)
        tables["predictions"] = _prediction_rows(folders, outcomes, cohort, names)
    for number, task in enumerate(tasks.probed):
        ours, theirs = ([outcome.beliefs[number] for outcome in side] for side in (outcomes, compared))
        block = few_shot.score_task(task, ours, theirs, rules, seed) | {"figures": f"few_shot_{number + 1}"}
        found.setdefault("few_shot", []).append(block)
        cohort.warnings.extend(few_shot.unbeaten(block))
        pictures |= figures.few_shot(block, task.test.classes, ours[0])
        tables[f"few_shot_{number + 1}"] = few_shot.probe_rows(task, folders, ours)
    if tasks.concepts is not None:
        by_colour = summary.colour_maps(cohort, tasks, files, outlines, smooth, seed)
        scored = summary.score_grounding(outcomes, compared, cohort, tasks, by_colour, seed)
        shown = {"method": method or predictors[0].default_method, "smooth": smooth, "clear": clear}
        found["grounding"] = scored | {"how": how | shown}
        if lesions is not None:
            froc = summary.score_lesions(outcomes, compared, cohort, tasks, by_colour, seed)
            found["grounding"]["froc"] = froc
            pictures["froc"] = figures.froc_curves(
                {"this run": outcomes[0].maps, "attention, no text": outcomes[0].no_text, "mean colour": by_colour}
            )
        second = Path(others[0]).name if others else None
        pictures["concepts"] = figures.concept_dots(found["grounding"]["per_concept"], second)
        tables["grounding"] = _grounding_rows(folders, outcomes, cohort, tasks, by_colour)
        for kind, slide_id in _examples(outcomes[0].maps.auc, list(tasks.truth)).items():
            pictures[f"grounding_{kind}"] = _panels(
                predictors[0], cohort, tasks, slide_id, outlines, files, how, smooth
            )
    if language is not None:
        concepts = zero_shot.read_prompts(phrasings).classes if phrasings is not None else None
        found["language"], more, settings = evaluate_language(
            language, cohort, captions=texts, questions=questions, phrasings=concepts,
            sampling=sampling or Sampling(max_new_tokens=MAX_TOKENS), seed=seed,
        )  # fmt: skip
        tables |= more
        cohort.warnings.extend(found["language"]["warnings"])
    history = read_metrics(Path((folders or [language])[0]) / METRICS)  # empty for a converted checkpoint
    if (curves := figures.training_curves(history)) is not None:
        pictures["training"] = curves
    for warning in cohort.warnings:
        log.warning("%s", warning)
    found["warnings"] = cohort.warnings
    found["protocol"] = {"name": rules.name, "notes": rules.words(found)}
    found["published"] = published.beside(found)
    found["versions"] = report.versions()
    found["command"] = list(command) if command is not None else None
    return report.write(Path(out), found, pictures, tables, predictors[0].config if predictors else settings)


def _as_list(folders) -> list:
    if folders is None:
        return []
    return [folders] if isinstance(folders, str | os.PathLike) else list(folders)


def _read_tasks(cohort: Cohort, texts, prompts, concepts, outlines, clear, lesions, seed) -> Tasks:
    pairs = read_pairs(texts, cohort) if texts is not None else None
    classes = zero_shot.read_prompts(zero_shot.find_prompts(prompts)) if prompts is not None else None
    if concepts is None:
        return Tasks(pairs, classes, None, None)
    found = read_outlined(cohort, concepts, outlines, clear=clear, lesions=lesions, seed=seed)
    return Tasks(pairs, classes, found.concepts, found.truth, training=found.training, lesions=found.lesions)


def _outcome(
    predictor: Predictor, cohort: Cohort, tasks: Tasks, how: dict, smooth: float, rules: protocols.Protocol
) -> Outcome:
    """Let one run answer every question of every task."""
    name = Path(predictor.name).name
    bags = few_shot.embed_bags(predictor, cohort, [*cohort.slide_ids, *few_shot.needed(tasks.probed)], name)
    slides = np.stack([bags[slide].slide for slide in cohort.slide_ids])
    ranks = probabilities = found = no_text = region_ranks = None
    if tasks.pairs is not None:
        row = {slide: i for i, slide in enumerate(cohort.slide_ids)}
        images = [
            slides[row[text.slide_ids[0]]]
            if len(text.slide_ids) == 1
            else predictor.encode_slide([cohort.features(slide) for slide in text.slide_ids]).slide
            for text in tasks.pairs
        ]
        captions = predictor.encode_text([text.caption for text in tasks.pairs])
        cases = [cohort.patients[row[text.slide_ids[0]]] for text in tasks.pairs]
        ranks = _rank_both_ways(DIRECTIONS, np.stack(images), captions, cases if rules.mask_cases else None)
    if tasks.regions is not None:
        images = embed_regions(predictor, cohort, tasks.regions, name)
        captions = predictor.encode_texts([text.caption for text in tasks.regions]).region
        cases = [text.patient for text in tasks.regions]
        region_ranks = _rank_both_ways(REGION_DIRECTIONS, images, captions, cases if rules.mask_cases else None)
    if tasks.prompts is not None:
        classes = zero_shot.class_embeddings(predictor.encode_text, tasks.prompts.classes)
        probabilities = zero_shot.class_probabilities(slides, classes)
    if tasks.concepts is not None:
        known, concepts = (cohort.features, tasks.truth, tasks.training, tasks.lesions, smooth), tasks.concepts
        found = grounding.score_maps(
            lambda slide: grounding.concept_scores(predictor, slide, concepts, **how), *known, name=name
        )
        no_text = grounding.score_maps(
            lambda slide: np.tile(predictor.attend(slide), (len(concepts), 1)), *known, name=f"{name}, no text"
        )
    beliefs = [few_shot.run_probes(task, bags, rules, name) for task in tasks.probed]
    return Outcome(ranks, probabilities, found, no_text, region_ranks, beliefs)


def _rank_both_ways(directions, images: np.ndarray, texts: np.ndarray, cases) -> dict[str, retrieval.Ranks]:
    """The ranks of both directions; without cases every row is a case by itself, and nothing is masked."""
    cases = [str(i) for i in range(len(images))] if cases is None else cases
    there, back = directions
    return {there: retrieval.rank(images, texts, cases), back: retrieval.rank(texts, images, cases)}


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


def _panels(predictor: Predictor, cohort: Cohort, tasks: Tasks, slide_id: str, outlines, files, how, smooth):
    """The maps of the concepts present in a slide, the true outline on each."""
    slide = cohort.features(slide_id)
    inside, counts = tasks.truth[slide_id]
    raw = grounding.concept_scores(predictor, slide, tasks.concepts, **how)
    found = smooth_patches(raw, slide.coords, slide.patch_size, smooth)
    aucs = grounding.concept_aucs(inside, found, counts)
    present = [c for c in np.argsort(-inside.sum(1), kind="stable") if np.isfinite(aucs[c])][:3]
    names = list(tasks.concepts)
    true = read_outlines(Path(outlines) / f"{slide_id}.geojson")
    if slide_id in files:
        canvas = heatmap.read_thumbnail(files[slide_id])
    else:
        canvas = heatmap.blank_canvas(slide.coords, slide.patch_size, slide.width, slide.height)
    return heatmap.draw_panels(
        canvas,
        [f"“{tasks.concepts[names[c]][0]}”" for c in present],
        raw[present],
        slide.coords,
        slide.patch_size,
        mpp=slide.mpp,
        outlines=[true.get(names[c], []) for c in present],
        notes=[f"{names[c]}: ROC AUC {aucs[c]:.2f}" for c in present],
        heading=slide_id,
        smooth=smooth,
    )


def _score_ranks(ours: list, theirs: list, directions: dict[str, str], slide_ids: list[str], patients, names, seed):
    """The scores of a retrieval task, its figure and its table."""
    curves = figures.recall_curves({name: ours[0][key] for key, name in directions.items()})
    return (
        summary.score_retrieval(ours, theirs, patients, seed), curves, _rank_rows(names, ours, slide_ids, patients)
    )  # fmt: skip


def _rank_rows(names, found: list[dict[str, retrieval.Ranks]], slide_ids: list[str], patients) -> list[dict]:
    rows = []
    for name, ranks in zip(names, found, strict=True):
        places = {key: retrieval.expected_rank(one) for key, one in ranks.items()}
        sizes = retrieval.gallery_sizes(next(iter(ranks.values())))
        for i, (slide_id, patient) in enumerate(zip(slide_ids, patients, strict=True)):
            row = {"run": name, "slide_ids": slide_id, "patient_id": patient}
            row |= {f"{key}_rank": float(place[i]) for key, place in places.items()}
            row |= {f"{key}_above": int(one.above[i]) for key, one in ranks.items()}
            row |= {f"{key}_tied": int(one.tied[i]) for key, one in ranks.items()}
            rows.append(row | {"gallery": int(sizes[i])})
    return rows


def _prediction_rows(names, outcomes: list[Outcome], cohort: Cohort, classes: list[str]) -> list[dict]:
    rows = []
    for name, outcome in zip(names, outcomes, strict=True):
        for i, slide_id in enumerate(cohort.slide_ids):
            believed = outcome.probabilities[i]
            row = {"run": name, "slide_id": slide_id, "patient_id": cohort.patients[i], "label": cohort.labels[i]}
            row["predicted"] = classes[int(believed.argmax())]
            rows.append(row | {f"p_{label}": round(float(p), 6) for label, p in zip(classes, believed, strict=True)})
    return rows


def _grounding_rows(names, outcomes: list[Outcome], cohort: Cohort, tasks: Tasks, by_colour) -> list[dict]:
    patient = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    rows = []
    for name, outcome in zip(names, outcomes, strict=True):
        sources = {"": outcome.maps, "no_text_": outcome.no_text}
        if by_colour is not None:
            sources["mean_colour_"] = by_colour
        for i, (slide_id, (inside, counts)) in enumerate(tasks.truth.items()):
            for c, concept in enumerate(tasks.concepts):
                if np.isfinite(outcome.maps.auc[i, c]):
                    row = {"run": name, "slide_id": slide_id, "patient_id": patient[slide_id], "concept": concept}
                    row |= {"patches": int(counts.sum()), "inside": int((inside[c] & counts).sum())}
                    for source, maps in sources.items():
                        values = {source + metric: getattr(maps, metric)[i, c] for metric in grounding.METRICS}
                        row |= {key: round(float(v), 6) if np.isfinite(v) else "" for key, v in values.items()}
                    rows.append(row)
    return rows
