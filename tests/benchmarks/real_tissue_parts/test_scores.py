"""The table of the benchmark: rows of runs, the paired gain, baselines and chance."""

import numpy as np
import pytest

from pathflip_jax.scores import statistics


@pytest.fixture
def scores(benchmark_modules):
    return benchmark_modules("real_tissue_parts.scores")


def test_the_table_has_runs_their_gain_baselines_and_chance(scores):
    values = np.linspace(0, 1, 21)
    ours = {"grounding": [statistics.mean(values), statistics.mean(values + 0.1)]}
    others = {"grounding": [statistics.mean(values - 0.2), statistics.mean(values - 0.1)]}
    blind = {scores.NO_TEXT: {"grounding": [statistics.mean(values * 0 + 0.5)]}}
    found = scores.Scores(
        {scores.WITH: ours, scores.WITHOUT: others},
        blind,
        {"grounding": 0.5, "grounding_masks": 0.5},
        [[str(number)] for number in range(21)],
        {},
    )
    table = scores.make_table(found)
    assert list(table) == [scores.WITH, scores.WITHOUT, scores.GAIN, scores.NO_TEXT, scores.CHANCE]
    assert table[scores.GAIN]["grounding"]["by_run"] == pytest.approx([0.2, 0.2])
    assert list(table[scores.CHANCE]) == ["grounding"]  # no masks, no column
    text = scores.markdown(table, 21, "test")
    assert "| gain of the region loss | +0.200 (+0.200 to +0.200) |" in text
    assert "| chance | 0.500 |" in text and "| - run 2 | 0.600 |" in text


def test_runs_are_added_by_row_and_column(scores):
    rows = {}
    one, two = statistics.mean(np.zeros(2)), statistics.mean(np.ones(2))
    scores.add(rows, {"a": {"grounding": one}})
    scores.add(rows, {"a": {"grounding": two, "zero_shot": one}})
    assert rows == {"a": {"grounding": [one, two], "zero_shot": [one]}}


def test_slides_in_another_order_are_refused(scores):
    units = scores.Units([("b",), ("a",)], ["b", "a"], ["", ""], {})
    with pytest.raises(ValueError, match="2 slides were scored, from b: expected 2 in order"):
        scores._ordered(units, ["a", "b"])


def test_class_sizes_count_slides_and_labels(scores):
    rows = [{"classes": "normal;polyp", "label": "normal"}, {"classes": "polyp", "label": "polyp"}]
    assert scores.class_sizes(rows, ["normal", "polyp"]) == {
        "normal": {"slides": 1, "labelled": 1},
        "polyp": {"slides": 2, "labelled": 1},
    }
