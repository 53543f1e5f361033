"""Sheet of the best patches of each text, with their scores."""

import textwrap
from collections.abc import Sequence

from matplotlib.figure import Figure

from pathflip_jax.grounding.top_patches import TopPatches

ACROSS = 8  # images per row of the sheet
TILE, GAP, SCORE, TITLE = 1.2, 0.08, 0.2, 0.3  # inches: image, gap, score below, title above
INK, MUTED = "#1d2530", "#5b6673"


def draw_sheet(grounding, best: Sequence[TopPatches]) -> Figure:
    """Draw a sheet of images: for each text its patches, best first, with the score under each."""
    across = min(ACROSS, max(len(found.indices) for found in best))
    lines = sum(-(-len(found.indices) // across) for found in best)
    width = max(across, 4) * (TILE + GAP) + GAP
    height = TITLE * (1 + len(best)) + (TILE + SCORE) * lines  # all sizes in inches
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))  # in inches; one for all images, as axes take longer to draw than these
    axis.set_axis_off()
    figure.text(GAP / width, 1 - TITLE / 2 / height, grounding.slide_id, va="center", fontsize=8, color=MUTED)
    top = height - TITLE
    for text, every, (indices, pictures) in zip(grounding.texts, grounding.patch_scores, best, strict=True):
        scores = every[indices]
        shown = textwrap.shorten(text, int(11 * width), placeholder=" ...")
        middle = (top - TITLE / 2) / height
        figure.text(GAP / width, middle, shown, va="center", fontsize=9, color=INK, weight="bold")
        top -= TITLE
        for first in range(0, len(pictures), across):
            top -= TILE + SCORE
            for column, (picture, score) in enumerate(
                zip(pictures[first : first + across], scores[first : first + across], strict=True)
            ):
                left = GAP + column * (TILE + GAP)
                axis.imshow(picture, extent=(left, left + TILE, top + SCORE, top + SCORE + TILE))
                centre = ((left + TILE / 2) / width, (top + SCORE / 2) / height)
                figure.text(*centre, f"{score:.3f}", ha="center", va="center", fontsize=7, color=MUTED)
    axis.set(xlim=(0, width), ylim=(0, height))
    return figure
