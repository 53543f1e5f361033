"""Heatmap figures: patch scores painted over the slide.

All positions are in level-0 pixels: a patch covers [x, x + patch_size) at level 0 whatever the level it was read at,
and a thumbnail pixel covers `downsample` level-0 pixels. Other tools misplace heatmaps by mixing the two (STACK, "What
users of the neighbours complain of"), so no function here takes a level or magnification.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps, patheffects
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pathflip_jax.data.readers.outlines import Polygon
from pathflip_jax.grounding.canvas import FLATTEST, PANEL, TALLEST, Canvas, canvas_of
from pathflip_jax.grounding.surface import average_patches, smooth_covered

COLORMAP = "inferno"  # perceptually uniform, readable in grey and with colour blindness
OPACITY = 0.62
TITLE_CHARACTERS, TITLE_LINE = 30, 0.17  # characters of a line of a panel's title, and its height in inches
NOTE_CHARACTERS, NOTE_LINE = 42, 0.17  # the same of the note below a panel
ABOVE = 1.0  # place of a title, in panel heights; matplotlib would measure all ticks for it, a third of drawing
INK, MUTED = "#1d2530", "#5b6673"
HALO = [patheffects.withStroke(linewidth=2.6, foreground="#10141a")]


def paint(
    scores: Float[np.ndarray, "N"], coords: Int[np.ndarray, "N 2"], patch_size: float, canvas: Canvas
) -> Float[np.ndarray, "h w"]:
    """Rasterise patch scores on the canvas: the mean where patches overlap, NaN in pixels without a patch."""
    return average_patches(scores, coords, patch_size, canvas.picture.shape[:2], canvas.origin, canvas.downsample)


def blend(
    picture: UInt8[np.ndarray, "h w 3"], heat: Float[np.ndarray, "h w"], norm: Normalize
) -> Float[np.ndarray, "h w 3"]:
    """Blend the heatmap with the greyscale image, so that colour encodes the score alone."""
    grey = (picture @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    colours = colormaps[COLORMAP](norm(np.nan_to_num(heat, nan=norm.vmin)))[..., :3]
    opacity = np.where(np.isfinite(heat), OPACITY, 0.0)[..., None]
    return grey * (1 - opacity) + colours * opacity


class Panel(NamedTuple):
    """One heatmap of a figure: title, patch scores, area outlines, and a caption below."""

    title: str
    scores: Float[np.ndarray, "N"]
    outline: Sequence[Polygon] = ()
    note: str = ""


def draw_panels(
    canvas: Canvas,
    panels: Sequence[Panel],
    coords: Int[np.ndarray, "N 2"],
    patch_size: float,
    *,
    mpp: float = 0.0,
    heading: str = "",
    reference: Sequence[Polygon] | None = (),
    smooth: float = 0.0,
) -> Figure:
    """Draw one heatmap per text side by side, after the slide with the outlines of `reference` (None: without it).

    Each text has its own colour scale (1st to 99th percentile): scores of two texts are not comparable. `smooth` is
    the standard deviation, in patch edges, of the Gaussian that smooths the maps.
    """
    if len(coords) == 0:
        raise ValueError("the slide has no patches, so there is no heatmap to draw")
    rows, columns = canvas.picture.shape[:2]
    count = len(panels) + (reference is not None)
    across = min(count, 4)
    down = -(-count // across)
    height = PANEL * min(max(rows / columns, FLATTEST), TALLEST)
    below = NOTE_LINE * (max((len(_note_lines(panel)) for panel in panels), default=1) - 1)
    room = 0.8 + below + TITLE_LINE * (max((len(_title_lines(panel)) for panel in panels), default=1) - 1)
    figure = Figure(figsize=(PANEL * across, (height + room) * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).ravel())
    for axis in axes:
        axis.set_axis_off()
    shown = axes[:count]
    if reference is not None:
        shown[0].imshow(canvas.picture, interpolation="antialiased")
        shown[0].set_title(heading, fontsize=9, color=MUTED, loc="left", y=ABOVE)
        _draw_outline(shown[0], reference, canvas)
    heats = np.stack([paint(panel.scores, coords, patch_size, canvas) for panel in panels])
    heats = smooth_covered(heats, smooth * patch_size / canvas.downsample)
    for axis, panel, heat in zip(shown[count - len(panels) :], panels, heats, strict=True):
        _draw_panel(axis, panel, canvas, heat, below / height)
    for axis in shown:
        _draw_scale_bar(axis, canvas, mpp)
    return figure


def _title_lines(panel: Panel) -> list[str]:
    """All of a panel's title, in lines that fit its width."""
    return textwrap.wrap(panel.title, TITLE_CHARACTERS) or [""]


