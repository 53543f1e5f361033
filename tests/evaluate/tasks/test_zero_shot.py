"""Zero-shot classification: ensembles of texts and the nearest class."""

import numpy as np
import pytest

from pathflip_jax.evaluate.tasks import zero_shot


def test_an_ensemble_is_the_mean_of_unit_embeddings():
    vectors = {"x": [3.0, 0, 0], "y": [0, 0.1, 0], "z": [0, 0, -2.0]}
    found = zero_shot.class_embeddings(
        lambda texts: np.array([vectors[t] for t in texts]), {"a": ["x", "y"], "b": ["z"]}
    )
    assert found == pytest.approx(np.array([[0.5**0.5, 0.5**0.5, 0], [0, 0, -1]]), abs=1e-6)


def test_probabilities_follow_the_cosine():
    rng = np.random.default_rng(0)
    slides, classes = rng.normal(size=(7, 5)) * 9, zero_shot.normalise(rng.normal(size=(3, 5)))
    found = zero_shot.class_probabilities(slides, classes)
    cosine = (slides / np.linalg.norm(slides, axis=1, keepdims=True)) @ classes.T
    expected = np.exp(cosine / 0.1) / np.exp(cosine / 0.1).sum(1, keepdims=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found.argmax(1).tolist() == cosine.argmax(1).tolist()
