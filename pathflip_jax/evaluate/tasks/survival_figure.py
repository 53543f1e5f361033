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
    figure, (axis, table) = make_axes(5.6, 4.9, heights=(5, 1))
    last = max(outcomes.time.max() for outcomes in groups.values() if len(outcomes.time))
    ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 3, 5, 6, 10]).tick_values(0, last) if 0 <= tick <= last]
    for colour, (name, outcomes) in zip(COLOURS, groups.items(), strict=True):
        if len(outcomes.time) == 0:
            continue
        curve = survival.kaplan_meier(outcomes)
        places = np.concatenate([[0.0], curve.time])
        line, low, high = (np.concatenate([[1.0], part]) for part in (curve.survival, curve.low, curve.high))
        label = f"{name} ({len(outcomes.time)} patients, {int(outcomes.event.sum())} events)"
        axis.step(places, line, where="post", color=colour, linewidth=1.8, label=label)
        axis.fill_between(places, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
        censored = outcomes.time[~outcomes.event]
        axis.plot(censored, curve.at(censored), linestyle="none", marker="|", markersize=8, color=colour)
    axis.plot([], [], linestyle="none", marker="|", markersize=8, color=MUTED, label="censored")
    axis.set(xlim=(0, last * 1.02), ylim=(0, 1.04), xticks=ticks)
    axis.grid(color=GRID, axis="y")
    axis.set_xlabel(f"time [{unit}]" if unit else "time (unit not stated)")
    axis.set_ylabel("share without event")
    tested = "log-rank test undefined" if np.isnan(p) else f"log-rank p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8, labelcolor=INK, columnspacing=1.2)
    set_title(axis, f"{title}, {tested}")
    _draw_at_risk(table, groups, ticks, axis.get_xlim())
    return figure


def _draw_at_risk(axis, groups: Mapping[str, Outcomes], ticks: list[float], limits: tuple[float, float]) -> None:
    """A table of how many patients of each group are at risk at each tick."""
    for row, (colour, outcomes) in enumerate(zip(COLOURS, groups.values(), strict=True)):
        for tick, count in zip(ticks, survival.at_risk(outcomes, ticks), strict=True):
            axis.text(tick, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlim=limits, ylim=(len(groups) - 0.5, -0.5), xticks=[])
    axis.set_yticks(range(len(groups)), list(groups))
    for label, colour in zip(axis.get_yticklabels(), COLOURS, strict=True):
        label.set_color(colour)
    axis.tick_params(length=0, pad=14)
    axis.spines[:].set_visible(False)
    axis.set_title("Number at risk", loc="left", fontsize=8, color=MUTED)
