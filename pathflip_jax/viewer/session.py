"""Slides of a viewer as the JSON that the page reads, the same in a static folder and from a server."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps

from pathflip_jax.grounding.files import COLOURS
from pathflip_jax.grounding.heatmap import COLORMAP
from pathflip_jax.grounding.maps import Grounding, Prepared
from pathflip_jax.grounding.placement import check_on_slide, check_same_slide
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.inference.sources import SlideSource
from pathflip_jax.viewer.grounder import Grounder
from pathflip_jax.viewer.intake import Intake
from pathflip_jax.viewer.layers import Layer, areas, layer_facts
from pathflip_jax.viewer.pictures import Pictures, Pyramid
from pathflip_jax.viewer.search import Search
from pathflip_jax.viewer.speaker import Speaker

RESEARCH_ONLY = "For research use only: not a medical device, not for diagnosis."
MPP_DIFFERENCE = 1.1  # maximum ratio of the resolutions of a slide file and its features


class Session:
    """Slides of a viewer, and the components that answer queries about them."""

    def __init__(
        self,
        slides: Sequence[SlideSource],
        pictures: Pictures,
        grounder: Grounder,
        search: Search,
        speaker: Speaker | None = None,
        intake: Intake | None = None,
    ) -> None:
        self.slides, self.pictures, self.grounder = slides, pictures, grounder
        self.search, self.speaker, self.intake = search, speaker, intake

    def page(self) -> dict[str, Any]:
        """Initial data of the page: the model, the table of slides, and whether it `grows`."""
        predictor = self.grounder.predictor
        model = model_facts(predictor, self.grounder.method) | {"language": self.speaker is not None}
        return {"live": True, "grows": self.intake is not None, **model, **self.table()}

    def table(self) -> dict[str, Any]:
        """Table of slides, which grows: what there is of each, and the state of its encoding."""
        return {
            "slides": [
                {
                    "id": slide.slide_id,
                    "image": slide.image is not None,
                    "features": slide.features is not None,
                    "encoding": None if self.intake is None else self.intake.progress(number),
                }
                for number, slide in enumerate(self.slides)
            ]
        }

    def slide(self, number: int) -> dict[str, Any]:
        """Tile description of a slide; `image` is None without a readable slide file."""
        slide = self.slides[number]
        if slide.image is None:
            return {
                "image": None,
                "warnings": ["no slide file: maps are drawn on a blank slide at the coordinates of its patches"],
            }
        try:
            return {"image": image_facts(self.pictures.pyramid(slide.image)), "warnings": []}
        except (ValueError, OSError) as error:
            if slide.features is None:
                raise
            return {
                "image": None,
                "warnings": [f"{error}; maps are drawn on a blank slide at the coordinates of its patches"],
            }

    def patches(self, number: int) -> dict[str, Any]:
        """Positions of a slide's patches; returns once the slide is encoded."""
        return patches_facts(self.grounder.prepared(self._encoded(number)), self._pyramid(number))

    def layer(self, number: int, text: str, negative: Sequence[str]) -> dict[str, Any]:
        """Scores of a text on a slide."""
        return layer_facts(self._layer(number, text, negative))

    def areas(self, number: int, text: str, negative: Sequence[str], percent: float) -> dict[str, Any]:
        """Areas of a text above a threshold, in percent of its layer's range."""
        return {"areas": areas(self._layer(number, text, negative), percent)}

    def find(self, text: str) -> dict[str, Any]:
        """Slides by their similarity to a text, the highest first."""
        found = self.search.similarities(self.grounder.embed_text(text))
        return {"slides": [[number, cosine] for number, cosine in found.items()], **self.search.progress()}

    def report(self, number: int) -> dict[str, Any]:
        """Report of a slide. Raises ValueError without a language stage."""
        return {"text": self._language().report(self._encoded(number))}

    def answer(self, number: int, question: str, before: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Answer to a question about a slide, after those `before`. Raises ValueError without a language stage."""
        return {"text": self._language().answer(self._encoded(number), question, before)}

    def _language(self) -> Speaker:
        if self.speaker is None:
            raise ValueError("no language stage is loaded; start the viewer with --language RUN")
        return self.speaker

    def _encoded(self, number: int) -> SlideSource:
        """Slide with features. Raises Waiting for one that is still being encoded."""
        if self.intake is not None:
            self.intake.require(number)
        return self.slides[number]

    def _layer(self, number: int, text: str, negative: Sequence[str]) -> Layer:
        slide, pyramid = self._encoded(number), self._pyramid(number)
        return self.grounder.layer(slide, text, negative, mpp=pyramid.mpp if pyramid else 0.0)

    def _pyramid(self, number: int) -> Pyramid | None:
        """Pyramid of the slide file, None if it is missing or unreadable, which `slide` reports."""
        image = self.slides[number].image
        try:
            return None if image is None else self.pictures.pyramid(image)
        except (ValueError, OSError):
            return None


def model_facts(predictor: Predictor, method: str) -> dict[str, Any]:
    """Model description for the page, and its colour map."""
    heat = np.round(colormaps[COLORMAP](np.arange(256))[:, :3] * 255).astype(int)
    return {
        "run": predictor.name.rstrip("/").rpartition("/")[2],  # the name without its folder, because pages are shared
        "encoder": predictor.encoder,
        "method": method,
        "notice": RESEARCH_ONLY,
        "colours": COLOURS,
        "heat": heat.tolist(),
        "language": False,
    }


def image_facts(pyramid: Pyramid, last: int | None = None) -> dict[str, Any]:
    """Pyramid for the page: its size at level 0, and the available levels (up to `last`) with their tiles."""
    last = pyramid.levels - 1 if last is None else last
    first = next(level for level in range(last, -1, -1) if pyramid.tiles(level) == (1, 1) or level == 0)
    return {
        "width": pyramid.width,
        "height": pyramid.height,
        "mpp": pyramid.mpp,
        "bounds": pyramid.bounds,
        "shown": pyramid.size(last),
        "first": first,
        "last": last,
        "tile": pyramid.tile,
        "overlap": pyramid.overlap,
    }


def patches_facts(slide: Prepared | Grounding, pyramid: Pyramid | None) -> dict[str, Any]:
    """Patches of a slide for the page, and any mismatch between them and the slide file."""
    width, height = (slide.width, slide.height) if pyramid is None else (pyramid.width, pyramid.height)
    warnings = []
    try:
        if pyramid is not None:
            check_same_slide(slide, pyramid, "the slide file")
        elif width and height:
            check_on_slide(slide, width, height, "the slide according to its feature file")
    except ValueError as error:  # only a warning, because the user sees the positions
        warnings.append(str(error))
    if pyramid is not None and slide.mpp > 0 < pyramid.mpp:
        if not 1 / MPP_DIFFERENCE < slide.mpp / pyramid.mpp < MPP_DIFFERENCE:
            warnings.append(f"the features have {slide.mpp:g} um per pixel, but the slide file has {pyramid.mpp:g}")
    mpp = slide.mpp or (0.0 if pyramid is None else pyramid.mpp)
    if not mpp:
        warnings.append(
            "the pixel size (mpp) is unknown: no scale bar in micrometres and no areas in square millimetres"
        )
    return {
        "coords": np.asarray(slide.coords).ravel().tolist(),
        "patch_size": slide.patch_size,
        "mpp": mpp,
        "width": width,
        "height": height,
        "warnings": warnings,
    }
