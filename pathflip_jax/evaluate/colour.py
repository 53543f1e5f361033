"""Mean-colour baselines: the scores attainable from stain colour alone.

They use labels or outlines of the training slides, unlike zero-shot models. If they score well, the task can be
solved without morphology.
"""

import logging
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from data_prep.slide_files import find_slides
from pathflip_jax.data.readers import guarded

log = logging.getLogger(__name__)

WHOLE_LEVEL = 20_000_000  # a level with at most this many pixels is read in full
NEIGHBOURS = 25  # training patches per patch: enough to rank patches by the share of a concept among them


def slide_files(folder) -> dict[str, Path]:
    """The slide files below a folder that OpenSlide opens, by the ids that `pathflip prepare` gives them.

    Those that cannot be read here are logged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of slide files")
    try:
        files, failed = find_slides(folder)
    except FileNotFoundError:  # no slide files
        return {}
    for failure in failed:
        log.warning("slide file left out: %s", failure.error)
    return {name: path for name, path in files.items() if _format(path) is not None}


def _format(path: Path) -> str | None:
    try:
        return guarded.parse("pathflip_jax.data.readers.slide_pixels:detect", path)[0]["format"]
    except (ValueError, OSError):  # files that crash OpenSlide included
        return None


def _on_white(picture: np.ndarray) -> np.ndarray:
    """RGB with unscanned (transparent) areas as white glass."""
    picture = np.asarray(picture, np.float64)
    opacity = picture[..., 3:] / 255
    return picture[..., :3] * opacity + 255 * (1 - opacity)


def patch_colours(path, coords: Int[np.ndarray, "N 2"], patch_size: int) -> Float[np.ndarray, "N 3"]:
    """The mean RGB of each patch, from the lowest level at which a patch has at least 8 pixels."""
    corners = [(int(x), int(y)) for x, y in coords]
    reader = "pathflip_jax.data.readers.slide_pixels:colours"
    facts, arrays = guarded.parse(reader, path, corners, int(patch_size), WHOLE_LEVEL, memory=guarded.SLIDE_MEMORY)
    if "colours" in arrays:  # read patch by patch, because no level is small enough
        return arrays["colours"]
    scale, picture = facts["scale"], _on_white(arrays["picture"])
    size = picture.shape[1::-1]
    total = np.pad(picture.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    limit = np.array(size)
    low = np.clip(np.floor(coords / scale).astype(int), 0, limit - 1)
    high = np.clip(np.ceil((coords + patch_size) / scale).astype(int), low + 1, limit)
    (x0, y0), (x1, y1) = low.T, high.T
    area = ((x1 - x0) * (y1 - y0))[:, None]
    return (total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]) / area


def nearest_class(
    train: Float[np.ndarray, "m 3"], labels: Int[np.ndarray, "m"], test: Float[np.ndarray, "n 3"], classes: int
) -> Float[np.ndarray, "n C"]:
    """A score per class: 1 / (1 + distance to its nearest training slide)."""
    found = np.zeros((len(test), classes))
    for c in np.unique(labels):
        distance, _ = cKDTree(train[labels == c]).query(test)
        found[:, c] = 1 / (1 + distance)
    return found


def concept_shares(
    train: Float[np.ndarray, "m 3"], inside: np.ndarray, test: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "n C"]:
    """The share of each concept among the training patches nearest in colour; `inside` is [m, C] of 0 and 1."""
    k = min(NEIGHBOURS, len(train))
    _, near = cKDTree(train).query(test, k=k)
    return inside[near.reshape(len(test), k)].mean(1)
