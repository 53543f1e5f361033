"""A linear model of words and mean features, trained with PathFLIP's slide loss: what the network has to beat.

A text is the counts of its words, a slide the mean of its patch features, standardised over training patches. Each is
projected linearly into a joint space. A part of the patches and sentences is drawn anew at every step, as
`configs/small_cohort.py` does.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pathflip_jax.losses.pathflip import normalise, slide_loss

STEPS, BATCH, WIDTH, RATE = 600, 48, 32, 3e-3
PATCH_SHARE, SENTENCE_SHARE = 0.25, 0.25
_WORD = re.compile(r"[a-z0-9]+")
Projections = dict[str, Float[Array, "..."]]


class LinearModel(NamedTuple):
    """Vocabulary, mean and standard deviation of features, and the projections of features and words."""

    vocabulary: dict[str, int]
    centre: Float[np.ndarray, " F"]
    spread: Float[np.ndarray, " F"]
    projections: Projections

    def embed_features(self, features: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n D"]:
        """Unit embeddings of patches, or of slides by their mean feature."""
        scaled = (np.asarray(features, np.float32) - self.centre) / self.spread
        return np.asarray(normalise(scaled @ self.projections["features"]))

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n D"]:
        """Unit embeddings of texts; unknown words have no effect."""
        return np.asarray(normalise(count_words(texts, self.vocabulary) @ self.projections["words"]))


def count_words(texts: Sequence[str], vocabulary: dict[str, int]) -> Float[np.ndarray, "n V"]:
    """Counts of known words in each text, scaled to unit length."""
    counts = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word in _WORD.findall(text.lower()):
            if word in vocabulary:
                row[vocabulary[word]] += 1
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)


def fit(
    slides: Sequence[Float[np.ndarray, "N F"]], reports: Sequence[Sequence[str]], seed: int = 0, steps: int = STEPS
) -> LinearModel:
    """Train on slides, given by their patch features, and the sentences of their reports."""
    rng = np.random.default_rng(seed)
    found = {word: None for report in reports for text in report for word in _WORD.findall(text.lower())}
    vocabulary = {word: number for number, word in enumerate(found)}
    patches = np.concatenate(slides).astype(np.float32)
    centre, spread = patches.mean(0), np.maximum(patches.std(0), 1e-6)
    shapes = {"features": (len(centre), WIDTH), "words": (len(vocabulary), WIDTH)}
    projections = {name: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for name, shape in shapes.items()}
    batch = min(BATCH, len(slides))
    related = jnp.arange(batch)[:, None]
    optimiser = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=0.1)

    def loss(projections: Projections, features: Array, words: Array) -> Array:
        return slide_loss(features @ projections["features"], words @ projections["words"], related)

    @jax.jit
    def update(projections: Projections, state: optax.OptState, features: Array, words: Array):
        changes, state = optimiser.update(jax.grad(loss)(projections, features, words), state, projections)
        return optax.apply_updates(projections, changes), state

    state = optimiser.init(projections)
    for _ in range(steps):
        chosen = rng.permutation(len(slides))[:batch]
        features = [_draw(rng, slides[i], PATCH_SHARE).astype(np.float32).mean(0) for i in chosen]
        texts = [" ".join(_draw(rng, np.array(reports[i], object), SENTENCE_SHARE)) for i in chosen]
        scaled = (np.stack(features) - centre) / spread
        projections, state = update(projections, state, scaled, count_words(texts, vocabulary))
    return LinearModel(vocabulary, centre, spread, projections)


def _draw(rng: np.random.Generator, among: np.ndarray, share: float) -> np.ndarray:
    return among[rng.permutation(len(among))[: max(1, round(share * len(among)))]]
