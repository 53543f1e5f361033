"""Retrieval of slides by their reports and of reports by their slides."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.text import SlideText, match_texts, read_texts
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.task import LoadedRun, Part, Predictions, Setting, Task
from pathflip_jax.evaluate.tasks import ranking
from pathflip_jax.scores import retrieval

KEY = "retrieval"
DIRECTIONS = {"slide_to_text": "slide to text", "text_to_slide": "text to slide"}


def read_pairs(path, cohort: Cohort) -> list[SlideText]:
    """Read the texts of the cohort's slides; a case's text belongs to those of its slides that are in the split.

    Raises ValueError when the table has no text for any slide of the split.
    """
    chosen = set(cohort.slide_ids)
    texts = match_texts(read_texts(path), cohort.records.slides.column("slide_id"), cohort.cases)
    kept = [(text, tuple(slide for slide in text.slide_ids if slide in chosen)) for text in texts]
    pairs = [replace(text, slide_ids=slides) for text, slides in kept if slides]
    if not pairs:
        raise ValueError(
            f"{path}: none of its texts belongs to a slide of the split; its ids are "
            f"{preview(slide for text in texts for slide in text.slide_ids)}, those of the split "
            f"{preview(cohort.slide_ids)}"
        )
    without_text = sorted(chosen - {slide for text in pairs for slide in text.slide_ids})
    if without_text:
        cohort.warnings.append(
            f"{len(without_text)} slides have no text and are left out of retrieval ({preview(without_text)})"
        )
    return pairs


def _read(setting: Setting) -> list[SlideText]:
    return read_pairs(setting.spec.texts, setting.cohort)


def _predict(setting: Setting, pairs: list[SlideText], run: LoadedRun) -> ranking.Ranked:
    cohort = setting.cohort
    images = [
        run.bags[text.slide_ids[0]].slide
        if len(text.slide_ids) == 1
        else run.predictor.encode_slide([cohort.features(slide) for slide in text.slide_ids]).slide
        for text in pairs
    ]
    texts = [text.caption for text in pairs]
    related = retrieval.relate(_patients(setting, pairs), texts) if setting.protocol.mask_cases else None
    return ranking.rank_both_ways(DIRECTIONS, np.stack(images), run.predictor.encode_text(texts), related)


def _patients(setting: Setting, pairs: list[SlideText]) -> list[str]:
    patient_of = setting.cohort.patient_of
    return [patient_of[text.slide_ids[0]] for text in pairs]


def _score(setting: Setting, pairs: list[SlideText], predictions: Predictions) -> Part:
    slides = [" ".join(text.slide_ids) for text in pairs]
    queries = ranking.Queries("slides", DIRECTIONS, slides, _patients(setting, pairs))
    return ranking.score_ranking(KEY, queries, predictions, setting.spec.seed)


TASK = Task(
    KEY,
    title="retrieval",
    needs="texts (retrieval, captions)",
    wanted=lambda spec: spec.texts is not None and bool(spec.runs),
    read=_read,
    embed=lambda setting, pairs: setting.cohort.slide_ids,
    predict=_predict,
    score=_score,
    headlines=lambda found: ranking.recall_headlines("Retrieval", found[KEY]),
    section=Path(__file__).with_name("retrieval.html"),
    published=lambda found: ranking.published_recalls(KEY, found[KEY]),
    paired=partial(ranking.paired_rankings, KEY, DIRECTIONS),
)
