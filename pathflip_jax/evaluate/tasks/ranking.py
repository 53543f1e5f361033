"""Bidirectional retrieval, used by `retrieval` for slides and by `regions` for regions."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from pathflip_jax.evaluate.figures import BASE, GRID, INK, MAIN, SECOND, make_axes, set_title
from pathflip_jax.evaluate.task import SHARE, Headline, Part, Predictions, make_headline
from pathflip_jax.evaluate.units import Evaluation, Units, group_rows
from pathflip_jax.scores import retrieval, statistics

GALLERY = 100


class Ranked(NamedTuple):
    """The ranks of a run in both directions.

    `with_duplicates` are those of galleries that keep rows of other patients with the query's exact caption; None if
    there are none.
    """

    ranks: dict[str, retrieval.Ranks]
    with_duplicates: dict[str, retrieval.Ranks] | None


class Queries(NamedTuple):
    """The kind of retrieved items, the names of the directions by key, and each query's slides and patient."""

    kind: str
    directions: Mapping[str, str]
    slides: Sequence[str]
    patients: Sequence[str]


def rank_both_ways(directions, images: np.ndarray, texts: np.ndarray, related: np.ndarray | None) -> Ranked:
    """Rank texts among images and images among texts; without `related` no row is masked."""
    there, back = directions

    def ranks(related) -> dict[str, retrieval.Ranks]:
        return {there: retrieval.rank(images, texts, related), back: retrieval.rank(texts, images, related)}

    if related is None:
        return Ranked(ranks(np.arange(len(images))), None)
    return Ranked(ranks(related), ranks(related[:, 0]) if retrieval.shared_captions(related).any() else None)


def score_ranking(key: str, queries: Queries, predictions: Predictions, seed: int) -> Part:
    """Results of a retrieval whose files and entry are named by `key`."""
    ours, theirs = ([one.ranks for one in side] for side in (predictions.ours, predictions.theirs))
    curves = {name: ours[0][direction] for direction, name in queries.directions.items()}
    return Part(
        score_ranks(ours, theirs, queries.patients, seed),
        {key: recall_curves(curves)},
        {key.replace("retrieval", "ranks"): rank_rows(predictions.runs, ours, queries)},
        warn_of_duplicates(queries, predictions.ours[0]),
    )


def score_ranks(
    ours: list[dict[str, retrieval.Ranks]],
    theirs: list[dict[str, retrieval.Ranks]],
    patients: Sequence[str],
    seed: int,
) -> dict:
    """R@k and median rank both ways, in the whole gallery and in galleries of 100.

    The bootstrap resamples the patients of the queries and leaves the gallery as it is.
    """
    weights = statistics.patient_weights(patients, seed=seed)
    found = {}
    for key in ours[0]:
        sides = [[ranks[key] for ranks in side] for side in (ours, theirs)]
        first = sides[0][0]
        sizes = retrieval.gallery_sizes(first)
        galleries = {"all": None} | ({f"of_{GALLERY}": GALLERY} if sizes.max() >= GALLERY else {})
        found[key] = {}
        for name, gallery in galleries.items():
            block = {"gallery": int(retrieval.gallery_sizes(first, gallery).max()), "queries": len(patients)}
            for k in retrieval.RECALLS:
                recalls = [[statistics.mean(retrieval.recall(r, k, gallery)) for r in side] for side in sides]
                block[f"R@{k}"] = statistics.over_runs(*recalls, weights, chance=retrieval.chance(first, k, gallery))
            medians = [[statistics.median(retrieval.expected_rank(r, gallery)) for r in side] for side in sides]
            chance = retrieval.chance_median_rank(first, gallery)
            block["median_rank"] = statistics.over_runs(*medians, weights, chance=chance)
            found[key][name] = block
    return found


