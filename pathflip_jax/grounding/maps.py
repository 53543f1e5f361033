"""Grounding maps of a text on a slide: patch scores, and the arithmetic that the methods (`methods.py`) share."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

WINDOW = 1
SMOOTH = 0.5  # standard deviation of the Gaussian that smooths maps, in patch edges
CONTEXT = 256  # windows per pass of the region transformer


class Grounding(NamedTuple):
    """Scores of texts on one slide: per patch in the order of its `coords`, and per region of the run's region cut.

    With `negative` texts, the highest of their scores has been subtracted (`subtract`).
    """

    slide_id: str
    texts: tuple[str, ...]
    patch_scores: Float[np.ndarray, "C N"]
    region_scores: Float[np.ndarray, "C R"]
    coords: Int[np.ndarray, "N 2"]
    patch_size: int
    mpp: float
    width: int
    height: int
    method: str
    negative: tuple[str, ...] = ()


class Prepared(NamedTuple):
    """Slide encoded independently of texts: its patch positions, its regions, and the method's precomputed state."""

    slide_id: str
    coords: Int[np.ndarray, "N 2"]
    patch_size: int
    mpp: float
    width: int
    height: int
    method: str
    slots: Int[np.ndarray, "R S"]
    regions: Float[np.ndarray, "R D"]
    state: Float[np.ndarray, "N ..."] | None


def subtract(grounding: Grounding, negatives: int) -> Grounding:
    """Remove the last `negatives` texts from a grounding, and subtract the highest of their scores from the others'.

    A score is then a difference of cosines, or of logarithms of attention (a ratio), by method: above 0 a patch is more
    similar to the text than to any of the negative ones. The highest score is used rather than the mean, so that a
    negative text has an effect only where it matches.
    """
    if not negatives:
        return grounding
    kept = len(grounding.texts) - negatives
    patches, regions = grounding.patch_scores, grounding.region_scores
    return grounding._replace(
        texts=grounding.texts[:kept],
        negative=grounding.texts[kept:],
        patch_scores=patches[:kept] - patches[kept:].max(0),
        region_scores=regions[:kept] - regions[kept:].max(0),
    )


def window_slots(coords: Int[np.ndarray, "N 2"], patch_size: float, window: int) -> Int[np.ndarray, "N S"]:
    """Patches in each patch's window of `window` x `window` patch edges, itself first; padded with -1.

    By distance rather than grid position, so that overlapping and off-grid patches have neighbours too.
    """
    if window == 1:
        return np.arange(len(coords), dtype=np.int32)[:, None]
    from scipy.spatial import cKDTree  # importing it takes half the start-up time of every command, and few need it

    tree = cKDTree(np.asarray(coords, np.float64))
    _, found = tree.query(coords, k=window**2, p=np.inf, distance_upper_bound=patch_size * window / 2 - 1e-6)
    return np.where(found == len(coords), -1, found).astype(np.int32)


def window_regions(encode, slots: Int[np.ndarray, "N S"], context: int = CONTEXT) -> Float[np.ndarray, "N D"]:
    """Region embedding of each window.

    `encode` takes patch indices [B, R, S] and returns a `SlideEncoding`. Windows encoded together are far apart (every
    n-th), so that each pass has the whole slide as its context, whatever its size.
    """
    passes = -(-len(slots) // context)
    length = -(-len(slots) // passes)
    strided = _padded(slots, length * passes).reshape(length, passes, -1)  # window i is in pass i % passes
    regions = [encode(strided[None, :, i]).regions[0, :length] for i in range(passes)]
    return np.stack(regions, axis=1).reshape(length * passes, -1)[: len(slots)]


def window_slides(encode, slots: Int[np.ndarray, "N S"], context: int = CONTEXT) -> Float[np.ndarray, "N D"]:
    """Slide embedding of each window taken as a slide of one region; at most `context` windows share a call.

    All calls have one size, so that they share a program.
    """
    passes = -(-len(slots) // context)
    padded = _padded(slots, passes * -(-len(slots) // passes))
    return np.concatenate([encode(part[:, None]).slide[: len(part)] for part in np.split(padded, passes)])[: len(slots)]


def _padded(slots: Int[np.ndarray, "N S"], length: int) -> Int[np.ndarray, "length S"]:
    """Windows with empty ones added, up to `length`."""
    return np.pad(slots, ((0, length - len(slots)), (0, 0)), constant_values=-1)


def window_means(regions: Float[np.ndarray, "N D"], slots: Int[np.ndarray, "N S"]) -> Float[np.ndarray, "N D"]:
    """Mean embedding of each window's patches, for a model that embeds patches: a single patch is its own window."""
    if slots.shape[1] == 1:
        return regions[slots[:, 0]]
    valid = (slots >= 0)[..., None]
    return (regions[slots] * valid).sum(1) / valid.sum(1)


def copy_to_patches(region_values: Float[np.ndarray, "C R"], slots: Int[np.ndarray, "R S"], patches: int):
    """Copy the value of each region to its patches: [C, N]."""
    region, column = np.nonzero(slots >= 0)
    values = np.empty((len(region_values), patches), np.float32)
    values[:, slots[region, column]] = region_values[:, region]
    return values


def patch_weights(attention: Float[np.ndarray, "heads Q R S"], slots: Int[np.ndarray, "R S"], patches: int):
    """Slide Q-Former attention to each patch, mean over heads and queries, 1 = the slide's mean: [N]."""
    region, column = np.nonzero(slots >= 0)
    weights = np.zeros(patches, np.float32)
    weights[slots[region, column]] = attention.mean((0, 1))[region, column]
    return weights * patches / max(float(weights.sum()), 1e-12)


def patch_shares(attention: Float[np.ndarray, "heads Q R S"], slots: Int[np.ndarray, "R S"], patches: int):
    """Region Q-Former attention to each patch, over heads and queries, 1 = its region's mean: [N]."""
    region, column = np.nonzero(slots >= 0)
    valid = slots >= 0
    mean = attention.mean((0, 1))[: slots.shape[0], : slots.shape[1]] * valid  # [R, S]
    share = mean * valid.sum(1, keepdims=True) / np.maximum(mean.sum(1, keepdims=True), 1e-12)
    shares = np.empty(patches, np.float32)
    shares[slots[region, column]] = share[region, column]
    return shares


def log_ratio(weights: Float[np.ndarray, "C n"]) -> Float[np.ndarray, "C n"]:
    """Logarithm of attention over its uniform value."""
    return np.log(np.maximum(weights * weights.shape[-1], 1e-9))
