"""Few-shot classification: probes on the frozen model, trained on a few labelled slides, for any column of labels.

Training slides are drawn from the training split several times; a probe may choose its only setting on `val`, never on
the slides that are scored. The same linear probe on the mean of the raw patch features is the baseline: the difference
is the gain of the model over its patch encoder.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from tqdm import tqdm

from pathflip_jax.evaluate.embeddings import Bag
from pathflip_jax.evaluate.figures import BASE, GRID, INK, MAIN, SECOND, confusion, make_axes, set_title
from pathflip_jax.evaluate.protocols import Protocol
from pathflip_jax.evaluate.task import Headline, LoadedRun, Part, Predictions, Setting, Task, make_headline
from pathflip_jax.evaluate.tasks import probes
from pathflip_jax.evaluate.tasks.label_columns import LabelColumn, read_column
from pathflip_jax.evaluate.units import Evaluation, classified_columns, classified_units
from pathflip_jax.scores import statistics

KEY = "few_shot"
ATTENTION, LINEAR, NEAREST, FLOOR = "attention MIL", "linear", "k-NN", "mean patch feature"
PROBES = (ATTENTION, LINEAR, NEAREST, FLOOR)
Probabilities = dict[tuple[str, int | str], Float[np.ndarray, "seeds n C"]]  # by probe and number of shots


def needed_slides(columns: Sequence[LabelColumn]) -> list[str]:
    """The slides of all draws, of `val` and of `test`, each once."""
    ids: dict[str, None] = {}
    for column in columns:
        ids |= dict.fromkeys(column.train.ids[i] for rows in column.draws.values() for i in rows)
        ids |= dict.fromkeys([*(column.val.ids if column.val else []), *column.test.ids])
    return list(ids)


def run_probes(column: LabelColumn, bags: dict[str, Bag], protocol: Protocol, name: str) -> Probabilities:
    """The class probabilities of the test slides by every probe at every number of shots."""
    found = defaultdict(list)
    bar = tqdm(column.draws.items(), desc=f"{name}: {column.name}, shots", unit="draw", leave=False)
    for (k, seed), rows in bar:
        for probe in PROBES:
            found[probe, k].append(_run_probe(probe, column, bags, protocol, rows, seed))
    return {key: np.stack(probabilities) for key, probabilities in found.items()}


def _run_probe(probe: str, column: LabelColumn, bags: dict[str, Bag], protocol: Protocol, rows, seed) -> np.ndarray:
    part = {ATTENTION: "regions", FLOOR: "features"}.get(probe, "slide")

    def stack(ids):
        found = [getattr(bags[slide], part) for slide in ids]
        return found if part == "regions" else np.stack(found)

    train = probes.Labelled(stack([column.train.ids[i] for i in rows]), column.train.classes[rows])
    val = probes.Labelled(stack(column.val.ids), column.val.classes) if column.val else None
    test, classes = stack(column.test.ids), len(column.classes)
    if probe != ATTENTION:
        return (probes.nearest if probe == NEAREST else probes.linear)(train, val, test, classes)
    regions = [len(bag.regions) for bag in bags.values()]
    settings = {"seed": seed, "settings": protocol.attention, "room": (max(regions), sum(regions))}
    if not protocol.test_chooses:
        return probes.attention_mil(train, val, test, classes, **settings)
    _, rounds = probes.attention_rounds(train, None, test, classes, **settings)
    once = np.ones((1, len(column.test.ids)))
    areas = [float(statistics.classification(column.test.classes, b.argmax(1), b)["auc"](once)[0]) for b in rounds]
    return rounds[int(np.nanargmax(areas)) if np.isfinite(areas).any() else -1]


def score_column(
    column: LabelColumn, ours: Sequence[Probabilities], theirs: Sequence[Probabilities], protocol: Protocol, seed: int
) -> dict:
    """The metrics of each probe at each number of shots: mean over draws and runs, spread, interval by patient."""
    labels, names = column.test.classes, column.classes
    weights = statistics.patient_weights(column.test.patients, seed=seed)
    majority = int(np.bincount(column.train.classes, minlength=len(names)).argmax())
    blind = statistics.baselines(labels, len(names), majority)

    def metrics_of(runs, key):
        one = [statistics.classification(labels, b.argmax(1), b) for run in runs for b in run[key]]
        return {metric: [s[metric] for s in one] for metric in (one[0] if one else {})}

    found = {}
    for probe in PROBES:
        found[probe] = {}
        for k in column.shots:
            mine, other, floor = (
                metrics_of(*x) for x in ((ours, (probe, k)), (theirs, (probe, k)), (ours, (FLOOR, k)))
            )
            entries = {
                metric: _entry(mine[metric], other.get(metric), floor[metric] if probe != FLOOR else None, weights)
                | {name: blind[name][metric] for name in blind}
                for metric in mine
            }
            first = ours[0][probe, k][0]
            per_class = statistics.per_class(labels, first.argmax(1), first, names)
            found[probe][str(k)] = {"metrics": entries, "per_class": per_class}
    sizes = {"train": column.train, "val": column.val, "test": column.test}
    return {
        "label": column.name,
        "classes": {
            name: {side: int((part.classes == c).sum()) for side, part in sizes.items() if part is not None}
            for c, name in enumerate(names)
        },
        "unlabelled": column.unlabelled,
        "slides": len(column.test.ids),
        "patients": len(set(column.test.patients)),
        "shots": [str(k) for k in column.shots],
        "seeds": column.seeds,
        "chosen_on": "test" if protocol.test_chooses else "val" if column.val else "nothing",
        "majority_class": names[majority],
        "probes": found,
    }


def warn_if_not_above_features(block: dict) -> list[str]:
    """A warning if probes at the most shots do not exceed the linear probe on the mean patch feature.

    They exceed it if the interval of the gain in balanced accuracy lies above 0.
    """
    most = block["shots"][-1]
    entries = {probe: by_shots[most]["metrics"]["balanced_accuracy"] for probe, by_shots in block["probes"].items()}
    behind = [probe for probe, entry in entries.items() if "gain" in entry and not entry["gain"]["low"] > 0]
    if not behind:
        return []
    return [
        f"few-shot, {block['label']}, {most} shots: {', '.join(behind)} no better than a linear probe on the {FLOOR} "
        "(the 95% interval of the gain is not above 0)"
    ]


def _entry(ours: list, theirs: list | None, floor: list | None, weights) -> dict:
    statistic = statistics.mean_over_runs(ours)
    alone = np.ones((1, weights.shape[1]))
    by_seed = [float(one(alone)[0]) for one in ours]
    entry = statistics.interval(statistic, weights)._asdict() | {"by_seed": by_seed}
    entry["spread"] = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0
    if floor is not None:
        gain = statistics.difference(statistic, statistics.mean_over_runs(floor))
        entry["gain"] = statistics.interval(gain, weights)._asdict()
    return entry | statistics.paired(statistic, theirs or [], weights)


def probe_rows(column: LabelColumn, names: Sequence, runs: Sequence[Probabilities]) -> list[dict]:
    """One row per prediction: run, probe, shots, seed, slide, and the probability of each class."""
    rows = []
    for name, by_probe in zip(names, runs, strict=True):
        for (probe, k), found in by_probe.items():
            for seed, probabilities in enumerate(found):
                for i, slide_id in enumerate(column.test.ids):
                    row = {"run": name, "probe": probe, "shots": k, "seed": seed, "slide_id": slide_id}
                    row |= {"patient_id": column.test.patients[i], "label": column.classes[column.test.classes[i]]}
                    rows.append(row | classified_columns(column.classes, probabilities[i]))
    return rows


def draw_figures(block: dict, labels, probabilities: Probabilities) -> dict[str, Figure]:
    """Balanced accuracy over shots, and the confusion matrix of each probe's first draw at the most shots."""
    figure, (axis,) = make_axes(5.6, 3.4)
    places = np.arange(len(block["shots"]))
    colours = (MAIN, SECOND, "#5b4b9a", BASE)
    for shift, (colour, (probe, by_shots)) in enumerate(zip(colours, block["probes"].items(), strict=True)):
        entries = [by_shots[k]["metrics"]["balanced_accuracy"] for k in block["shots"]]
        x = places + 0.06 * (shift - 1.5)
        axis.vlines(x, [e["low"] for e in entries], [e["high"] for e in entries], color=colour, linewidth=1.5)
        axis.plot(x, [e["value"] for e in entries], color=colour, marker="o", markersize=5, linewidth=1.5, label=probe)
    axis.axhline(1 / len(block["classes"]), color=BASE, linewidth=1.5, linestyle=(0, (4, 2)), label="chance")
    axis.set_xticks(places, block["shots"])
    axis.set_ylim(0, 1.02)
    axis.grid(color=GRID, axis="y")
    axis.set_xlabel("training slides per class")
    axis.set_ylabel("balanced accuracy, 95% interval")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    set_title(axis, f"Few-shot: {block['label']}")
    found = {f"{block['figures']}_curve": figure}
    most = max(probabilities, key=lambda key: block["shots"].index(str(key[1])))[1]
    for number, probe in enumerate(block["probes"]):
        predicted = probabilities[probe, most][0].argmax(1)
        name = f"{block['figures']}_confusion_{number + 1}"
        found[name] = confusion(labels, predicted, list(block["classes"]), probe)
    return found


