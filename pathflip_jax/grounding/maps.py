"""Maps of a text on a slide: ways to turn one trained model into a score per patch.

The model is trained to attend from a subcaption to regions (DESIGN section 3.6); a map wants patches. The methods
differ in how they get from one to the other:

- `region`: the text-region attention of a region, on all of its patches.
- `attention`: the same, refined inside the region by the patch cross-attention of the Region Q-Former.
- `patch`: every patch, with its neighbours in a small window, is a region of its own; the text attends to those.
- `similarity`: the same windows, but each alone before the text: the cosine of the text with the text-conditioned
  embedding of a slide that has only this region. It is the quantity that the region loss pulls (DESIGN section 4).
- `cosine`: the cosine of the text with the window's region embedding, past the text-region attention.
- `slide`: every window is a slide of its own; the cosine of the text with its slide embedding. The default: no
  neighbour leaks in through the region transformer, and it asks nothing of weights that only the region loss
  trains, so it is also the fair map of a model that was trained without that loss.

The first three are logarithms of attention over its uniform value: 0 means "no more than anywhere else".

The first two are what the model is trained to attend to, and say little of where: a region is many patches, and what
draws its attention is mostly not the text. On 24 held-out slides of the demo (windows of one patch, smoothed by half a
patch edge), ROC AUC of patches / how often the highest patch lies inside / Dice at a fixed threshold:

    slide       0.95  0.97  0.77        attention   0.65  0.34  0.36
    cosine      0.91  0.86  0.61        region      0.67  0.38  0.34
    similarity  0.89  0.79  0.53        no text     0.59  0.26  0.37
    patch       0.74  0.37  0.43

Windows of 3 x 3 patches score the neighbours of what a text names as high as itself: `slide` has 0.94, 0.73 and 0.71.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

METHODS = ("region", "attention", "patch", "similarity", "cosine", "slide")
DEFAULT_METHOD = "slide"
WINDOW = 1
CONTEXT = 256  # windows that go through the region transformer together


class Grounding(NamedTuple):
    """Scores of texts on one slide: per patch in the order of its `coords`, and per region of the run's cut.

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
    """A slide as `Predictor.prepare` encodes it before any text comes: where its patches lie, regions and windows.

    `windows` [N, D] is None for the methods that spread the score of a region over its patches; `shares` [N] is what
    method `attention` weighs those by.
    """

    slide_id: str
    coords: Int[np.ndarray, "N 2"]
    patch_size: int
    mpp: float
    width: int
    height: int
    method: str
    slots: Int[np.ndarray, "R S"]
    regions: Float[np.ndarray, "R D"]
    shares: Float[np.ndarray, "N"] | None
    windows: Float[np.ndarray, "N D"] | None


def subtract(grounding: Grounding, negatives: int) -> Grounding:
    """Take the last `negatives` texts out of a grounding, and the highest of their scores off the others'.

    A score is then a difference of cosines, or of logarithms of attention (a ratio), by method: above 0 a patch looks
    more like the text than like any of the negative ones. The highest and not the mean, so that a negative text counts
    where it applies and nowhere else.
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
    """The patches of each patch's window of `window` x `window` patch edges, itself first; -1 where there is none.

    By distance, not by grid, so that overlapping patches and patches off the grid have neighbours too.
    """
    if window == 1:
        return np.arange(len(coords), dtype=np.int32)[:, None]
    from scipy.spatial import cKDTree  # half the start of every command, and few ground

    tree = cKDTree(np.asarray(coords, np.float64))
    _, found = tree.query(coords, k=window**2, p=np.inf, distance_upper_bound=patch_size * window / 2 - 1e-6)
    return np.where(found == len(coords), -1, found).astype(np.int32)


def window_regions(encode, slots: Int[np.ndarray, "N S"], context: int = CONTEXT) -> Float[np.ndarray, "N D"]:
    """The region embedding of each window.

    `encode` takes patch indices [B, R, S] and gives a `SlideEncoding`. Windows that are encoded together stand far
    apart (every n-th), so that each pass sees the whole slide as its context, whatever its size.
    """
    passes = -(-len(slots) // context)
    length = -(-len(slots) // passes)
    padded = np.full((length * passes, slots.shape[1]), -1, np.int32)
    padded[: len(slots)] = slots
    strided = padded.reshape(length, passes, -1)  # window i is in pass i % passes
    regions = [encode(strided[None, :, i]).regions[0, :length] for i in range(passes)]
    return np.stack(regions, axis=1).reshape(length * passes, -1)[: len(slots)]


def window_slides(encode, slots: Int[np.ndarray, "N S"], context: int = CONTEXT) -> Float[np.ndarray, "N D"]:
    """The slide embedding of each window taken for a slide of one region; `context` windows share a call."""
    parts = [slots[first : first + context] for first in range(0, len(slots), context)]
    return np.concatenate([encode(part[:, None]).slide[: len(part)] for part in parts])


def window_means(regions: Float[np.ndarray, "N D"], slots: Int[np.ndarray, "N S"]) -> Float[np.ndarray, "N D"]:
    """The mean embedding of each window's patches, of a model that embeds patches: one of them is its own window."""
    if slots.shape[1] == 1:
        return regions[slots[:, 0]]
    there = (slots >= 0)[..., None]
    return (regions[slots] * there).sum(1) / there.sum(1)


def spread(region_values: Float[np.ndarray, "C R"], slots: Int[np.ndarray, "R S"], patches: int):
    """Give every patch the value of its region: [C, N]."""
    region, column = np.nonzero(slots >= 0)
    values = np.empty((len(region_values), patches), np.float32)
    values[:, slots[region, column]] = region_values[:, region]
    return values


def patch_weights(attention: Float[np.ndarray, "heads Q R S"], slots: Int[np.ndarray, "R S"], patches: int):
    """The Slide Q-Former's attention to each patch, mean of heads and queries, 1 = the slide's mean: [N]."""
    region, column = np.nonzero(slots >= 0)
    weights = np.zeros(patches, np.float32)
    weights[slots[region, column]] = attention.mean((0, 1))[region, column]
    return weights * patches / max(float(weights.sum()), 1e-12)


def patch_shares(attention: Float[np.ndarray, "heads Q R S"], slots: Int[np.ndarray, "R S"], patches: int):
    """The Region Q-Former's attention to each patch, over heads and queries, 1 = its region's mean: [N]."""
    region, column = np.nonzero(slots >= 0)
    valid = slots >= 0
    mean = attention.mean((0, 1))[: slots.shape[0], : slots.shape[1]] * valid  # [R, S]
    share = mean * valid.sum(1, keepdims=True) / np.maximum(mean.sum(1, keepdims=True), 1e-12)
    shares = np.empty(patches, np.float32)
    shares[slots[region, column]] = share[region, column]
    return shares


def log_ratio(weights: Float[np.ndarray, "C n"]) -> Float[np.ndarray, "C n"]:
    """Attention over its uniform value, as a logarithm."""
    return np.log(np.maximum(weights * weights.shape[-1], 1e-9))
