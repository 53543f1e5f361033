"""Kaplan-Meier figures: curves, censoring, numbers at risk, and groups in which little happens."""

import numpy as np
import pytest

from pathflip_jax.evaluate.tasks.survival_figure import kaplan_meier_figure
from pathflip_jax.scores.survival import Outcomes

pytest.importorskip("sksurv")


def outcomes(time, event):
    return Outcomes(np.array(time, float), np.array(event, bool), np.zeros(len(time), int))


HIGH, LOW = outcomes([3, 6, 6, 20], [1, 1, 0, 1]), outcomes([10, 30, 45], [0, 1, 0])


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_curves_censoring_and_numbers_at_risk_are_shown():
    figure = kaplan_meier_figure({"high": HIGH, "low": LOW}, 0.012, "months", "Survival")
    axis, table = figure.axes
    (high, censored_high, low, censored_low, _) = axis.lines
    assert high.get_xdata().tolist() == [0, 3, 6, 20] and high.get_ydata() == pytest.approx([1, 0.75, 0.5, 0])
    assert low.get_xdata().tolist() == [0, 10, 30, 45] and low.get_ydata() == pytest.approx([1, 1, 0.5, 0.5])
    assert censored_high.get_xydata().tolist() == [[6, 0.5]] and len(censored_low.get_xdata()) == 2
    assert axis.get_xticks().tolist() == [0, 10, 20, 30, 40] and axis.get_xlabel() == "time [months]"
    assert texts(table) == ["4", "1", "1", "0", "0", "3", "3", "2", "2", "1"]
    assert axis.get_title(loc="left") == "Survival, log-rank p = 0.012"


@pytest.mark.parametrize(
    "groups",
    [{"high": HIGH, "low": outcomes([], [])}, {"high": HIGH, "low": outcomes([9, 12], [0, 0])}],
    ids=["empty", "no events"],
)
def test_groups_in_which_nothing_happens_are_drawn(groups, tmp_path):
    figure = kaplan_meier_figure(groups, float("nan"), None, "Survival")
    figure.savefig(tmp_path / "figure.png", dpi=30)
    assert "undefined" in figure.axes[0].get_title(loc="left") and "not stated" in figure.axes[0].get_xlabel()
    assert len(texts(figure.axes[1])) == 2 * len(figure.axes[0].get_xticks())