def _read(setting: Setting) -> list[LabelColumn]:
    spec = setting.spec
    return [read_column(setting.cohort, name, spec.label_table, spec.few_shot, spec.draws) for name in spec.labels]


def _embed(setting: Setting, columns: list[LabelColumn]) -> list[str]:
    # All slides of the split, so that the size of the compiled probe does not depend on the other tasks.
    return [*setting.cohort.slide_ids, *needed_slides(columns)]


def _predict(setting: Setting, columns: list[LabelColumn], run: LoadedRun) -> list[Probabilities]:
    return [run_probes(column, run.bags, setting.protocol, run.name) for column in columns]


def _score(setting: Setting, columns: list[LabelColumn], predictions: Predictions) -> Part:
    blocks, pictures, rows, warnings = [], {}, {}, []
    for number, column in enumerate(columns):
        ours, theirs = ([one[number] for one in side] for side in (predictions.ours, predictions.theirs))
        key = f"{KEY}_{number + 1}"
        blocks.append(score_column(column, ours, theirs, setting.protocol, setting.spec.seed) | {"figures": key})
        warnings += warn_if_not_above_features(blocks[-1])
        pictures |= draw_figures(blocks[-1], column.test.classes, ours[0])
        rows[key] = probe_rows(column, predictions.runs, ours)
    return Part(blocks, pictures, rows, warnings)


