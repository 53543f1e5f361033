"""One evaluation of one or several runs: what `pathflip evaluate` does, from records to report.

The figures are worth what their protocol is worth: the split is the table's, no label or outline of it chooses
anything, intervals draw patients, and every figure stands beside what knows nothing (DESIGN section 8).
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pathflip_jax.evaluate import colour, figures, protocols, published, report
from pathflip_jax.evaluate import prompt_files as zero_shot
from pathflip_jax.evaluate.cohort import Cohort, label_index, name_labels, read_cohort, read_pairs
from pathflip_jax.evaluate.parts import Answers, Mapping, Part, score_tasks
from pathflip_jax.evaluate.summary import DIRECTIONS, REGION_DIRECTIONS, Outcome, Tasks
from pathflip_jax.evaluate.tasks import few_shot
from pathflip_jax.evaluate.tasks import map_scores as grounding
from pathflip_jax.evaluate.tasks.language import evaluate_language
from pathflip_jax.evaluate.tasks.region_texts import embed_regions, read_region_texts
from pathflip_jax.evaluate.tasks.truth import read_outlined
from pathflip_jax.grounding import maps
from pathflip_jax.grounding.surface import SMOOTH
from pathflip_jax.inference.assistant import is_language_run
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.monitoring.metrics import METRICS, read_metrics
from pathflip_jax.scores import retrieval, statistics

log = logging.getLogger(__name__)
MAX_TOKENS = 384  # of a caption or an answer, unless the caller says otherwise


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
        raise ValueError(f"lesions of {lesions!r} are scored by grounding: give texts of concepts and outlines too")
    if clear is not None and not 0 <= clear < 0.5:
        raise ValueError(f"clear {clear}: expected a share of a patch's area, at least 0 and below 0.5")
    if all(given is None for given in (texts, region_texts, prompts, shots, grounding, questions)):
        raise ValueError(
            "nothing to score: give texts (retrieval, captions), region texts, prompts (zero-shot), shots (few-shot), "
            "questions, or grounding with outlines"
        )
    rules = protocols.read_protocol(protocol)
    runs, others = _as_list(run_folder), _as_list(compare_to)
    if is_language_run(runs[0]):
        aligned = (language, prompts, grounding, region_texts, shots)
        if len(runs) > 1 or others or any(given is not None for given in aligned):
            raise ValueError(
                f"{runs[0]}: a run of the language stage, which texts and questions alone can score; beside "
                "an alignment run, name that one first and this one as --language"
            )
        language, runs = runs[0], []
    if language is None and (questions is not None or phrasings is not None):
        raise ValueError("questions and concepts of captions are for a language stage: name its run (--language)")
    if others and len(others) != len(runs):
        raise ValueError(f"{len(runs)} runs cannot be paired with {len(others)} to compare to: give as many of both")
    cohort = read_cohort(records, slides, split, strict)
    tasks = Tasks(
        pairs=read_pairs(texts, cohort) if texts is not None and runs else None,
        regions=read_region_texts(region_texts, cohort) if region_texts is not None else None,
    )
    if grounding is not None:
        outlined = read_outlined(cohort, grounding, outlines, clear=clear, lesions=lesions, seed=seed)
        tasks = tasks._replace(outlined=outlined)
    if shots is not None:
        probed = [few_shot.read_task(cohort, column, label_table, shots, draws) for column in labels]
        tasks = tasks._replace(probed=probed)
    if prompts is not None:
        cohort, tasks = _read_classes(cohort, tasks, prompts, rules)

    how = {"method": method, "window": window, "context": context}
    mapping = Mapping(how, smooth, clear, outlines, lesions)
    predictors = [load(run) for run in runs]
    ours = [_outcome(predictor, cohort, tasks, mapping, rules) for predictor in predictors]
    theirs = [_outcome(load(run), cohort, tasks, mapping, rules) for run in others]
    files = colour.slide_files(images) if images is not None else {}
    answers = Answers(cohort, tasks, runs, ours, others, theirs, files, seed)

    parts = score_tasks(answers, predictors[0], mapping, rules) if predictors else []
    if language is not None:
        concepts = zero_shot.read_prompts(phrasings).classes if phrasings is not None else None
        spoken, rows, settings = evaluate_language(
            language, cohort, captions=texts, questions=questions, phrasings=concepts,
            sampling=sampling or Sampling(max_new_tokens=MAX_TOKENS), seed=seed,
        )  # fmt: skip
        cohort.warnings.extend(spoken["warnings"])
        parts.append(Part({"language": spoken}, {}, rows))
    history = read_metrics(Path((runs or [language])[0]) / METRICS)  # empty for a converted checkpoint
    if (curves := figures.training_curves(history)) is not None:
        parts.append(Part({}, {"training": curves}, {}))

    for warning in cohort.warnings:
        log.warning("%s", warning)
    found = {
        "name": name,
        "runs": [str(run) for run in runs],
        "compared_to": [str(run) for run in others],
        "split": split,
        "slides": len(cohort.slide_ids),
        "patients": len(set(cohort.patients)),
        "interval": f"95%, bootstrap by patient, {statistics.DRAWS} draws, seed {seed}",
    }
    for part in parts:
        found |= part.scores
    found["warnings"] = cohort.warnings
    found["protocol"] = {"name": rules.name, "notes": rules.words(found)}
    found["published"] = published.beside(found)
    found["versions"] = report.versions()
    found["command"] = list(command) if command is not None else None
    pictures = {key: picture for part in parts for key, picture in part.pictures.items()}
    rows = {key: table for part in parts for key, table in part.tables.items()}
    return report.write(Path(out), found, pictures, rows, predictors[0].config if predictors else settings)


def _as_list(folders) -> list:
    if folders is None:
        return []
    return [folders] if isinstance(folders, str | os.PathLike) else list(folders)


def _read_classes(cohort: Cohort, tasks: Tasks, given, rules: protocols.Protocol) -> tuple[Cohort, Tasks]:
    """The prompts of classes, and the cohort with its labels spelt as they are."""
    prompts = zero_shot.read_prompts(zero_shot.find_prompts(given))
    if not rules.ensemble:
        prompts = prompts.first_texts()
    cohort = name_labels(cohort, prompts.class_of)
    return cohort, tasks._replace(prompts=prompts, labels=label_index(cohort, list(prompts.classes), given))


def _outcome(
    predictor: Predictor, cohort: Cohort, tasks: Tasks, mapping: Mapping, rules: protocols.Protocol
) -> Outcome:
    """Let one run answer every question of every task."""
    name = Path(predictor.name).name
    bags = few_shot.embed_bags(predictor, cohort, [*cohort.slide_ids, *few_shot.needed(tasks.probed)], name)
    slides = np.stack([bags[slide].slide for slide in cohort.slide_ids])
    ranks = probabilities = found = no_text = region_ranks = twins = region_twins = None
    if tasks.pairs is not None:
        row = {slide: i for i, slide in enumerate(cohort.slide_ids)}
        images = [
            slides[row[text.slide_ids[0]]]
            if len(text.slide_ids) == 1
            else predictor.encode_slide([cohort.features(slide) for slide in text.slide_ids]).slide
            for text in tasks.pairs
        ]
        texts = [text.caption for text in tasks.pairs]
        cases = [cohort.patients[row[text.slide_ids[0]]] for text in tasks.pairs]
        related = retrieval.relate(cases, texts) if rules.mask_cases else None
        ranks, twins = _rank_both_ways(DIRECTIONS, np.stack(images), predictor.encode_text(texts), related)
    if tasks.regions is not None:
        images = embed_regions(predictor, cohort, tasks.regions, name)
        texts = [text.caption for text in tasks.regions]
        captions = predictor.encode_texts(texts).region
        related = retrieval.relate([text.patient for text in tasks.regions], texts) if rules.mask_cases else None
        region_ranks, region_twins = _rank_both_ways(REGION_DIRECTIONS, images, captions, related)
    if tasks.prompts is not None:
        classes = zero_shot.class_embeddings(predictor.encode_text, tasks.prompts.classes)
        probabilities = zero_shot.class_probabilities(slides, classes)
    if tasks.outlined is not None:
        concepts, truth, training, lesions = tasks.outlined
        known = (cohort.features, truth, training, lesions, mapping.smooth)
        found = grounding.score_maps(
            lambda slide: grounding.concept_scores(predictor, slide, concepts, **mapping.how), *known, name=name
        )
        no_text = grounding.score_maps(
            lambda slide: np.tile(predictor.attend(slide), (len(concepts), 1)), *known, name=f"{name}, no text"
        )
    beliefs = [few_shot.run_probes(task, bags, rules, name) for task in tasks.probed]
    return Outcome(ranks, probabilities, found, no_text, region_ranks, beliefs, twins, region_twins)


def _rank_both_ways(directions, images: np.ndarray, texts: np.ndarray, related) -> tuple[dict, dict | None]:
    """The ranks of both directions, and those that the captions of several patients have no part in, if there are any.

    Without `related` every row stands by itself, and nothing is masked.
    """
    there, back = directions

    def ranks(related) -> dict[str, retrieval.Ranks]:
        return {there: retrieval.rank(images, texts, related), back: retrieval.rank(texts, images, related)}

    if related is None:
        return ranks(np.arange(len(images))), None
    return ranks(related), ranks(related[:, 0]) if retrieval.twins(related).any() else None
