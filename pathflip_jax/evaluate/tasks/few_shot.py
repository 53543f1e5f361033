"""Few-shot classification: what a handful of labelled slides makes of a frozen model, for any column of labels.

Subtypes and mutations are one task: a column of a table. Shots are drawn from the training split, several times; each
probe may choose its one setting on `val` and never on the slides that it is scored on. The same linear probe on the
mean of the raw patch features stands beside them: what a model adds to its patch encoder is the difference.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from pathflip_jax.data.storage.blocks import row_mean
from pathflip_jax.data.storage.failures import some
from pathflip_jax.data.texts.identity import SlideNames, fold
from pathflip_jax.data.texts.tables import read_rows
from pathflip_jax.data.texts.text import row_slides
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.protocols import Protocol
from pathflip_jax.evaluate.tasks import probes
from pathflip_jax.scores import statistics as scores

ALL = "all"
SHOTS = (1, 4, 16)
SEEDS = 5
ATTENTION, LINEAR, NEAREST, FLOOR = "attention MIL", "linear", "k-NN", "mean patch feature"
PROBES = (ATTENTION, LINEAR, NEAREST, FLOOR)


class Slides(NamedTuple):
    """The labelled slides of one split."""

    ids: list[str]
    patients: list[str]
    classes: Int[np.ndarray, "n"]


class Task(NamedTuple):
    """A column of labels as a task: its classes, the slides of each split, and how many have no label there."""

    column: str
    classes: list[str]
    train: Slides
    val: Slides | None
    test: Slides
    unlabelled: dict[str, int]
    shots: tuple[int | str, ...]
    seeds: int

    @property
    def draws(self) -> dict[tuple[int | str, int], Int[np.ndarray, "n"]]:
        """The training slides of every number of shots and seed."""
        return {(k, seed): draw_shots(self.train, k, seed) for k in self.shots for seed in range(self.seeds)}


class Bag(NamedTuple):
    """A slide as probes see it: its embedding, its regions', and the mean of its raw patch features."""

    slide: Float[np.ndarray, "D"]
    regions: Float[np.ndarray, "R D"]
    features: Float[np.ndarray, "D"]


def read_shots(given: Sequence[str | int]) -> tuple[int | str, ...]:
    """Numbers of shots, the fewest first, "all" last. Raises ValueError for anything else."""
    found: list[int | str] = []
    for shots in given or SHOTS:
        if str(shots) != ALL and not (str(shots).isdigit() and int(shots) > 0):
            raise ValueError(f"few-shot {shots!r}: expected numbers of slides per class, such as 1 4 16, or {ALL!r}")
        found.append(ALL if str(shots) == ALL else int(shots))
    return tuple(sorted(set(found), key=lambda shots: float("inf") if shots == ALL else shots))


def read_task(cohort: Cohort, column: str, table, shots: Sequence[str | int], seeds: int) -> Task:
    """A column of the slide table, or of a label table by slide_id or patient_id, as a task on the cohort's split.

    Slides without a label are left out and counted. Raises ValueError for a column that is not there, a label of the
    split that no training slide has, a single class, and where the split to score is the training split.
    """
    where = table if table is not None else "slide table"
    if cohort.split == "train":
        raise ValueError("few-shot draws its shots from split 'train': score another split, such as test")
    if seeds < 1:
        raise ValueError(f"few-shot seeds {seeds}: expected at least 1")
    label_of = _column(cohort, column) if table is None else _label_table(cohort, column, table)
    rows = {name: cohort.rows(name) for name in ("train", "val", cohort.split)}
    labels = {name: [label_of.get(row["slide_id"], "") for row in found] for name, found in rows.items()}
    known = sorted({label for label in labels["train"] if label}, key=_numbers_first)
    foreign = sorted({label for label in labels[cohort.split] if label} - set(known))
    if foreign:
        raise ValueError(
            f"{where}, column {column!r}: split {cohort.split!r} has slides of {some(foreign)}, of which the training "
            f"split has none; its classes are {some(known, 8) or '(none)'}. Split the table anew, or leave them out"
        )
    if len({fold(label) for label in known}) < len(known):
        raise ValueError(
            f"{where}, column {column!r}: labels that differ in spelling only: {some(known, 8)}; write one"
        )
    if len(known) < 2:
        listed = sum(row["split"] == "train" for row in cohort.table)
        raise ValueError(
            f"{where}, column {column!r}: the training split has {len(known)} classes; a probe needs two (the records "
            f"hold {len(rows['train'])} of its {listed} slides)"
        )
    if not any(labels[cohort.split]):
        raise ValueError(f"{where}, column {column!r}: no slide of split {cohort.split!r} has a label")
    parts = {name: _slides(rows[name], labels[name], known) for name in rows}
    val = parts["val"] if cohort.split != "val" and len(parts["val"].ids) else None
    if val and (lacking := [label for c, label in enumerate(known) if c not in val.classes]):
        cohort.warnings.append(f"few-shot, {column}: split 'val' has no slide of {some(lacking)} and chooses nothing")
        val = None
    unlabelled = {name: sum(not label for label in found) for name, found in labels.items()}
    lost = sum(unlabelled.values())
    if lost:
        cohort.warnings.append(f"few-shot, {column}: {lost} slides have no label and are left out")
    shots = read_shots(shots)
    fewest = Counter(parts["train"].classes.tolist())
    for k in shots:
        short = [known[c] for c in fewest if k != ALL and fewest[c] < k]
        if short:
            text = f"few-shot, {column}: {some(short)} have fewer than {k} training slides, and give all they have"
            cohort.warnings.append(text)
    return Task(column, known, parts["train"], val, parts[cohort.split], unlabelled, shots, seeds)


