"""Highest-scoring patches of a text as images, for visual review of a map."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from pathflip_jax.data.readers import guarded
from pathflip_jax.grounding.canvas import SLIDE_PIXELS
from pathflip_jax.grounding.pictures import FAST_PNG, short_name, write_atomically

TOP = 8  # best patches of a text
PIXELS = 256  # pixels of an image's edge


class TopPatches(NamedTuple):
    """The patches of a slide that match a text best, the best one first: their indices, and their pictures."""

    indices: Int[np.ndarray, "n"]
    pictures: UInt8[np.ndarray, "n pixels pixels 3"]


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
    _, arrays = guarded.parse(
        f"{SLIDE_PIXELS}:patches", path, corners, int(patch_size), pixels, memory=guarded.SLIDE_MEMORY
    )
    return arrays["patches"]


def read_top_patches(grounding, image, count: int, pixels: int = PIXELS) -> list[TopPatches]:
    """Read the `count` best patches of every text from the slide file `image`."""
    found = []
    for scores in grounding.patch_scores:
        chosen = top_patches(scores, grounding.coords, grounding.patch_size, count)
        found.append(TopPatches(chosen, read_patches(image, grounding.coords[chosen], grounding.patch_size, pixels)))
    return found


def list_patches(folder: Path, grounding, best: Sequence[TopPatches]) -> list[dict]:
    """Text, file, x, y and score of every picture that `write_patches` writes into `folder`."""
    found = []
    for number, (text, scores, chosen) in enumerate(zip(grounding.texts, grounding.patch_scores, best, strict=True), 1):
        for rank, i in enumerate(chosen.indices, 1):
            x, y = (int(v) for v in grounding.coords[i])
            file = folder / short_name(number, text) / f"{rank:02d}_{x}_{y}.png"
            found.append({"text": text, "file": str(file), "x": x, "y": y, "score": float(scores[i])})
    return found


def write_patches(folder: Path, grounding, best: Sequence[TopPatches]) -> None:
    """Write the pictures of the best patches of every text, in a folder for each text."""
    pictures = (picture for found in best for picture in found.pictures)
    for patch, picture in zip(list_patches(folder, grounding, best), pictures, strict=True):
        path = Path(patch["file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG", **FAST_PNG)
        write_atomically(path, stream.getvalue())
