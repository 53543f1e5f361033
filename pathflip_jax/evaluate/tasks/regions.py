"""Retrieval of regions by their captions and of captions by their regions (the paper's Quilt task).

An image with a caption is a slide of one region. In a slide of several regions, a point in level-0 pixels (columns `x`
and `y` of the text table) picks one. Regions are compared with texts as in the region loss, by the text-conditioned
embedding, which for a single region is the same whatever the text.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.tables import Row, read_rows
from pathflip_jax.data.texts.text import has_caption, match_slides, row_caption, row_columns, row_slides
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.task import LoadedRun, Part, Predictions, Setting, Task
from pathflip_jax.evaluate.tasks import ranking
from pathflip_jax.scores import retrieval

KEY = "region_retrieval"
DIRECTIONS = {"region_to_text": "region to text", "text_to_region": "text to region"}


class RegionText(NamedTuple):
    """The caption of a region, which is given by the number of one of its patches in the slide's record."""

    slide_id: str
    patient: str
    patch: int
    caption: str


def read_region_texts(path, cohort: Cohort) -> list[RegionText]:
    """The captions of regions of the cohort's slides.

    Raises ValueError with file and line for a row without caption or with an incomplete point, for a point where the
    slide has no patch, for a slide of several regions without a point, and for a table of other slides.
    """
    rows = read_rows(path)
    for row in rows:
        if not has_caption(row):
            raise ValueError(f"{row.place}: no column caption, {row_columns(row)}")
    slide_ids = cohort.records.slides.column("slide_id")
    matched = match_slides([row_slides(row) for row in rows], slide_ids, cohort.cases)
    patient_of = cohort.patient_of
    found = []
    for row, slides in zip(rows, matched, strict=True):
        if len(slides) > 1:
            raise ValueError(
                f"{row.place}: a region belongs to one slide, but this text names {len(slides)} ({preview(slides)})"
            )
        if slides and slides[0] in patient_of:
            patch = _patch(row, cohort, slides[0])
            found.append(RegionText(slides[0], patient_of[slides[0]], patch, row_caption(row)))
    if not found:
        raise ValueError(f"{path}: none of its texts belongs to a slide of the split ({preview(cohort.slide_ids)})")
    return found


def _patch(row: Row, cohort: Cohort, slide_id: str) -> int:
    """The number of a patch in the region that a row is about."""
    position = cohort.records.position(slide_id)
    info = cohort.records.slides[position]
    point = [row.first(name) for name in ("x", "y")]
    if point == ["", ""]:
        regions = len(info.region_rows) - 1
        if regions > 1:
            raise ValueError(
                f"{row.place}: slide {slide_id} has {regions} regions; give a point in one of them (columns x and y, "
                "pixels at level 0), or cut larger regions (--edge-um) so that the image is one region"
            )
        return 0
    try:
        x, y = (float(value) for value in point)
    except ValueError:
        raise ValueError(f"{row.place}: x {point[0]!r}, y {point[1]!r}: expected two numbers, or neither") from None
    coords = cohort.records.coords(position)
    if coords is None:
        raise ValueError(f"{row.place}: slide {slide_id} has no coordinates, so x and y do not identify a region")
    inside = ((coords <= (x, y)) & (coords + info.patch_size > (x, y))).all(1)
    if not inside.any():
        raise ValueError(f"{row.place}: slide {slide_id} has no patch at x {x:g}, y {y:g} (pixels at level 0)")
    return int(np.argmax(inside))


def embed_regions(predictor, cohort: Cohort, texts: Sequence[RegionText], name: str) -> Float[np.ndarray, "n D"]:
    """The embedding of each text's region, in the space of texts."""
    wanted: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        wanted[text.slide_id].append(number)
    slots = {}

    def slides() -> Iterator[SlideFeatures]:
        for slide_id in tqdm(wanted, desc=f"{name}: regions", unit="slide", leave=False):
            slide = cohort.features(slide_id)
            slots[slide_id] = predictor.region_patches(slide)
            yield slide

    found = [np.zeros(0)] * len(texts)
    for slide_id, embedding in zip(wanted, predictor.encode_regions(slides()), strict=True):
        for number in wanted[slide_id]:
            region = int(np.argmax((slots[slide_id] == texts[number].patch).any(1)))
            found[number] = embedding.regions[region]
    return np.stack(found)


def _read(setting: Setting) -> list[RegionText]:
    return read_region_texts(setting.spec.region_texts, setting.cohort)


def _predict(setting: Setting, texts: list[RegionText], run: LoadedRun) -> ranking.Ranked:
    images = embed_regions(run.predictor, setting.cohort, texts, run.name)
    captions = [text.caption for text in texts]
    patients = [text.patient for text in texts]
    related = retrieval.relate(patients, captions) if setting.protocol.mask_cases else None
    return ranking.rank_both_ways(DIRECTIONS, images, run.predictor.encode_texts(captions).region, related)


def _score(setting: Setting, texts: list[RegionText], predictions: Predictions) -> Part:
    slides, patients = [text.slide_id for text in texts], [text.patient for text in texts]
    queries = ranking.Queries("regions", DIRECTIONS, slides, patients)
    return ranking.score_ranking(KEY, queries, predictions, setting.spec.seed)


TASK = Task(
    KEY,
    title="retrieval of regions",
    needs="region texts",
    wanted=lambda spec: spec.region_texts is not None,
    read=_read,
    predict=_predict,
    score=_score,
    headlines=lambda found: ranking.recall_headlines("Retrieval of regions", found[KEY]),
    section=Path(__file__).with_name("regions.html"),
    published=lambda found: ranking.published_recalls(KEY, found[KEY]),
    paired=partial(ranking.paired_rankings, KEY, DIRECTIONS),
)