def _numbers_first(label: str) -> tuple:
    return (0, float(label), "") if label.replace(".", "", 1).isdigit() else (1, 0.0, label)


def _column(cohort: Cohort, column: str) -> dict[str, str]:
    if not any(column.lower() in row for row in cohort.table):
        raise ValueError(f"slide table: no column {column!r}; its columns are {', '.join(cohort.table[0])}")
    return {row["slide_id"]: row.get(column.lower(), "") for row in cohort.table}


def _label_table(cohort: Cohort, column: str, table) -> dict[str, str]:
    """The labels of a table by slide or patient. Raises ValueError for a slide or patient that has two."""
    names = SlideNames([row["slide_id"] for row in cohort.table], [row["patient_id"] for row in cohort.table])
    found: dict[str, str] = {}
    for row in read_rows(table):
        if column.lower() not in row.values:
            raise ValueError(f"{row.place}: no column {column!r}; its columns are {', '.join(row.values)}")
        slides, case = row_slides(row)
        label = row.text(column.lower())
        for slide in [
            slide for name in slides or (case,) for slide in names.find(name) or names.of_case(name) if label
        ]:
            if found.setdefault(slide, label) != label:
                raise ValueError(f"{row.place}: {column} of {slide} is {found[slide]!r} and {label!r}; keep one")
    if not found:
        ids = [row["slide_id"] for row in cohort.table]
        raise ValueError(f"{table}: labels no slide of the slide table, whose ids are such as {some(ids)}")
    return found


def _slides(rows: list[dict], labels: list[str], classes: list[str]) -> Slides:
    kept = [(row, classes.index(label)) for row, label in zip(rows, labels, strict=True) if label in classes]
    numbers = np.array([number for _, number in kept], int)
    return Slides([row["slide_id"] for row, _ in kept], [row["patient_id"] for row, _ in kept], numbers)


def draw_shots(train: Slides, shots: int | str, seed: int) -> Int[np.ndarray, "n"]:
    """The training slides of a draw: so many of each class, of different patients while there are any.

    The draws of a seed are nested (the 4 hold the 1), and the same for every model.
    """
    if shots == ALL:
        return np.arange(len(train.ids))
    rng = np.random.default_rng(seed)
    drawn = []
    for c in range(train.classes.max() + 1):
        order = rng.permutation(np.flatnonzero(train.classes == c))
        seen: Counter = Counter()
        nth = []  # is this the patient's first slide, or second, ...
        for i in order:
            nth.append(seen[train.patients[i]])
            seen[train.patients[i]] += 1
        drawn.append(order[np.argsort(nth, kind="stable")][:shots])
    return np.concatenate(drawn)


def needed(tasks: Sequence[Task]) -> list[str]:
    """The slides that any draw of any task, its val and its test take, each once."""
    ids: dict[str, None] = {}
    for task in tasks:
        ids |= dict.fromkeys(task.train.ids[i] for rows in task.draws.values() for i in rows)
        ids |= dict.fromkeys([*(task.val.ids if task.val else []), *task.test.ids])
    return list(ids)


def embed_bags(predictor, cohort: Cohort, ids: Sequence[str], name: str) -> dict[str, Bag]:
    """What tasks see of these slides, each encoded once however often it is named."""
    ids, means = list(dict.fromkeys(ids)), {}

    def slides():
        for slide_id in tqdm(ids, desc=f"{name}: slides", unit="slide", leave=False):
            slide = cohort.features(slide_id)
            means[slide_id] = row_mean(slide.features)
            yield slide

    found = predictor.encode_slides(slides())
    return {slide: Bag(one.slide, one.regions, means[slide]) for slide, one in zip(ids, found, strict=True)}


def run_probes(task: Task, bags: dict[str, Bag], how: Protocol, name: str) -> dict[tuple[str, int | str], np.ndarray]:
    """The belief of every probe at every number of shots about the test slides [seeds, n, C]."""
    beliefs = defaultdict(list)
    bar = tqdm(task.draws.items(), desc=f"{name}: {task.column}, shots", unit="draw", leave=False)
    for (k, seed), rows in bar:
        for probe in PROBES:
            beliefs[probe, k].append(_run_probe(probe, task, bags, how, rows, seed))
    return {key: np.stack(found) for key, found in beliefs.items()}