def warn_of_duplicates(queries: Queries, ranked: Ranked) -> list[str]:
    """A warning with the effect on R@1 of excluding captions that several patients share; empty if there are none."""
    ranks, with_duplicates = ranked
    if with_duplicates is None:
        return []
    shared = int(max((with_duplicates[key].others - ranks[key].others > 0).sum() for key in ranks))
    changed = "; ".join(
        f"{name} {retrieval.recall(with_duplicates[key], 1).mean():.3f} without the rule, "
        f"{retrieval.recall(ranks[key], 1).mean():.3f} with it"
        for key, name in queries.directions.items()
    )
    return [
        f"{shared} of {len(queries.patients)} captions of {queries.kind} are word for word those of another patient "
        f"too; such rows are excluded from each other's gallery, because retrieving one is not an error. R@1: {changed}"
    ]


def rank_rows(names, found: list[dict[str, retrieval.Ranks]], queries: Queries) -> list[dict]:
    """One row per run and query: the rank of its match in both directions, and how many rank above it or tie."""
    rows = []
    for name, ranks in zip(names, found, strict=True):
        places = {key: retrieval.expected_rank(one) for key, one in ranks.items()}
        sizes = retrieval.gallery_sizes(next(iter(ranks.values())))
        for i, (slide_ids, patient) in enumerate(zip(queries.slides, queries.patients, strict=True)):
            row = {"run": name, "slide_ids": slide_ids, "patient_id": patient}
            row |= {f"{key}_rank": float(place[i]) for key, place in places.items()}
            row |= {f"{key}_above": int(one.above[i]) for key, one in ranks.items()}
            row |= {f"{key}_tied": int(one.tied[i]) for key, one in ranks.items()}
            rows.append(row | {"gallery": int(sizes[i])})
    return rows


def recall_curves(ranks: dict[str, retrieval.Ranks]) -> Figure:
    """R@k over k in the whole gallery, in each direction, with chance."""
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
    axis.set_ylabel("recall at k")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    set_title(axis, "Retrieval")
    return figure


def recall_headlines(title: str, found: dict) -> Iterator[Headline]:
    """R@1 in each direction."""
    for direction, galleries in found.items():
        block = galleries.get("of_100", galleries["all"])
        name = f"{title}, {direction.replace('_', ' ')}: R@1 of {block['gallery']}"
        yield make_headline(name, block["R@1"], kind=SHARE)


def published_recalls(key: str, found: dict) -> Iterator[tuple[tuple, dict]]:
    """R@k in each direction, for published figures."""
    for direction, blocks in found.items():
        yield (key, direction), {name: entry for name, entry in blocks["all"].items() if name.startswith("R@")}


def ranked_units(evaluation: Evaluation, table: str, direction: str) -> Units:
    """The queries of a table in one direction."""
    runs = list(group_rows(evaluation.rows(table), ("run",)).values())
    metrics: dict[str, list] = {f"R@{k}": [] for k in retrieval.RECALLS} | {"median_rank": []}
    for run in runs:
        above, tied, gallery = (
            np.array([int(row[name]) for row in run]) for name in (f"{direction}_above", f"{direction}_tied", "gallery")
        )
        ranks = retrieval.Ranks(above, tied, gallery - 1)
        for k in retrieval.RECALLS:
            metrics[f"R@{k}"].append(statistics.mean(retrieval.recall(ranks, k)))
        metrics["median_rank"].append(statistics.median(retrieval.expected_rank(ranks)))
    seen: Counter = Counter()
    keys = []
    for row in runs[0]:  # texts of one slide are distinguished by their order
        keys.append((row["slide_ids"], str(seen[row["slide_ids"]])))
        seen[row["slide_ids"]] += 1
    return Units(keys, [row["patient_id"] for row in runs[0]], [row["gallery"] for row in runs[0]], metrics)


def paired_rankings(key: str, directions, evaluation: Evaluation) -> dict:
    """The readers of a retrieval's queries, by direction."""
    table = key.replace("retrieval", "ranks")
    return {
        (key, direction): lambda direction=direction: ranked_units(evaluation, table, direction)
        for direction in directions
    }