def _headlines(found: dict) -> Iterator[Headline]:
    for block in found[KEY]:
        shots = block["shots"][-1]
        entry, floor = (block["probes"][probe][shots]["metrics"]["balanced_accuracy"] for probe in (LINEAR, FLOOR))
        name = f"Few-shot: {block['label']}, linear probe, {shots} shots: balanced accuracy"
        yield make_headline(name, entry, {"raw features": floor["value"]})


def _published(found: dict) -> Iterator[tuple[tuple, dict]]:
    for block in found[KEY]:
        for probe, by_shots in block["probes"].items():
            for shots, one in by_shots.items():
                yield (KEY, block["label"], probe, shots), one["metrics"]


def _paired(evaluation: Evaluation) -> dict:
    found = {}
    for block in evaluation.scores[KEY]:
        for probe, by_shots in block["probes"].items():
            for shots in by_shots if probe != FLOOR else ():  # the floor is the same for all runs
                chosen = {"probe": probe, "shots": shots}
                found[KEY, block["label"], probe, shots] = lambda table=block["figures"], chosen=chosen: (
                    classified_units(evaluation, table, chosen)
                )
    return found


TASK = Task(
    KEY,
    title="few-shot",
    needs="few-shot",
    wanted=lambda spec: spec.few_shot is not None,
    read=_read,
    embed=_embed,
    predict=_predict,
    score=_score,
    headlines=_headlines,
    section=Path(__file__).with_name("few_shot.html"),
    published=_published,
    paired=_paired,
    heading=lambda parts: ", ".join(parts) + " shots",
)