def _run_probe(probe: str, task: Task, bags: dict[str, Bag], how: Protocol, rows, seed: int) -> np.ndarray:
    part = {ATTENTION: "regions", FLOOR: "features"}.get(probe, "slide")

    def look(ids):
        found = [getattr(bags[slide], part) for slide in ids]
        return found if part == "regions" else np.stack(found)

    train = probes.Labelled(look([task.train.ids[i] for i in rows]), task.train.classes[rows])
    val = probes.Labelled(look(task.val.ids), task.val.classes) if task.val else None
    test, classes = look(task.test.ids), len(task.classes)
    if probe != ATTENTION:
        return (probes.nearest if probe == NEAREST else probes.linear)(train, val, test, classes)
    regions = [len(bag.regions) for bag in bags.values()]
    settings = {"seed": seed, "settings": how.attention, "room": (max(regions), sum(regions))}
    if not how.test_chooses:
        return probes.attention_mil(train, val, test, classes, **settings)
    _, beliefs = probes.attention_rounds(train, None, test, classes, **settings)
    once = np.ones((1, len(task.test.ids)))
    areas = [float(scores.classification(task.test.classes, b.argmax(1), b)["auc"](once)[0]) for b in beliefs]
    return beliefs[int(np.nanargmax(areas)) if np.isfinite(areas).any() else -1]


def score_task(task: Task, ours: Sequence[dict], theirs: Sequence[dict], how: Protocol, seed: int) -> dict:
    """The scores of each probe at each number of shots: mean over seeds and runs, spread, interval by patient.

    `ours` and `theirs` are what `run_probes` found for the runs and for those to compare to.
    """
    labels, names = task.test.classes, task.classes
    weights = scores.patient_weights(task.test.patients, seed=seed)
    majority = int(np.bincount(task.train.classes, minlength=len(names)).argmax())
    blind = scores.baselines(labels, len(names), majority)

    def statistics(runs, key):
        one = [scores.classification(labels, b.argmax(1), b) for run in runs for b in run[key]]
        return {metric: [s[metric] for s in one] for metric in (one[0] if one else {})}

    found = {}
    for probe in PROBES:
        found[probe] = {}
        for k in task.shots:
            mine, other, floor = (
                statistics(*x) for x in ((ours, (probe, k)), (theirs, (probe, k)), (ours, (FLOOR, k)))
            )
            entries = {
                metric: _entry(mine[metric], other.get(metric), floor[metric] if probe != FLOOR else None, weights)
                | {name: blind[name][metric] for name in blind}
                for metric in mine
            }
            first = ours[0][probe, k][0]
            per_class = scores.per_class(labels, first.argmax(1), first, names)
            found[probe][str(k)] = {"metrics": entries, "per_class": per_class}
    sizes = {"train": task.train, "val": task.val, "test": task.test}
    return {
        "label": task.column,
        "classes": {
            name: {side: int((part.classes == c).sum()) for side, part in sizes.items() if part is not None}
            for c, name in enumerate(names)
        },
        "unlabelled": task.unlabelled,
        "slides": len(task.test.ids),
        "patients": len(set(task.test.patients)),
        "shots": [str(k) for k in task.shots],
        "seeds": task.seeds,
        "chosen_on": "test" if how.test_chooses else "val" if task.val else "nothing",
        "majority_class": names[majority],
        "probes": found,
    }


def unbeaten(block: dict) -> list[str]:
    """A warning where probes at the most shots do not beat the linear probe on the mean patch feature.

    Not beaten: the interval of the gain in balanced accuracy is not above 0.
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
    statistic = scores.mean_over_runs(ours)
    alone = np.ones((1, weights.shape[1]))
    by_seed = [float(one(alone)[0]) for one in ours]
    entry = scores.interval(statistic, weights)._asdict() | {"by_seed": by_seed}
    entry["spread"] = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0
    if floor is not None:
        entry["gain"] = scores.interval(scores.difference(statistic, scores.mean_over_runs(floor)), weights)._asdict()
    if theirs:
        other = scores.mean_over_runs(theirs)
        entry["compared"] = scores.interval(other, weights)._asdict()
        entry["difference"] = scores.interval(scores.difference(statistic, other), weights)._asdict()
    return entry


def probe_rows(task: Task, names: Sequence, runs: Sequence[dict]) -> list[dict]:
    """Every prediction as a row of a table: run, probe, shots, seed, slide, and the belief in each class."""
    rows = []
    for name, beliefs in zip(names, runs, strict=True):
        for (probe, k), found in beliefs.items():
            for seed, belief in enumerate(found):
                for i, slide_id in enumerate(task.test.ids):
                    row = {"run": name, "probe": probe, "shots": k, "seed": seed, "slide_id": slide_id}
                    row |= {"patient_id": task.test.patients[i], "label": task.classes[task.test.classes[i]]}
                    row["predicted"] = task.classes[int(belief[i].argmax())]
                    shares = zip(task.classes, belief[i], strict=True)
                    rows.append(row | {f"p_{label}": round(float(p), 6) for label, p in shares})
    return rows
