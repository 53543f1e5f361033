"""Evaluation of runs on a split, from records to the report.

Every metric is reported with patient-level bootstrap intervals and chance and majority baselines. The split comes from
the slide table, and its labels and outlines are never used for selection (DESIGN section 8).
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pathflip_jax.data.texts.split_files import one_fold
from pathflip_jax.evaluate import figures, published, report
from pathflip_jax.evaluate.cohort import read_cohort
from pathflip_jax.evaluate.embeddings import embed_bags
from pathflip_jax.evaluate.protocols import read_protocol
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.task import LoadedRun, Part, Predictions, Setting, Task
from pathflip_jax.evaluate.tasks import TASKS
from pathflip_jax.inference.assistant import is_language_run
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.monitoring.metrics import METRICS, read_metrics
from pathflip_jax.scores import statistics

log = logging.getLogger(__name__)


def evaluate(spec: EvaluationSpec) -> dict:
    """Evaluate runs on a split and write scores.json, CSVs, figures and report.html into `spec.out`.

    Returns the content of scores.json. Raises ValueError or OSError for faulty input before any model is loaded.
    """
    spec = _place_language_run(spec)
    tasks = _wanted_tasks(spec)
    cohort = read_cohort(spec.records, one_fold(spec.slides, spec.fold), spec.split, spec.strict, spec.images)
    setting = Setting(spec, cohort, read_protocol(spec.protocol))
    data = {task.key: task.read(setting) for task in tasks}

    predictors, compared = ([load(run) for run in runs] for runs in (spec.runs, spec.compare_to or ()))
    for task, predictor in itertools.product(tasks, (*predictors, *compared)):
        task.suits(spec, predictor)
    ours, theirs = ([_predict(one, setting, tasks, data) for one in side] for side in (predictors, compared))
    parts = {}
    for task in tasks:
        mine, others = ([one.get(task.key) for one in side] for side in (ours, theirs))
        first = predictors[0] if predictors else None
        predictions = Predictions(spec.runs, mine, list(spec.compare_to or ()), others, first)
        parts[task.key] = task.score(setting, data[task.key], predictions)
    config = predictors[0].config if predictors else next(part.config for part in parts.values() if part.config)
    return _write(setting, parts, config)


def _place_language_run(spec: EvaluationSpec) -> EvaluationSpec:
    """The specification with a language-stage run moved to `language` if it was given as the run to score."""
    runs, others = spec.runs, spec.compare_to or ()
    if not runs:
        raise ValueError("no run to score: pass one or more run folders")
    if is_language_run(runs[0]):
        aligned = (spec.language, spec.prompts, spec.grounding, spec.region_texts, spec.few_shot)
        aligned += (spec.survival_time, spec.regression or None)
        if len(runs) > 1 or others or any(given is not None for given in aligned):
            raise ValueError(
                f"{runs[0]}: a run of the language stage, which can be scored only on texts and questions; to score it "
                "together with an alignment run, pass the alignment run as the run and this one as --language"
            )
        return replace(spec, run=(), language=runs[0])
    if others and len(others) != len(runs):
        raise ValueError(
            f"{len(runs)} runs cannot be paired with {len(others)} runs to compare to; pass the same number of both"
        )
    return spec


def _wanted_tasks(spec: EvaluationSpec) -> list[Task]:
    """Tasks that a specification requests. Raises ValueError for none and for contradictory options."""
    for task in TASKS:
        task.check(spec)
    wanted = [task for task in TASKS if task.wanted(spec)]
    if not wanted:
        raise ValueError(f"nothing to score: pass {', '.join(task.needs for task in TASKS[:-1])}, or {TASKS[-1].needs}")
    return wanted


def _predict(predictor: Predictor, setting: Setting, tasks: Sequence[Task], data: dict[str, Any]) -> dict[str, Any]:
    """The predictions of one run for every task that has `predict`, by key."""
    name = Path(predictor.name).name
    asked = [task for task in tasks if task.predict is not None]
    slides = [slide for task in asked for slide in task.embed(setting, data[task.key])]
    bags = embed_bags(predictor, setting.cohort, slides, name) if slides else {}
    run = LoadedRun(predictor, name, bags)
    return {task.key: task.predict(setting, data[task.key], run) for task in asked}


def _write(setting: Setting, parts: dict[str, Part], config) -> dict:
    """Write the files of an evaluation; returns the content of scores.json."""
    spec, cohort = setting.spec, setting.cohort
    warnings = [*cohort.warnings, *(warning for part in parts.values() for warning in part.warnings)]
    for warning in warnings:
        log.warning("%s", warning)
    found = {
        "name": spec.name,
        "runs": [str(run) for run in spec.runs],
        "compared_to": [str(run) for run in spec.compare_to or ()],
        "split": spec.split,
        "slides": len(cohort.slide_ids),
        "patients": len(set(cohort.patients)),
        "interval": f"95%, bootstrap by patient, {statistics.DRAWS} draws, seed {spec.seed}",
    }
    found |= {"fold": spec.fold} if spec.fold else {}
    found |= {key: part.scores for key, part in parts.items()}
    found["warnings"] = warnings
    found["protocol"] = {"name": setting.protocol.name, "notes": setting.protocol.words(found)}
    found["published"] = published.match_published(found)
    found["versions"] = report.versions()
    found["command"] = list(spec.command) if spec.command is not None else None
    pictures = {name: picture for part in parts.values() for name, picture in part.pictures.items()}
    tables = {name: table for part in parts.values() for name, table in part.tables.items()}
    history = read_metrics(Path([*spec.runs, spec.language][0]) / METRICS)  # empty for a converted checkpoint
    if (curves := figures.training_curves(history)) is not None:
        pictures["training"] = curves
    return report.write(Path(spec.out), found, pictures, tables, config)
