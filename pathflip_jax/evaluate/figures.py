"""Figures shared by several tasks, in the colours of the project's pages."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2530", "#5b6673", "#e3e7ec"
MAIN, SECOND, BASE = "#0b6e75", "#c2571a", "#98a2ae"


def make_axes(width: float, height: float, columns: int = 1, heights: Sequence[float] = (1,)):
    """A figure of `width` by `height` inches in the colours of the project's pages, and its axes, row by row.

    There is one row of axes for each relative height.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(colors=MUTED, labelsize=8)
        axis.xaxis.label.set(color=INK, fontsize=9)
        axis.yaxis.label.set(color=INK, fontsize=9)
        axis.set_axisbelow(True)
    return figure, axes


def set_title(axis, text: str) -> None:
    """Put a title above the left edge of an axis."""
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def confusion(labels, predictions, names: Sequence[str], title: str = "Slides by true and predicted class") -> Figure:
    """A confusion matrix: counts as text, fractions of the true class as shade."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predictions), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.0 + 0.42 * len(names)
    figure, (axis,) = make_axes(side + 0.6, side)
    axis.imshow(share, cmap="GnBu", vmin=0, vmax=1.15)
    for i, j in np.ndindex(counts.shape):
        if counts[i, j]:
            shade = "white" if share[i, j] > 0.6 else INK
            axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=8, color=shade)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    set_title(axis, title)
    return figure


def training_curves(history: list[dict]) -> Figure | None:
    """Losses and validation scores over steps; None for a history without numbers."""
    keys = sorted({k for row in history for k, v in row.items() if isinstance(v, int | float) and k != "step"})
    losses = [k for k in keys if "loss" in k][:6]
    scores = [k for k in keys if k.startswith("val") and k not in losses and "cosine" not in k][:6]
    groups = [(title, names) for title, names in (("Loss", losses), ("Validation", scores)) if names]
    if not groups:
        return None
    figure, axes = make_axes(4.6 * len(groups), 3.9, len(groups))
    palette = (MAIN, SECOND, "#5b4b9a", "#a8871c", "#3f7d3a", "#a33a5b")
    for axis, (title, names) in zip(axes, groups, strict=True):
        for name, colour in zip(names, palette, strict=False):
            points = [(row["step"], row[name]) for row in history if name in row and "step" in row]
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=name)
        axis.grid(color=GRID)
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
        set_title(axis, title)
    return figure
