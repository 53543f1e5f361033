"""Highest-scoring patches of a text as images, for visual review of a map."""

import io
import textwrap
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image

from pathflip_jax.data.readers import guarded
from pathflip_jax.grounding.files import short_name, write_atomically, write_picture

PIXELS = 256  # pixels of an image's edge
ACROSS = 8  # images per row of the sheet
TILE, GAP, SCORE, TITLE = (
    1.2,
    0.08,
    0.2,
    0.3,
)  # inches: image, gap, score below, title above
INK, MUTED = "#1d2530", "#5b6673"


def top_patches(
    scores: Float[np.ndarray, "N"], coords: Int[np.ndarray, "N 2"], patch_size: float, count: int
) -> Int[np.ndarray, "n"]:
    """The `count` patches with the highest scores, best first; of overlapping patches only the best is taken."""
    coords = np.asarray(coords, np.float64)
    left = np.ones(len(scores), bool)
    chosen: list[int] = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        if len(chosen) == count:
            break
        if left[i]:
            chosen.append(int(i))
            left &= np.abs(coords - coords[i]).max(1) >= patch_size
    return np.array(chosen, np.int64)


def read_patches(
    path, coords: Int[np.ndarray, "n 2"], patch_size: int, pixels: int = PIXELS
) -> UInt8[np.ndarray, "n pixels pixels 3"]:
    """Read patches of a slide file as images, from the level that fits `pixels`, on the slide's background colour."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such slide file")
    corners = [(int(x), int(y)) for x, y in coords]
    reader = "pathflip_jax.data.readers.slide_pixels:patches"
    _, arrays = guarded.parse(reader, path, corners, int(patch_size), pixels, memory=guarded.SLIDE_MEMORY)
    return arrays["patches"]


def write_top_patches(folder: Path, grounding, image, count: int, pixels: int = PIXELS) -> list[dict]:
    """Write the top patches of every text, read from the slide file `image`, and a sheet of them with their scores.

    `folder` gets `sheet.png` and a folder of PNG files for each text. Returns text, file, x, y and score of each.
    """
    rows, found = [], []
    for number, text in enumerate(grounding.texts):
        scores = grounding.patch_scores[number]
        chosen = top_patches(scores, grounding.coords, grounding.patch_size, count)
        pictures = read_patches(image, grounding.coords[chosen], grounding.patch_size, pixels)
        place = folder / short_name(number + 1, text)
        place.mkdir(parents=True, exist_ok=True)
        for rank, (i, picture) in enumerate(zip(chosen, pictures, strict=True), 1):
            x, y = (int(v) for v in grounding.coords[i])
            path = place / f"{rank:02d}_{x}_{y}.png"
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            write_atomically(path, stream.getvalue())
            found.append({"text": text, "file": str(path), "x": x, "y": y, "score": float(scores[i])})
        rows.append((text, pictures, scores[chosen]))
    write_picture(folder / "sheet.png", draw_sheet(rows, grounding.slide_id), dpi=130)
    return found


def draw_sheet(rows: list[tuple[str, np.ndarray, np.ndarray]], heading: str) -> Figure:
    """Draw a sheet of images: for each text its patches, best first, with the score under each."""
    across = min(ACROSS, max(len(pictures) for _, pictures, _ in rows))
    lines = sum(-(-len(pictures) // across) for _, pictures, _ in rows)
    width = max(across, 4) * (TILE + GAP) + GAP
    height = TITLE * (1 + len(rows)) + (TILE + SCORE) * lines  # all sizes in inches
    figure = Figure(figsize=(width, height))
    figure.text(GAP / width, 1 - TITLE / 2 / height, heading, va="center", fontsize=8, color=MUTED)
    top = height - TITLE
    for text, pictures, scores in rows:
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
                axis = figure.add_axes((left / width, (top + SCORE) / height, TILE / width, TILE / height))
                axis.set_axis_off()
                axis.imshow(picture)
                centre = ((left + TILE / 2) / width, (top + SCORE / 2) / height)
                figure.text(*centre, f"{score:.3f}", ha="center", va="center", fontsize=7, color=MUTED)
    return figure
