"""The linear model of words and mean features: what it learns, and what words do to a text."""

import numpy as np
import pytest


@pytest.fixture
def linear(benchmark_modules):
    return benchmark_modules("real_tissue_parts.linear")


def test_words_are_counted_without_case_and_unknown_ones_have_no_effect(linear):
    known = {"fat": 0, "glands": 1}
    counts = linear.count_words(["Fat, fat and glands.", "mucin", "fat"], known)
    assert counts == pytest.approx(np.array([[2, 1], [0, 0], [1, 0]]) / np.array([[5**0.5], [1], [1]]))


def test_slides_are_matched_with_texts_of_their_tissue(linear):
    rng = np.random.default_rng(0)
    kinds = np.arange(48) % 4
    centres = rng.normal(0, 2, (4, 6))
    slides = [(centres[kind] + rng.normal(0, 1, (20, 6))).astype(np.float32) for kind in kinds]
    names = ("fat", "glands", "mucin", "stroma")
    reports = [[f"There is {names[kind]}.", f"The patient is {age} years old."] for age, kind in enumerate(kinds)]
    model = linear.fit(slides[:40], reports[:40], steps=150)
    held_out = model.embed_features(np.stack([slide.mean(0) for slide in slides[40:]]))
    scores = held_out @ model.embed_texts([f"much {name}" for name in names]).T
    assert (scores.argmax(1) == kinds[40:]).mean() >= 0.75
    again = linear.fit(slides[:40], reports[:40], steps=150)
    assert np.array_equal(again.embed_features(slides[0]), model.embed_features(slides[0]))
