"""Texts of single regions: an image with a caption is a slide of one region (the paper's Quilt task).

The text table names the slide; where that has several regions, a point in level-0 pixels says which: columns `x`, `y`.
A region is compared with texts as the region loss does: by its text-conditioned embedding, which for a region by itself
is the same whatever the text.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.failures import some
from pathflip_jax.data.texts.tables import Row, read_rows
from pathflip_jax.data.texts.text import has_caption, match_slides, row_caption, row_columns, row_slides
from pathflip_jax.evaluate.cohort import Cohort


class RegionText(NamedTuple):
    """A caption and the region that it is of, which holds this patch of the slide's record."""

    slide_id: str
    patient: str
    patch: int
    caption: str


def read_region_texts(path, cohort: Cohort) -> list[RegionText]:
    """The captions of regions of the cohort's slides.

    Raises ValueError with file and line for a row without caption or with half a point, for a point where the slide
    has no patch, and for a slide of several regions without a point; and for a table of other slides.
    """
    rows = read_rows(path)
    for row in rows:
        if not has_caption(row):
            raise ValueError(f"{row.place}: no column caption, {row_columns(row)}")
    slide_ids = cohort.records.slides.column("slide_id")
    matched = match_slides([row_slides(row) for row in rows], slide_ids, cohort.cases)
    patient_of = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    found = []
    for row, slides in zip(rows, matched, strict=True):
        if len(slides) > 1:
            raise ValueError(f"{row.place}: a region is of one slide, this text names {len(slides)} ({some(slides)})")
        if slides and slides[0] in patient_of:
            patch = _patch(row, cohort, slides[0])
            found.append(RegionText(slides[0], patient_of[slides[0]], patch, row_caption(row)))
    if not found:
        raise ValueError(f"{path}: none of its texts is of a slide of the split ({some(cohort.slide_ids)})")
    return found


def _patch(row: Row, cohort: Cohort, slide_id: str) -> int:
    """The number of a patch in the region that a row means."""
    position = cohort.records.position(slide_id)
    info = cohort.records.slides[position]
    point = [row.first(name) for name in ("x", "y")]
    if point == ["", ""]:
        regions = len(info.region_rows) - 1
        if regions > 1:
            raise ValueError(
                f"{row.place}: slide {slide_id} has {regions} regions; name a point in the one that is meant (columns "
                "x and y, pixels at level 0), or cut the image larger (--edge-um) so that it is one region"
            )
        return 0
    try:
        x, y = (float(value) for value in point)
    except ValueError:
        raise ValueError(f"{row.place}: x {point[0]!r}, y {point[1]!r}: expected two numbers, or neither") from None
    coords = cohort.records.coords(position)
    if coords is None:
        raise ValueError(f"{row.place}: slide {slide_id} has no coordinates, so x and y name no region")
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
