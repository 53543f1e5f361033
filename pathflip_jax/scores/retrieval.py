"""Ranks and recall of slide-text retrieval, with rules for ties and for rows of the same case.

Row i of the queries matches row i of the gallery. Other rows of the same case are excluded from that query's gallery,
as in the losses (DESIGN section 4), because a report may also describe the patient's other slides. Rows with exactly
the caption of the query's row are excluded too. Ties are scored as if ordered at random, so that a model with constant
embeddings scores at chance level.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from pathflip_jax.data.texts.captions import plain
from pathflip_jax.data.texts.identity import fold

TIE = 1e-6  # cosines that differ by less count as equal, so that float32 noise does not affect ranks
RECALLS = (1, 5, 10)


class Ranks(NamedTuple):
    """For each query, the numbers of other gallery rows ranked above the match, tied with it, and in total."""

    above: Int[np.ndarray, "n"]
    tied: Int[np.ndarray, "n"]
    others: Int[np.ndarray, "n"]


def normalise(x: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Rows scaled to unit length; zero rows stay zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def relate(cases: Sequence[str], captions: Sequence[str]) -> Int[np.ndarray, "n 2"]:
    """Ids of each row's case and of its normalised caption; rows that share one are excluded from ranking."""
    numbers: dict[tuple[str, str], int] = {}
    names = [*(("case", fold(case)) for case in cases), *(("caption", plain(caption)) for caption in captions)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names]).reshape(2, -1).T


def shared_captions(related: Int[np.ndarray, "n 2"]) -> Bool[np.ndarray, "n"]:
    """The rows whose caption is also that of a row of another case."""
    captions, cases = np.unique(np.unique(related, axis=0)[:, 1], return_counts=True)
    return np.isin(related[:, 1], captions[cases > 1])


def rank(queries: Float[np.ndarray, "n D"], gallery: Float[np.ndarray, "n D"], related) -> Ranks:
    """The rank of each query's match in the gallery by cosine; rows that share an id with the query are masked.

    `related` holds one or several ids for each row: its case, its caption.
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
    """The probability, per query, that the match is among the first k.

    With `gallery`, the exact mean over all galleries of that size that contain the match and a random draw of the
    others (hypergeometric, so no seed). A smaller split is scored at its own size.
    """
    above, tied, others = (np.asarray(x) for x in ranks)
    if gallery is None:
        return np.clip((k - above) / (tied + 1), 0.0, 1.0)
    drawn = np.minimum(gallery - 1, others)
    found = np.empty(len(above))
    for i in range(len(above)):  # mean over the possible positions of the match among its ties
        better = above[i] + np.arange(tied[i] + 1)
        found[i] = stats.hypergeom.cdf(k - 1, others[i], better, drawn[i]).mean()
    return found


def expected_rank(ranks: Ranks, gallery: int | None = None) -> Float[np.ndarray, "n"]:
    """The expected rank of the match (1 = first) over orders of ties and draws of a gallery."""
    above, tied, others = (np.asarray(x, np.float64) for x in ranks)
    better = above + tied / 2
    if gallery is None:
        return 1 + better
    return 1 + better * np.minimum(gallery - 1, others) / np.maximum(others, 1)


def chance(ranks: Ranks, k: int, gallery: int | None = None) -> float:
    """R@k of a random order: k over the size of the gallery, averaged over queries."""
    sizes = gallery_sizes(ranks, gallery)
    return float(np.mean(np.minimum(k, sizes) / sizes))


def chance_median_rank(ranks: Ranks, gallery: int | None = None) -> float:
    """The median over queries of the expected rank in a random order."""
    return float(np.median((gallery_sizes(ranks, gallery) + 1) / 2))


def chance_reciprocal_rank(ranks: Ranks) -> float:
    """Expected mean reciprocal rank of a random order of each query's candidates."""
    sizes = gallery_sizes(ranks)
    harmonic = np.cumsum(1 / np.arange(1, sizes.max() + 1))  # the sum of 1 / rank over all ranks
    return float(np.mean(harmonic[sizes - 1] / sizes))


def gallery_sizes(ranks: Ranks, gallery: int | None = None) -> Int[np.ndarray, "n"]:
    """The size of each query's gallery, including the match."""
    sizes = np.asarray(ranks.others) + 1
    return sizes if gallery is None else np.minimum(sizes, gallery)
