"""Survival: Cox probe and attention MIL on the frozen model, with the C-index by patient and Kaplan-Meier curves.

The slides of a patient count together: the mean of their embeddings for the Cox probe, all their regions for attention
MIL. Baselines are the Cox probe on the mean of the raw patch features, a Cox model of clinical columns, and permuted
outcomes. The cut between high and low risk is the median risk of the training patients.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.evaluate.task import Headline, LoadedRun, Part, Predictions, Setting, Task, make_headline
from pathflip_jax.evaluate.tasks import outcome_probes
from pathflip_jax.evaluate.tasks.outcome_probes import Survived
from pathflip_jax.evaluate.tasks.survival_data import Side, Survival, check, mean_rows, read_survival, warn_if_few
from pathflip_jax.evaluate.tasks.survival_figure import kaplan_meier_figure
from pathflip_jax.evaluate.units import Evaluation, Units, group_rows
from pathflip_jax.scores import statistics, survival
from pathflip_jax.scores.retrieval import normalise
from pathflip_jax.scores.statistics import Statistic
from pathflip_jax.scores.survival import Outcomes

KEY = "survival"
COX, ATTENTION, FLOOR, CLINICAL = "Cox", "attention MIL", "mean patch feature", "clinical columns"
PROBES = (COX, ATTENTION)
HIGH, LOW = "high risk", "low risk"
C_INDEX = "c_index"


class Risks(NamedTuple):
    """Predicted log hazards of the scored and of the training patients."""

    test: Float[np.ndarray, "n"]
    train: Float[np.ndarray, "m"]


def _predict(setting: Setting, data: Survival, run: LoadedRun) -> dict[str, Risks]:
    found = {}
    for probe, part in ((COX, "slide"), (FLOOR, "features")):
        rows = {slide: normalise(getattr(run.bags[slide], part)[None])[0] for slide in data.slides}
        found[probe] = _cox(data, {name: mean_rows(side.slides, rows) for name, side in _sides(data).items()})
    bags = {
        name: [np.concatenate([run.bags[slide].regions for slide in own]) for own in side.slides]
        for name, side in _sides(data).items()
    }
    sizes = [len(bag) for side in bags.values() for bag in side]
    train, val = (Survived(bags[name], side.y) if side else None for name, side in
                  (("train", data.train), ("val", data.val)))  # fmt: skip
    how = {"settings": setting.protocol.attention, "room": (max(sizes), sum(sizes) + sum(map(len, bags["train"])))}
    return found | {ATTENTION: Risks(*outcome_probes.attention_cox(train, val, [bags["test"], bags["train"]], **how))}


def _sides(data: Survival) -> dict[str, Side]:
    sides = {"train": data.train, "val": data.val, "test": data.test}
    return {name: side for name, side in sides.items() if side is not None}


def _cox(data: Survival, x: dict[str, Float[np.ndarray, "n D"]]) -> Risks:
    """The risks by a Cox model of these rows of train, val and test."""
    train, val = Survived(x["train"], data.train.y), Survived(x["val"], data.val.y) if data.val else None
    return Risks(*outcome_probes.cox(train, val, [x["test"], x["train"]]))


def _score(setting: Setting, data: Survival, predictions: Predictions) -> Part:
    spec, y = setting.spec, data.test.y
    weights = statistics.patient_weights(data.test.patients, seed=spec.seed)
    ours = {probe: [run[probe] for run in predictions.ours] for probe in (COX, ATTENTION, FLOOR)}
    theirs = {probe: [run[probe] for run in predictions.theirs] for probe in PROBES}
    if data.clinical is not None:
        ours[CLINICAL] = [_cox(data, data.clinical.x)]
    indices = {probe: [survival.concordance(y, one.test) for one in found] for probe, found in ours.items()}
    floors = {name: statistics.mean_over_runs(indices[name]) for name in (FLOOR, CLINICAL) if name in indices}
    probes, groups, pictures = {}, {}, {}
    for probe, found in ours.items():
        others = [survival.concordance(y, one.test) for one in theirs.get(probe, ())]
        probes[probe] = {C_INDEX: statistics.over_runs(indices[probe], others, weights, chance=0.5)}
        if probe in PROBES:
            probes[probe][C_INDEX]["gain"] = _gains(indices[probe], floors, weights)
            groups[probe] = score_groups(y, found[0])
            name = f"{KEY}_{PROBES.index(probe) + 1}"
            outcomes = {label: y.of(chosen) for label, chosen in _split(found[0]).items()}
            pictures[name] = kaplan_meier_figure(outcomes, groups[probe]["p"], data.unit, f"Survival: {probe}")
        chance = survival.permuted_concordance(y, [one.test for one in found], spec.seed)
        low, high = np.nanquantile(chance, [0.025, 0.975])
        probes[probe][C_INDEX]["permuted"] = {"low": float(low), "high": float(high)}
    block = {
        "time": spec.survival_time,
        "event": spec.survival_event,
        "unit": data.unit,
        "strata": spec.survival_strata,
        "clinical": data.clinical.names if data.clinical else [],
        "sides": {name: _describe(side) for name, side in _sides(data).items()},
        "left_out": data.left_out,
        "chosen_on": "val" if data.val else "nothing",
        "probes": probes,
        "groups": groups,
    }
    rows = patient_rows(data, predictions.runs, ours)
    return Part(block, pictures, {KEY: rows}, [*warn_if_few(data), *warn_if_not_above(probes)])


def _gains(ours: Sequence[Statistic], floors: dict[str, Statistic], weights) -> dict[str, dict]:
    """The paired differences to the baselines."""
    mean = statistics.mean_over_runs(ours)
    changes = {name: statistics.difference(mean, other) for name, other in floors.items()}
    return {name: statistics.interval(change, weights)._asdict() for name, change in changes.items()}


def _describe(side: Side) -> dict:
    return {
        "patients": len(side.patients),
        "slides": sum(map(len, side.slides)),
        "events": int(side.y.event.sum()),
        "strata": len(set(side.strata)),
    }


def _split(risks: Risks) -> dict[str, np.ndarray]:
    """The scored patients of high and of low risk, by the median risk of training; the median itself is low."""
    high = risks.test > np.median(risks.train)
    return {HIGH: high, LOW: ~high}


def score_groups(outcomes: Outcomes, risks: Risks) -> dict:
    """The patients, events and median survival of high and low risk, and the p-value of the log-rank test."""
    found: dict = {"cut": float(np.median(risks.train)), "p": survival.log_rank(outcomes, _split(risks)[HIGH])}
    for name, chosen in _split(risks).items():
        own = outcomes.of(chosen)
        median = survival.kaplan_meier(own).median if chosen.any() else float("nan")
        found[name] = {"patients": int(chosen.sum()), "events": int(own.event.sum()), "median": median}
    return found


def warn_if_not_above(probes: dict) -> list[str]:
    """Warnings about probes that are within the range of chance or no better than a baseline."""
    found = []
    for probe in PROBES:
        entry = probes[probe][C_INDEX]
        if not entry["value"] > entry["permuted"]["high"]:
            found.append(
                f"survival: the C-index of {probe}, {entry['value']:.2f}, is within the 95% range of permuted "
                f"outcomes ({entry['permuted']['low']:.2f} to {entry['permuted']['high']:.2f}): it may be chance"
            )
        if behind := [name for name, gain in entry["gain"].items() if not gain["low"] > 0]:
            found.append(
                f"survival: {probe} no better than a Cox model of {' and of '.join(behind)} (the 95% interval of the "
                "gain is not above 0)"
            )
    return found


def patient_rows(data: Survival, names: Sequence, risks: dict[str, Sequence[Risks]]) -> list[dict]:
    """One row per run, probe and patient: survival, predicted risk and its group."""
    found = []
    for probe, runs in risks.items():
        for name, one in zip(names if probe in PROBES else ("",), runs, strict=False):
            high = _split(one)[HIGH]
            for i, patient in enumerate(data.test.patients):
                row = {"run": name, "probe": probe, "patient_id": patient, "slides": len(data.test.slides[i])}
                row |= {"time": float(data.test.y.time[i]), "event": int(data.test.y.event[i])}
                row |= {"stratum": data.test.strata[i], "risk": float(one.test[i])}
                found.append(row | {"group": HIGH if high[i] else LOW})
    return found


def _headlines(found: dict) -> Iterator[Headline]:
    block = found[KEY]
    others = {"raw features": FLOOR, "clinical columns": CLINICAL}
    values = {shown: block["probes"][name][C_INDEX]["value"] for shown, name in others.items()
              if name in block["probes"]}  # fmt: skip
    for probe in PROBES:
        yield make_headline(f"Survival: {block['time']}, {probe}: C-index", block["probes"][probe][C_INDEX], values)


def _published(found: dict) -> Iterator[tuple[tuple, dict]]:
    for probe, one in found[KEY]["probes"].items():
        yield (KEY, found[KEY]["time"], probe), one


def _units(evaluation: Evaluation, probe: str) -> Units:
    """The patients of a probe as `pathflip compare` pairs them."""
    rows = [row for row in evaluation.rows(KEY) if row["probe"] == probe]
    runs = [sorted(run, key=lambda row: row["patient_id"]) for run in group_rows(rows, ("run",)).values()]
    first = runs[0]
    outcomes = Outcomes(
        np.array([float(row["time"]) for row in first]),
        np.array([row["event"] == "1" for row in first]),
        np.unique([row["stratum"] for row in first], return_inverse=True)[1],
    )
    indices = [survival.concordance(outcomes, np.array([float(row["risk"]) for row in run])) for run in runs]
    patients = [row["patient_id"] for row in first]
    truth = [" ".join((row["time"], row["event"], row["stratum"])) for row in first]
    return Units([(patient,) for patient in patients], patients, truth, {C_INDEX: indices})


TASK = Task(
    KEY,
    title="survival",
    needs="survival-time with survival-event",
    wanted=lambda spec: spec.survival_time is not None,
    check=check,
    read=read_survival,
    embed=lambda setting, data: data.slides,
    predict=_predict,
    score=_score,
    headlines=_headlines,
    section=Path(__file__).with_name("survival.html"),
    published=_published,
    paired=lambda evaluation: {
        (KEY, evaluation.scores[KEY]["time"], probe): partial(_units, evaluation, probe) for probe in PROBES
    },
    metric_names={C_INDEX: "C-index"},
)
