"""Kaplan-Meier curves of two groups, with censored patients marked and the numbers at risk below."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pathflip_jax.evaluate.figures import GRID, INK, MAIN, MUTED, SECOND, make_axes, set_title
from pathflip_jax.scores import survival
from pathflip_jax.scores.survival import Outcomes

COLOURS = (SECOND, MAIN)  # the group of high risk, the group of low risk


def kaplan_meier_figure(groups: Mapping[str, Outcomes], p: float, unit: str | None, title: str) -> Figure:
    """The curves of the groups, high risk first, with 95% bands; an empty group is left out, and `p` may be NaN."""
    figure, (axis,) = make_axes(5.6, 4.3)
    last = max(outcomes.time.max() for outcomes in groups.values() if len(outcomes.time))
    ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 3, 5, 6, 10]).tick_values(0, last) if 0 <= tick <= last]
    for number, (name, outcomes) in enumerate(groups.items()):
        colour = COLOURS[number]
        _at_risk(axis, number, name, colour, survival.at_risk(outcomes, ticks), ticks)
        if len(outcomes.time) == 0:
            continue
        curve = survival.kaplan_meier(outcomes)
        places = np.concatenate([[0.0], curve.time])
        line, low, high = (np.concatenate([[1.0], part]) for part in (curve.survival, curve.low, curve.high))
        label = f"{name} ({len(outcomes.time)} patients, {int(outcomes.event.sum())} events)"
        axis.step(places, line, where="post", color=colour, linewidth=1.8, label=label)
        axis.fill_between(places, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
        censored = outcomes.time[~outcomes.event]
        axis.plot(censored, curve.at(censored), linestyle="none", marker="|", markersize=7, color=colour)
    axis.plot([], [], linestyle="none", marker="|", markersize=7, color=MUTED, label="censored")
    axis.set(xlim=(0, last * 1.02), ylim=(0, 1.04), xticks=ticks)
    axis.grid(color=GRID, axis="y")
    axis.set_xlabel(f"time [{unit}]" if unit else "time (unit not stated)")
    axis.set_ylabel("share without event")
    tested = "log-rank test undefined" if np.isnan(p) else f"log-rank p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    legend = {"frameon": False, "fontsize": 8, "labelcolor": INK, "title_fontsize": 8, "alignment": "left"}
    axis.legend(title=tested, loc="lower left", **legend)
    set_title(axis, title)
    return figure


def _at_risk(axis, number: int, name: str, colour: str, counts: list[int], ticks: list[float]) -> None:
    """A row of the table below the axis: how many patients of a group are at risk at each tick."""
    place, row = axis.get_xaxis_transform(), -0.34 - 0.075 * number
    heading = {"fontsize": 8, "va": "center", "annotation_clip": False}
    if number == 0:
        axis.annotate("at risk", (-0.02, -0.265), xycoords="axes fraction", ha="right", color=MUTED, **heading)
    axis.annotate(name, (-0.04, row), xycoords="axes fraction", ha="right", color=colour, **heading)
    for tick, count in zip(ticks, counts, strict=True):
        axis.annotate(str(count), (tick, row), xycoords=place, ha="center", color=colour, **heading)
