"""The figures of an evaluation, each a matplotlib Figure that the report embeds and the folder keeps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from pathflip_jax.evaluate.tasks import froc
from pathflip_jax.scores import retrieval

INK, MUTED, GRID = "#1d2530", "#5b6673", "#e3e7ec"
MAIN, SECOND, BASE = "#0b6e75", "#c2571a", "#98a2ae"


def make_axes(width: float, height: float, columns: int = 1):
    """A figure of this many inches with a row of axes, in the colours of the project's pages."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(colors=MUTED, labelsize=8)
        axis.xaxis.label.set(color=INK, fontsize=9)
        axis.yaxis.label.set(color=INK, fontsize=9)
        axis.set_axisbelow(True)
    return figure, axes


def _title(axis, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def confusion(labels, predictions, names: Sequence[str], title: str = "Slides by true and predicted class") -> Figure:
    """Truth by prediction: counts in the cells, their share of the true class as shade."""
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
    _title(axis, title)
    return figure


def few_shot(block: dict, labels, beliefs: dict[tuple, np.ndarray]) -> dict[str, Figure]:
    """The figures of a few-shot task: balanced accuracy over shots, and the confusion of each probe at the most shots.

    The confusion is that of the first seed, whichever it is.
    """
    figure, (axis,) = make_axes(5.6, 3.4)
    places = np.arange(len(block["shots"]))
    colours = (MAIN, SECOND, "#5b4b9a", BASE)
    for shift, (colour, (probe, by_shots)) in enumerate(zip(colours, block["probes"].items(), strict=True)):
        entries = [by_shots[k]["metrics"]["balanced_accuracy"] for k in block["shots"]]
        x = places + 0.06 * (shift - 1.5)
        axis.vlines(x, [e["low"] for e in entries], [e["high"] for e in entries], color=colour, linewidth=1.5)
        axis.plot(x, [e["value"] for e in entries], color=colour, marker="o", markersize=5, linewidth=1.5, label=probe)
    axis.axhline(1 / len(block["classes"]), color=BASE, linewidth=1.5, linestyle=(0, (4, 2)), label="chance")
    axis.set_xticks(places, block["shots"])
    axis.set_ylim(0, 1.02)
    axis.grid(color=GRID, axis="y")
    axis.set_xlabel("training slides per class")
    axis.set_ylabel("balanced accuracy, 95% interval")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    _title(axis, f"Few-shot: {block['label']}")
    found = {f"{block['figures']}_curve": figure}
    most = max(beliefs, key=lambda key: block["shots"].index(str(key[1])))[1]
    for number, probe in enumerate(block["probes"]):
        predicted = beliefs[probe, most][0].argmax(1)
        found[f"{block['figures']}_confusion_{number + 1}"] = confusion(
            labels, predicted, list(block["classes"]), probe
        )
    return found


def recall_curves(ranks: dict[str, retrieval.Ranks]) -> Figure:
    """R@k over k in the whole gallery, each direction beside chance."""
    figure, (axis,) = make_axes(5.2, 3.4)
    largest = int(max(retrieval.gallery_sizes(r).max() for r in ranks.values()))
    ks = np.unique(np.round(np.geomspace(1, largest, 60)).astype(int))
    for (name, found), colour in zip(ranks.items(), (MAIN, SECOND), strict=False):
        axis.plot(ks, [retrieval.recall(found, k).mean() for k in ks], color=colour, linewidth=2, label=name)
    chance = [retrieval.chance(found, k) for k in ks]
    axis.plot(ks, chance, color=BASE, linewidth=1.5, linestyle=(0, (4, 2)), label="chance")
    axis.set_xscale("log")
    axis.set_xticks([k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000) if k <= largest])
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylim(0, 1.02)
    axis.grid(color=GRID)
    axis.set_xlabel(f"k, in a gallery of {largest}")
    axis.set_ylabel("right one among the first k")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    _title(axis, "Retrieval")
    return figure


GROUNDING = {"auc": "ROC AUC of patches", "pointing": "highest patch inside", "dice": "Dice, fixed threshold"}


def concept_dots(rows: list[dict], second: str | None) -> Figure:
    """Each concept's AUC, pointing game and Dice with their intervals, beside the baselines and the compared run."""
    rows = sorted(rows, key=lambda row: np.nan_to_num(row["auc"]["value"]))
    metrics = [metric for metric in GROUNDING if metric in rows[0]]
    figure, axes = make_axes(1.6 + 2.9 * len(metrics), 1.1 + 0.34 * len(rows), len(metrics))
    y = np.arange(len(rows))
    others = [("chance", "|", BASE, "chance"), ("no_text", "s", "#a8871c", "attention, no text")]
    others += [("mean_colour", "D", BASE, "mean colour"), ("compared", "o", SECOND, second)]
    for axis, metric in zip(axes, metrics, strict=True):
        entries = [row[metric] for row in rows]
        for key, marker, colour, label in others:
            if key in entries[0]:
                values = [entry[key] if key == "chance" else entry[key]["value"] for entry in entries]
                axis.scatter(values, y, marker=marker, s=26, color=colour, label=label, zorder=3)
        axis.hlines(
            y, [entry["low"] for entry in entries], [entry["high"] for entry in entries], color=MAIN, linewidth=2
        )
        axis.scatter([entry["value"] for entry in entries], y, s=38, color=MAIN, label="this run", zorder=4)
        axis.set_yticks(y, [row["concept"] for row in rows] if axis is axes[0] else [""] * len(rows))
        axis.set_xlim(right=1.02)
        axis.set_xlabel(GROUNDING[metric])
        axis.grid(color=GRID, axis="x")
        axis.tick_params(axis="y", length=0, labelcolor=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, labelcolor=INK, loc="outside upper left", ncols=5)
    return figure


def froc_curves(maps: dict) -> Figure:
    """Sensitivity over false positives a slide, of each kind of map that there is."""
    figure, (axis,) = make_axes(5.2, 3.4)
    for (name, found), colour in zip(maps.items(), (MAIN, "#a8871c", BASE), strict=True):
        if found is not None:
            axis.step(*froc.curve(found.found), where="post", color=colour, linewidth=2, label=name)
    axis.set_xscale("symlog", base=2, linthresh=0.125)
    axis.set_xticks(froc.RATES)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(0, 16)
    axis.set_ylim(0, 1.02)
    axis.grid(color=GRID)
    axis.set_xlabel("false positives a slide")
    axis.set_ylabel("lesions found")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    _title(axis, "Lesion detection")
    return figure


def training_curves(history: list[dict]) -> Figure | None:
    """Losses and validation scores over steps; None for a history that holds no figure over steps."""
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
        _title(axis, title)
    return figure
