"""The report's own arithmetic: no NaN in JSON, signs and percentages as people write them."""

import json

import numpy as np
import pytest

from pathflip_jax.evaluate import figures, report


def test_json_holds_no_nan():
    found = report.without_nan({"a": [float("nan"), 1.5, {"b": float("inf")}], "c": "x", 3: (None, True)})
    assert found == {"a": [None, 1.5, {"b": None}], "c": "x", "3": [None, True]}
    json.dumps(found, allow_nan=False)


def test_numbers_as_people_write_them():
    assert [report._figure(x) for x in (0.12345, None)] == ["0.123", "–"]
    assert [report._percent(x) for x in (0.1234, None)] == ["12.3%", "–"]
    assert [report._signed(x) for x in (0.05, -0.05, None)] == ["+0.050", "−0.050", "–"]


def test_training_curves_need_a_history():
    assert figures.training_curves([]) is None
    figure = figures.training_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val/recall_at_1": 0.5}])
    lines = [line.get_xydata().tolist() for axis in figure.axes for line in axis.lines]
    assert lines == [[[1, 2.0], [2, 1.0]], [[2, 0.5]]]


def test_confusion_shows_every_slide():
    labels, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    figure = figures.confusion(labels, predicted, ["a", "b", "c"])
    shown = {t.get_position()[::-1]: int(t.get_text()) for t in figure.axes[0].texts}
    assert shown == {(0, 0): 1, (0, 1): 1, (1, 1): 1, (2, 2): 2, (2, 0): 1}
    assert figure.axes[0].images[0].get_array()[2, 2] == pytest.approx(2 / 3)