def _note_lines(panel: Panel) -> list[str]:
    """All of a panel's note, likewise."""
    return textwrap.wrap(panel.note, NOTE_CHARACTERS) or [""]


def _draw_panel(axis, panel: Panel, canvas: Canvas, heat: Float[np.ndarray, "h w"], below: float) -> None:
    """Draw a map with its title, note and colour bar, `below` the place of a note of one line, in panel heights."""
    low, high = np.quantile(panel.scores, [0.01, 0.99])
    norm = Normalize(low, high if high > low else low + 1e-6, clip=True)
    axis.imshow(blend(canvas.picture, heat, norm), interpolation="antialiased")
    _draw_outline(axis, panel.outline, canvas)
    lines = _title_lines(panel)
    axis.set_title("\n".join(lines), fontsize=9.5, color=INK, loc="left", fontweight="bold", y=ABOVE)
    if panel.note:
        note = axis.text(0, -0.015, "\n".join(_note_lines(panel)), transform=axis.transAxes, va="top", fontsize=8)
        note.set(color=MUTED, in_layout=False)  # a long word must not push the panels apart
    _draw_colour_bar(axis, norm, below)


def draw_grounding(
    grounding,
    image: Canvas | Path | str | None = None,
    outlines: dict[str, list[Polygon]] | None = None,
    notes: Sequence[str] | None = None,
    smooth: float = 0.0,
) -> Figure:
    """Draw a `Grounding`: every text over its slide, or over white without one.

    `image` is the slide file, or its thumbnail if that has been read before (`read_thumbnail`). `outlines` holds the
    areas of each text, drawn on its map, and `notes` a line of text under each map; `smooth` is that of `draw_panels`.
    """
    lines, notes = outlines or {}, notes or [""] * len(grounding.texts)
    panels = [
        Panel(text, scores, lines.get(text, ()), note)
        for text, scores, note in zip(grounding.texts, grounding.patch_scores, notes, strict=True)
    ]
    return draw_panels(
        image if isinstance(image, Canvas) else canvas_of(grounding, image),
        panels,
        grounding.coords,
        grounding.patch_size,
        mpp=grounding.mpp,
        heading=grounding.slide_id,
        reference=None if image is None else (),
        smooth=smooth,
    )


def scale_bar(mpp: float, downsample: float, columns: int) -> tuple[float, str]:
    """Scale bar of a round length near a quarter of the image: thumbnail pixels and label (px when mpp is unknown)."""
    unit = mpp * downsample if mpp > 0 else downsample  # size of one thumbnail pixel
    wanted = columns * unit / 4
    power = 10 ** np.floor(np.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    if mpp <= 0:
        return length / unit, f"{length:g} px"
    return length / unit, f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"


def _draw_scale_bar(axis, canvas: Canvas, mpp: float) -> None:
    rows, columns = canvas.picture.shape[:2]
    length, label = scale_bar(mpp, canvas.downsample, columns)
    x, y, thick = 0.03 * columns, rows - 0.035 * columns, 0.012 * columns
    axis.add_patch(Rectangle((x, y), length, thick, facecolor="white", edgecolor="#10141a", linewidth=0.8))
    text = axis.text(x + length / 2, y - 0.4 * thick, label, ha="center", va="bottom", fontsize=7.5, color="white")
    text.set_path_effects(HALO)


def _draw_outline(axis, polygons: Sequence[Polygon], canvas: Canvas) -> None:
    for polygon in polygons:
        for ring in (polygon.ring, *polygon.holes):
            x, y = ((np.asarray(ring) - canvas.origin) / canvas.downsample - 0.5).T
            axis.plot(x, y, color="white", linewidth=1.3, path_effects=HALO, scalex=False, scaley=False)


def _draw_colour_bar(axis, norm: Normalize, below: float) -> None:
    bar = axis.inset_axes((0.0, -0.1 - below, 1.0, 0.025))
    bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=COLORMAP, extent=(norm.vmin, norm.vmax, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([norm.vmin, norm.vmax], [f"{norm.vmin:.3g}", f"{norm.vmax:.3g}"], fontsize=7, color=MUTED)
    bar.get_xticklabels()[0].set_horizontalalignment("left")
    bar.get_xticklabels()[1].set_horizontalalignment("right")
    bar.tick_params(length=0, pad=2)
    for side in bar.spines.values():
        side.set_visible(False)
