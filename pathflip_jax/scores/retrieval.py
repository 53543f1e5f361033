"""Slide <-> text retrieval: how high the right partner stands, with ties and cases counted honestly.

Row i of the queries belongs to row i of the gallery. Other rows of the same case are neither right nor wrong: a
report may well describe a patient's second slide too, so they leave that query's gallery, as they leave the
losses (DESIGN section 4). So do rows with the very caption of the query's row, which are no miss. Ties count as any
order of the tied rows, all equally likely: a model that gives one embedding to everything scores chance, not 100%.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from pathflip_jax.data.texts.captions import plain
from pathflip_jax.data.texts.identity import fold

TIE = 1e-6  # two cosines closer than this are equal: float32 noise decides no rank
RECALLS = (1, 5, 10)


class Ranks(NamedTuple):
    """For each query, how many others of its gallery stand above the right one, equal to it, and in all."""

    above: Int[np.ndarray, "n"]
    tied: Int[np.ndarray, "n"]
    others: Int[np.ndarray, "n"]


def normalise(x: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Rows of unit length; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def relate(cases: Sequence[str], captions: Sequence[str]) -> Int[np.ndarray, "n 2"]:
    """Numbers of each row's case and of its caption, as `plain` reads it: rows that share one are no rivals."""
    numbers: dict[tuple[str, str], int] = {}
    names = [*(("case", fold(case)) for case in cases), *(("caption", plain(caption)) for caption in captions)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names]).reshape(2, -1).T


def twins(related: Int[np.ndarray, "n 2"]) -> Bool[np.ndarray, "n"]:
    """Which rows have the caption of a row of another case."""
    captions, cases = np.unique(np.unique(related, axis=0)[:, 1], return_counts=True)
    return np.isin(related[:, 1], captions[cases > 1])


def rank(queries: Float[np.ndarray, "n D"], gallery: Float[np.ndarray, "n D"], related) -> Ranks:
    """Rank each query's partner in the gallery by cosine; rows that share a number or name with the query are masked.

    `related` has one or several for each row: its case, its captions.
    """
    cosine = normalise(queries) @ normalise(gallery).T  # [n, n]
    related = np.asarray(related).reshape(len(cosine), -1)
    other = np.ones(cosine.shape, bool)
    for one, another in itertools.product(related.T, related.T):
        other &= one[:, None] != another[None, :]
    margin = cosine - np.diagonal(cosine)[:, None]
    above = (other & (margin > TIE)).sum(1)
    tied = (other & (np.abs(margin) <= TIE)).sum(1)
    return Ranks(above, tied, other.sum(1))


def recall(ranks: Ranks, k: int, gallery: int | None = None) -> Float[np.ndarray, "n"]:
    """The probability per query that the right one is among the first k.

    With `gallery`, that of a gallery of this many rows, the right one and the rest drawn from the others: the exact
    mean over all such draws (hypergeometric), so there is no seed. A split too small for it keeps its own size.
    """
    above, tied, others = (np.asarray(x) for x in ranks)
    if gallery is None:
        return np.clip((k - above) / (tied + 1), 0.0, 1.0)
    drawn = np.minimum(gallery - 1, others)
    found = np.empty(len(above))
    for i in range(len(above)):  # over each place the right one can take among its ties
        better = above[i] + np.arange(tied[i] + 1)
        found[i] = stats.hypergeom.cdf(k - 1, others[i], better, drawn[i]).mean()
    return found


def expected_rank(ranks: Ranks, gallery: int | None = None) -> Float[np.ndarray, "n"]:
    """The expected rank of the right one (1 = first) over the orders of its ties, and over the draws of a gallery."""
    above, tied, others = (np.asarray(x, np.float64) for x in ranks)
    better = above + tied / 2
    if gallery is None:
        return 1 + better
    return 1 + better * np.minimum(gallery - 1, others) / np.maximum(others, 1)


def chance(ranks: Ranks, k: int, gallery: int | None = None) -> float:
    """R@k of a random order: k of the rows in the gallery, its mean over the queries."""
    sizes = gallery_sizes(ranks, gallery)
    return float(np.mean(np.minimum(k, sizes) / sizes))


def chance_median_rank(ranks: Ranks, gallery: int | None = None) -> float:
    """The median over the queries of the expected rank in a random order."""
    return float(np.median((gallery_sizes(ranks, gallery) + 1) / 2))


def gallery_sizes(ranks: Ranks, gallery: int | None = None) -> Int[np.ndarray, "n"]:
    """Rows in each query's gallery, the right one included."""
    sizes = np.asarray(ranks.others) + 1
    return sizes if gallery is None else np.minimum(sizes, gallery)
