"""The static page of a run: its slides, the texts, and where they are seen."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pathflip_jax.data.storage.files import Place
from pathflip_jax.grounding import maps
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.viewer.pictures import QUALITY
from pathflip_jax.viewer.session import model_facts
from pathflip_jax.viewer.slides import ShownSlide, list_slides
from pathflip_jax.viewer.static import MOST_PIXELS, PageSlide, Report, check_out, write_page


def report(
    run: Place | str,
    texts: Sequence[str],
    out: Path,
    *,
    records: Place | None = None,
    features: Path | None = None,
    slides_dir: Path | None = None,
    negative: Sequence[str] = (),
    slide_ids: Sequence[str] | None = None,
    most_slides: int | None = None,
    most_pixels: int = MOST_PIXELS,
    quality: int = QUALITY,
    method: str | None = None,
    window: int = maps.WINDOW,
) -> Report:
    """Write the page of the slides of `records` (or `features`) with the files of `slides_dir` under them.

    The page is told how similar each slide is to each text, so that it can order them; `most_slides` keeps those that
    are most similar to any. Slides without features are left out. Raises as `write_page` and `list_slides`.
    """
    check_out(out)
    if len(set(texts)) < len(texts):
        raise ValueError("--texts: the same text is given twice; give each once")
    slides = list_slides(slides_dir, records=records, features=features, only=slide_ids)
    slides = [slide for slide in slides if slide.features is not None]
    predictor = load(run)
    similarities = _similarities(predictor, slides, predictor.encode_text(list(texts)))
    order = range(len(slides))
    if most_slides is not None:
        order = sorted(order, key=lambda i: -max(similarities[i] or [-np.inf]))[:most_slides]

    def ground(slide: ShownSlide) -> Grounding:
        return predictor.ground(slide.features(), texts, negative=negative, method=method, window=window)

    pages = [
        PageSlide(slide.slide_id, slide.image, partial(ground, slide), similarities[i])
        for i, slide in ((i, slides[i]) for i in order)
    ]
    return write_page(
        out, pages, model_facts(predictor, method or predictor.default_method), most_pixels=most_pixels, quality=quality
    )


def _similarities(
    predictor: Predictor, slides: Sequence[ShownSlide], texts: np.ndarray
) -> list[Sequence[float] | None]:
    """The cosine of each slide with each text; None for a slide that cannot be encoded, which the page will report."""
    found = []
    for slide in tqdm(slides, unit="slide", desc="slides to embeddings"):
        try:
            embedding = predictor.encode_slide(slide.features()).slide
        except (ValueError, OSError, MemoryError):
            found.append(None)
            continue
        norms = np.linalg.norm(texts, axis=1) * np.linalg.norm(embedding)
        found.append((texts @ embedding / np.maximum(norms, 1e-12)).tolist())
    return found
