"""Which checkpoint is the best; what a validation measures is tested where runs are, in test_train.py."""

import pytest

from pathflip_jax.validation import choose_best


@pytest.mark.parametrize(
    ("select", "margin", "scores", "chosen"),
    [
        ("val/recall_at_1", 0.0, [0.2, 0.5, 0.5, 0.4], [0, 1]),
        ("val/recall_at_1", 0.15, [0.2, 0.5, 0.4, 0.34, 0.36], [0, 1, 2, 4]),  # never below the top by more
        ("val/loss", 0.0, [3.0, 2.0, 2.5, 1.0], [0, 1, 3]),
        ("val/loss", 0.6, [3.0, 2.0, 2.5, 2.7], [0, 1, 2]),
    ],
)
def test_the_best_is_the_latest_within_the_margin_of_the_top(select, margin, scores, chosen):
    best, taken = None, []
    for step, score in enumerate(scores):
        best, improved = choose_best(best, step, score, select, margin)
        taken += [step] * improved
    assert taken == chosen and best["step"] == chosen[-1] and best["value"] == scores[chosen[-1]]
