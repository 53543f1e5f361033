"""Embeddings of a cohort's slides, shared by the tasks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from pathflip_jax.data.storage.blocks import row_mean
from pathflip_jax.evaluate.cohort import Cohort


class Bag(NamedTuple):
    """A slide's embedding, those of its regions, and the mean of its raw patch features."""

    slide: Float[np.ndarray, "D"]
    regions: Float[np.ndarray, "R D"]
    features: Float[np.ndarray, "D"]


def embed_bags(predictor, cohort: Cohort, ids: Sequence[str], name: str) -> dict[str, Bag]:
    """The embeddings of these slides by id; a slide named several times is encoded once."""
    ids, means = list(dict.fromkeys(ids)), {}

    def slides():
        for slide_id in tqdm(ids, desc=f"{name}: slides", unit="slide", leave=False):
            slide = cohort.features(slide_id)
            means[slide_id] = row_mean(slide.features)
            yield slide

    found = predictor.encode_slides(slides())
    return {slide: Bag(one.slide, one.regions, means[slide]) for slide, one in zip(ids, found, strict=True)}


def slide_embeddings(bags: dict[str, Bag], ids: Sequence[str]) -> Float[np.ndarray, "n D"]:
    """The embeddings of slides as rows."""
    return np.stack([bags[slide].slide for slide in ids])
