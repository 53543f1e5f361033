"""Selection of the best checkpoint; validation metrics are tested with whole runs, in test_train.py."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pathflip_jax.scores.retrieval import Ranks, rank
from pathflip_jax.settings.sections import TrainSettings
from pathflip_jax.training import validation
from pathflip_jax.training.monitors import PHASES
from pathflip_jax.training.validation import choose_best


@pytest.mark.parametrize(
    ("select", "margin", "tie", "scores", "chosen"),
    [
        ("val/recall_at_1", 0.0, "latest", [0.2, 0.5, 0.5, 0.4], [0, 1]),
        ("val/recall_at_1", 0.15, "latest", [0.2, 0.5, 0.4, 0.34, 0.36], [0, 1, 2, 4]),  # never below the top by more
        ("val/loss", 0.0, "latest", [3.0, 2.0, 2.5, 1.0], [0, 1, 3]),
        ("val/loss", 0.6, "latest", [3.0, 2.0, 2.5, 2.7], [0, 1, 2]),
        ("val/recall_at_1", 0.01, "earliest", [0.2, 0.5, 0.5, 0.6], [0, 1, 3]),
        ("val/recall_at_1", 0.15, "earliest", [0.2, 0.3, 0.36, 0.5, 0.49, 0.4], [0, 2]),  # 0.5 is within 0.15 of 0.36
        ("val/recall_at_1", 0.0, "earliest", [0.2, 0.25, 0.31, 0.4, 0.4], [0, 2]),
        ("val/loss", 0.6, "earliest", [3.0, 2.5, 2.3, 2.0, 2.4], [0, 2]),
        ("val/loss", 0.0, "earliest", [3.0, 2.0, 2.0, 1.9], [0, 1, 3]),  # a loss has no standard error
    ],
)
def test_the_best_among_scores_within_the_margin_is_the_earliest_or_the_latest(select, margin, tie, scores, chosen):
    setup, best, taken = TrainSettings(select=select, select_margin=margin, select_tie=tie), None, []
    for step, score in enumerate(scores):
        found = {select: score} | ({} if "loss" in select else {f"{select}_stderr": 0.1})
        best, improved = choose_best(best, step, found, setup)
        taken += [step] * improved
    assert taken == chosen and best["step"] == chosen[-1] and best["value"] == scores[chosen[-1]]
    assert best["top"] == (min if "loss" in select else max)(scores)


def test_each_batch_of_a_validation_is_a_sign_of_life_and_one_is_compiled(monkeypatch):
    marks, read = [], []
    monkeypatch.setattr(validation.sharding, "place_batch", lambda mesh, batch: batch)

    def batch(number):
        read.append(number)
        return np.float32(number)

    batches = SimpleNamespace(steps_per_epoch=3, batch=batch, take_features=lambda: None)

    def measure(learned, frozen, batch, features):
        marks.append("traced")
        return learned * batch + frozen

    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
    measured = validation.measure_batches(measure, batches, mesh)
    for _ in range(2):
        found = measured(np.float32(2), np.float32(1), marks.append)
        assert found == [1, 3, 5] and all(isinstance(x, np.ndarray | np.generic) for x in found)
    reading, computing = "reading a validation batch", "validating"
    compiling = ["compiling the validation", "traced"]
    assert {reading, computing, compiling[0]} <= PHASES.keys() and not PHASES[compiling[0]].timed
    assert marks == [
        reading,
        *compiling,
        computing,
        *[reading, computing] * 2,
        computing,
        *[reading, computing] * 3,
        computing,
    ]
    assert read == [0, 1, 2] * 2


def test_chance_of_retrieval_leaves_out_masked_slides():
    ranks = Ranks(np.array([0, 1, 3]), np.zeros(3, int), np.array([9, 9, 4]))
    scores = validation.score_retrieval([ranks, ranks])
    assert scores["recall_at_1"] == pytest.approx(1 / 3)
    assert scores["recall_at_1_chance"] == pytest.approx((1 / 10 + 1 / 10 + 1 / 5) / 3)
    assert scores["recall_at_1_stderr"] == pytest.approx(1 / 3)


def test_chance_is_the_score_of_embeddings_without_a_relation():
    rng, scores = np.random.default_rng(0), []
    related = np.arange(40)[:, None] // 2  # two slides to a case
    for _ in range(60):
        slides, texts = rng.normal(size=(2, 40, 8)).astype(np.float32)
        scores.append(validation.score_retrieval([rank(slides, texts, related), rank(texts, slides, related)]))
    for name in ("recall_at_1", "recall_at_5", "mean_reciprocal_rank"):
        found, error = (np.array([one[name + end] for one in scores]) for end in ("", "_stderr"))
        assert found.mean() == pytest.approx(scores[0][f"{name}_chance"], abs=4 * error.mean() / np.sqrt(60)), name
