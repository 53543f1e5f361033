"""Static page of a run with its slides, the texts and their grounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.files import Place
from pathflip_jax.grounding import maps
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.grounding.methods import check_method
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.inference.sources import SlideSource
from pathflip_jax.viewer.pictures import QUALITY
from pathflip_jax.viewer.session import model_facts
from pathflip_jax.viewer.slides import list_slides
from pathflip_jax.viewer.static import MOST_PIXELS, PageSlide, Report, check_out, write_page


@dataclass(frozen=True)
class PageSpec:
    """Slides and texts of a page, and their presentation.

    The slides are those of `records` (or `features`) over the slide files of `slides_dir`, of which `slide_ids`
    are shown; `most_slides` keeps those that are most similar to any text. `most_pixels` and `quality` are as
    `write_page` takes them, `negative`, `method` and `window` as `Predictor.ground`.
    """

    run: Place | str
    texts: Sequence[str]
    out: Path
    records: Place | None = None
    features: Path | None = None
    slides_dir: Path | None = None
    slide_ids: Sequence[str] | None = None
    most_slides: int | None = None
    most_pixels: int = MOST_PIXELS
    quality: int = QUALITY
    negative: Sequence[str] = ()
    method: str | None = None
    window: int = maps.WINDOW


def report(spec: PageSpec) -> Report:
    """Write the page of a run's slides.

    The page includes the similarity of each slide to each text, for sorting. Slides without features are left out.
    Raises as `write_page` and `list_slides`, and ValueError for records that the run cannot use.
    """
    check_out(spec.out)
    texts = list(spec.texts)
    if len(set(texts)) < len(texts):
        raise ValueError("--texts: the same text is given twice; pass each text once")
    records = None if spec.records is None else Records(spec.records)
    slides = list_slides(spec.slides_dir, records=records, features=spec.features, only=spec.slide_ids)
    slides = [slide for slide in slides if slide.features is not None]
    predictor = load(spec.run)
    method = check_method(predictor, spec.method)
    if records is not None:
        predictor.check_records(records)
    similarities = _similarities(predictor, slides, predictor.encode_text(texts))
    order = range(len(slides))
    if spec.most_slides is not None:
        order = sorted(order, key=lambda i: -max(similarities[i] or [-np.inf]))[: spec.most_slides]

    def ground(slide: SlideSource) -> Grounding:
        how = {"negative": spec.negative, "method": method, "window": spec.window}
        return predictor.ground(slide.features(), texts, **how)

    pages = [PageSlide(slides[i].slide_id, slides[i].image, partial(ground, slides[i]), similarities[i]) for i in order]
    facts = model_facts(predictor, method)
    return write_page(spec.out, pages, facts, most_pixels=spec.most_pixels, quality=spec.quality)


def _similarities(
    predictor: Predictor, slides: Sequence[SlideSource], texts: np.ndarray
) -> list[Sequence[float] | None]:
    """Cosine of each slide with each text; None for a slide that cannot be encoded, which the page will report."""
    found = []
    for slide in tqdm(slides, unit="slide", desc="embedding slides"):
        try:
            embedding = predictor.encode_slide(slide.features()).slide
        except (ValueError, OSError, MemoryError):
            found.append(None)
            continue
        norms = np.linalg.norm(texts, axis=1) * np.linalg.norm(embedding)
        found.append((texts @ embedding / np.maximum(norms, 1e-12)).tolist())
    return found
