"""Table of grounding methods, which score patches for a text with a trained model, and the grounding by any of them.

The model is trained to attend from a subcaption to regions (DESIGN section 3.6); a map needs scores of patches. The
methods differ in how they derive one from the other; `docs/grounding_methods.md` compares them.
"""

import functools
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from pathflip_jax.grounding import maps
from pathflip_jax.grounding.maps import CONTEXT, WINDOW, Grounding, Prepared
from pathflip_jax.grounding.method import ATTENTION, REGIONS, Encoder, Method, View

log = logging.getLogger(__name__)

# In the order in which the help lists their methods.
FILES = (
    "region_methods",
    "window_methods",
)
METHODS: dict[str, Method] = {
    method.name: method for file in FILES for method in import_module(f"pathflip_jax.grounding.{file}").METHODS
}


def describe_methods() -> str:
    """Methods by name, each with its description: the help of --method."""
    return "; ".join(f"{name}: {method.description}" for name, method in METHODS.items())


def prepare(
    encoder: Encoder, slide, *, method: str | None = None, window: int = WINDOW, context: int = CONTEXT
) -> Prepared:
    """Encode a slide independently of texts, so that many can be scored on it (method None: the family's default).

    Raises ValueError as `check_method`, for an even window, and for a slide without coordinates, on which no score can
    be located.
    """
    name = check_method(encoder, method)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window}: expected an odd number, because a window is centred on a patch")
    found = METHODS[name]
    if slide.coords is None:
        raise ValueError(
            f"slide {slide.slide_id}: its feature file contains no coordinates, so a text cannot be localized on it; "
            "extract features in a format that stores them (CLAM or TRIDENT h5)"
        )
    bag = encoder.bag(slide)
    encoding = encoder.encode_slots([bag.features], [bag.slots], attention=found.attention)
    return Prepared(
        slide_id=slide.slide_id,
        coords=slide.coords,
        patch_size=slide.patch_size,
        mpp=slide.mpp,
        width=slide.width,
        height=slide.height,
        method=name,
        slots=bag.slots,
        regions=encoding.regions[0, : len(bag.slots)],
        state=found.prepare(encoder, View(slide, bag.features, bag.slots, encoding, window, context)),
    )


def check_method(encoder: Encoder, method: str | None) -> str:
    """The name of a method (None: the family's default) that can map texts with this model.

    Raises ValueError for one that does not exist, that the family does not support, or whose weights the run never
    trained. Where these were trained, but not by comparing them with texts, the map is a baseline, as a note says.
    """
    name = method or encoder.default_method
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not supported; expected one of {', '.join(METHODS)}")
    found = METHODS[name]
    if found.splits_regions and encoder.patchwise:
        raise ValueError(
            f"method {name!r} refines region scores by attention to the patches of a region, but this model attends to "
            "patches already; use method 'region'"
        )
    trained = ", ".join(trained_methods(encoder))
    for part in filter(encoder.untrained.__contains__, found.rests_on):
        raise ValueError(
            f"{encoder.name}: method {name!r} maps {part}, whose weights this run never trained "
            f"({encoder.untrained[part]}); use a trained one: {trained}"
        )
    for part in filter(encoder.unaligned.__contains__, found.rests_on):
        _note_unaligned(encoder.name, name, part, encoder.unaligned[part], trained)
    return name


def trained_methods(encoder: Encoder) -> list[str]:
    """The names of the methods that the family supports and that rest only on parts that the run trained with texts."""
    blamed = encoder.untrained.keys() | encoder.unaligned.keys()
    supported = {name: method for name, method in METHODS.items() if not (method.splits_regions and encoder.patchwise)}
    return [name for name, method in supported.items() if blamed.isdisjoint(method.rests_on)]


@functools.cache
def _note_unaligned(run: str, method: str, part: str, why: str, trained: str) -> None:
    """Log once per run and method that its map is only a baseline."""
    log.warning(
        "%s: method %r maps %s, which this run never compared with texts (%s): its map is a baseline; trained methods: "
        "%s", run, method, part, why, trained,
    )  # fmt: skip


def score(
    encoder: Encoder,
    prepared: Prepared,
    texts: str | Sequence[str],
    *,
    negative: str | Sequence[str] = (),
    encoded: Any = None,
) -> Grounding:
    """Score texts on a slide that `prepare` has encoded: one matrix product per additional text.

    The highest score of the `negative` texts is subtracted (`maps.subtract`). `encoded` is the result of `encode_texts`
    for the texts followed by the negative ones, if it is already available. The scores of regions are NaN where the run
    never trained the attention that they are made of.
    """
    texts, negative = as_tuple(texts), as_tuple(negative)
    text = encoder.encode_texts(texts + negative) if encoded is None else encoded
    region_scores = maps.log_ratio(encoder.attend_regions(text.region, prepared.regions))
    if not encoder.untrained.keys().isdisjoint((REGIONS, ATTENTION)):
        region_scores = np.full_like(region_scores, np.nan)
    patch_scores = METHODS[prepared.method].score(encoder, prepared, text, region_scores)
    found = Grounding(
        slide_id=prepared.slide_id,
        texts=texts + negative,
        patch_scores=np.asarray(patch_scores, np.float32),
        region_scores=np.asarray(region_scores, np.float32),
        coords=prepared.coords,
        patch_size=prepared.patch_size,
        mpp=prepared.mpp,
        width=prepared.width,
        height=prepared.height,
        method=prepared.method,
    )
    return maps.subtract(found, len(negative))


def as_tuple(texts: str | Sequence[str]) -> tuple[str, ...]:
    """One or several texts as a tuple."""
    return (texts,) if isinstance(texts, str) else tuple(texts)
