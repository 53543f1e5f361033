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
from pathflip_jax.grounding.method import Encoder, Method, View

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

    Raises ValueError for a method that does not exist or that the family does not support, an even window, and a slide
    without coordinates, on which no score can be located.
    """
    name = method or encoder.default_method
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not supported; expected one of {', '.join(METHODS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window}: expected an odd number, because a window is centred on a patch")
    found = METHODS[name]
    if found.splits_regions and encoder.patchwise:
        raise ValueError(
            f"method {name!r} refines region scores by attention to the patches of a region, but this model attends to "
            "patches already; use method 'region'"
        )
    if found.attends and encoder.untrained_attention:
        _warn_of_untrained(name, encoder.untrained_attention)
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


@functools.cache
def _warn_of_untrained(method: str, reason: str) -> None:
    """Log once per method and reason that its map means nothing."""
    log.warning(
        "method %r: its map is not meaningful, because the attention of texts to regions was not trained (%s); use the "
        "method 'slide'", method, reason,
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
    for the texts followed by the negative ones, if it is already available.
    """
    texts, negative = as_tuple(texts), as_tuple(negative)
    text = encoder.encode_texts(texts + negative) if encoded is None else encoded
    region_scores = maps.log_ratio(encoder.attend_regions(text.region, prepared.regions))
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
