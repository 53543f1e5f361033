"""Grounding methods that embed the window of each patch, as a region or as a slide."""

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.storage.blocks import row_blocks
from pathflip_jax.grounding import maps
from pathflip_jax.grounding.method import ATTENTION, REGIONS, SLIDES, Encoder, Method, View


class Patch(Method):
    """Attention of the text over windows, by the same rule as `Region` over regions."""

    name = "patch"
    description = "the attention of the text to windows: each patch with its window is a region"
    rests_on = (REGIONS, ATTENTION)

    def prepare(self, encoder, view):
        """Region embedding of each window [N, D]."""
        slots = view.window_slots()
        if encoder.patchwise:
            return maps.window_means(view.encoding.regions[0], slots)
        return maps.window_regions(_encode_of(encoder, view), slots, view.context)

    def score(self, encoder, prepared, text, region_scores):
        """Logarithm of attention over its uniform value."""
        return maps.log_ratio(encoder.attend_regions(text.region, prepared.state))


class Cosine(Patch):
    """Cosine of the text with the region embedding of each window, bypassing the text-region attention."""

    name = "cosine"
    description = "the cosine similarity of the text and the region embedding of each window"
    rests_on = (REGIONS,)

    def score(self, encoder, prepared, text, region_scores):
        """Cosines with window region embeddings."""
        return cosine(text.region, prepared.state)


class Similarity(Cosine):
    """Cosine with the text-conditioned embedding of each window alone, as in the region loss (DESIGN section 4)."""

    name = "similarity"
    description = (
        "the cosine similarity of the text and the embedding, conditioned on it, of a slide of this window only"
    )
    rests_on = (REGIONS, ATTENTION)

    def prepare(self, encoder, view):
        """Text-conditioned embedding of each window alone [N, D]."""
        return encoder.attend_single_regions(super().prepare(encoder, view))


class Slide(Method):
    """Cosine with the slide embedding of each window taken as a separate slide.

    Neighbouring windows have no influence through the region transformer, and no weights are used that only the region
    loss trains. This makes it the fair method for a model trained without that loss.
    """

    name = "slide"
    description = "the cosine similarity of the text and the slide embedding of each window, taken as a slide"
    rests_on = (SLIDES,)

    def prepare(self, encoder, view):
        """Slide embedding of each window [N, D]."""
        return maps.window_slides(_encode_of(encoder, view), view.window_slots(), view.context)

    def score(self, encoder, prepared, text, region_scores):
        """Cosines with window slide embeddings."""
        return cosine(text.slide, prepared.state)


METHODS = (Patch(), Similarity(), Cosine(), Slide())


def cosine(a: Float[np.ndarray, "C D"], b: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "C N"]:
    """Cosine of each a with each b, computed in blocks because b may be the patches of a large slide."""
    a = _unit(a)
    return np.concatenate([a @ _unit(part).T for _, part in row_blocks(b)], axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _encode_of(encoder: Encoder, view: View):
    """Encoder of a slide's windows: a function from patch indices [B, R, S] to a `SlideEncoding`."""
    return lambda index: encoder.encode_slots([view.features] * len(index), index)
