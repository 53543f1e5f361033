"""Survival of patients by split: times, events and strata, the slides of each patient, and clinical columns.

Patients are the units of survival: all slides of a patient count together. Scores of few events are too uncertain to
say anything; the rules of thumb are those of Peduzzi et al. (J Clin Epidemiol 48, 1503, 1995: ten events per variable
of a Cox model) and Collins et al. (Stat Med 35, 214, 2016: 100 events to validate one).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.task import Setting
from pathflip_jax.evaluate.tasks import outcome_columns as columns
from pathflip_jax.evaluate.tasks.outcome_columns import Cell, Encoding, Tables
from pathflip_jax.scores.survival import Outcomes, import_survival

LEAST_EVENTS = 5  # in training and among the scored patients, each
EVENTS_PER_VARIABLE, EVENTS_TO_VALIDATE = 10, 100


class Side(NamedTuple):
    """The patients of one split with known survival: their names, slides, outcomes and strata by name."""

    patients: list[str]
    slides: list[list[str]]
    y: Outcomes
    strata: list[str]


class Survival(NamedTuple):
    """Patients of train, val and the scored split, with their clinical columns; `val` is None without one to choose on.

    `left_out` counts patients whose survival is unknown, by side.
    """

    unit: str | None
    train: Side
    val: Side | None
    test: Side
    clinical: Encoding | None
    left_out: dict[str, int]

    @property
    def slides(self) -> list[str]:
        """All slides, each once."""
        known = (side for side in (self.train, self.val, self.test) if side is not None)
        return [slide for side in known for slides in side.slides for slide in slides]


def check(spec: EvaluationSpec) -> None:
    """Raise ValueError for options of survival that lack another one, and for clinical columns without a use."""
    if (spec.survival_time is None) != (spec.survival_event is None):
        lacking = "survival-event" if spec.survival_event is None else "survival-time"
        raise ValueError(f"survival needs a column of times and one of events; pass {lacking} too")
    for name, given in (("survival-unit", spec.survival_unit), ("survival-strata", spec.survival_strata)):
        if given is not None and spec.survival_time is None:
            raise ValueError(f"{name} {given!r} belongs to survival; pass survival-time and survival-event too")
    if spec.clinical and spec.survival_time is None and not spec.regression:
        raise ValueError(
            "clinical columns are a baseline of survival and regression; pass survival-time and survival-event, or "
            "regression, too"
        )


def read_survival(setting: Setting) -> Survival:
    """The survival of the cohort's patients. Appends warnings about patients left out to those of the cohort.

    Raises ValueError for faulty times, events, strata and clinical columns, a patient of two splits, and too few
    events; ImportError if scikit-survival is not installed.
    """
    import_survival()
    spec, cohort = setting.spec, setting.cohort
    tables, groups = columns.read_tables(setting), columns.sides(setting, "survival")
    unit = columns.unit_of(spec.survival_time, spec.survival_unit)
    found, left_out = {}, {}
    for side, patients in groups.items():
        times, events = _outcomes(spec, tables, patients, unit)
        strata = _strata(spec, tables, {patient: patients[patient] for patient in times})
        left_out[side] = len(patients) - len(times)
        found[side] = (list(times), [patients[one] for one in times], times, events, strata)
    codes = {name: i for i, name in enumerate(sorted({name for side in found.values() for name in side[4]}))}
    built = {
        side: Side(
            names,
            slides,
            Outcomes(np.array([*times.values()], float), np.array([events[p] for p in names], bool),
                     np.array([codes[name] for name in strata], int)),
            strata,
        )
        for side, (names, slides, times, events, strata) in found.items()
    }  # fmt: skip
    _check_enough(spec, built, cohort.split)
    if lost := sum(left_out.values()):
        cohort.warnings.append(f"survival: {lost} patients without time and event are left out")
    val = None if cohort.split == "val" else built.get("val")
    if val is not None and not val.y.comparable.any():
        cohort.warnings.append("survival: split 'val' has no two patients that can be compared, so settings are fixed")
        val = None
    kept = {"train": built["train"], "test": built[cohort.split]} | ({"val": val} if val is not None else {})
    clinical = encode_clinical(spec.clinical or (), tables, {side: one.patients for side, one in kept.items()}, groups)
    return Survival(unit, kept["train"], val, kept["test"], clinical, left_out)


def _outcomes(spec: EvaluationSpec, tables: Tables, patients: Mapping[str, Sequence[str]], unit: str | None):
    """Time and event of each patient who has both. Raises ValueError for a patient who has one of them."""
    times, events = (
        columns.by_patient(column, tables.cells(column), patients, parse)
        for column, parse in ((spec.survival_time, columns.parse_time), (spec.survival_event, columns.parse_event))
    )
    for patient in (one for one in patients if (one in times) != (one in events)):
        known, lacking = (spec.survival_time, spec.survival_event)[:: 1 if patient in times else -1]
        cell = (times if patient in times else events)[patient][0]
        raise ValueError(
            f"{cell.place}: patient {patient} has {known} {cell.text!r}, but {lacking} is missing; expected both: "
            "complete the row, or empty both to leave the patient out"
        )
    columns.check_longest(spec.survival_time, list(times.values()), unit)
    return ({patient: value for patient, (_, value) in found.items()} for found in (times, events))


def _strata(spec: EvaluationSpec, tables: Tables, patients: Mapping[str, Sequence[str]]) -> list[str]:
    """The stratum of each patient; "" for all without strata. Raises ValueError for a patient without one."""
    if spec.survival_strata is None:
        return [""] * len(patients)
    column = spec.survival_strata
    found = columns.by_patient(column, tables.cells(column), patients, columns.parse_text)
    if lacking := [patient for patient in patients if patient not in found]:
        where = " and ".join(filter(None, [tables.labels, tables.slides]))
        raise ValueError(
            f"{where}: no {column} of {preview(lacking)} ({len(lacking)} patients); strata need one for every patient "
            "with a survival time: complete the column, or leave out --survival-strata"
        )
    return columns.merge_sites(column, [found[patient][1] for patient in patients])


def encode_clinical(
    names: Sequence[str],
    tables: Tables,
    units: Mapping[str, Sequence[str]],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
) -> Encoding | None:
    """Clinical columns of the patients in `units`, by side; None without columns."""
    if not names:
        return None
    slides = {patient: own for side in groups.values() for patient, own in side.items()}
    found: dict[str, dict[str, list[Cell]]] = {}
    for column in names:
        cells, found[column] = tables.cells(column), {}
        for side, patients in units.items():
            parse = columns.parse_same
            known = columns.by_patient(column, cells, {one: slides[one] for one in patients}, parse)
            nowhere = Cell(tables.labels or tables.slides, "")
            found[column][side] = [known[one][0] if one in known else nowhere for one in patients]
    return columns.encode(found)


def _check_enough(spec: EvaluationSpec, built: Mapping[str, Side], split: str) -> None:
    """Raise ValueError for sides of which nothing can be learnt or scored."""
    where, sides = f"column {spec.survival_event!r}", {"train": built.get("train"), split: built.get(split)}
    for side, one in sides.items():
        events = int(one.y.event.sum()) if one is not None else 0
        patients = len(one.patients) if one is not None else 0
        if events < LEAST_EVENTS:
            raise ValueError(
                f"{where}: split {side!r} has {events} events among {patients} patients with known survival; expected "
                f"at least {LEAST_EVENTS}: follow up longer, add patients, or make a new split (pathflip split)"
            )
        if len(np.unique(one.y.time)) == 1:
            raise ValueError(
                f"column {spec.survival_time!r}: all {patients} patients of split {side!r} have the time "
                f"{one.y.time[0]:g}; expected times that differ, name another column"
            )
    if spec.survival_strata is None:
        return
    names = set(sides["train"].strata) | set(sides[split].strata)
    if len(names) == 1:
        raise ValueError(
            f"column {spec.survival_strata!r}: all patients are of the stratum {names.pop()!r}; expected several: "
            "leave out --survival-strata"
        )
    for side, one in sides.items():
        if not one.y.comparable.any():
            raise ValueError(
                f"column {spec.survival_strata!r}: the {len(one.patients)} patients of split {side!r} are of "
                f"{len(set(one.strata))} strata, and no two of one stratum can be compared; expected several patients "
                "with events in a stratum: merge strata, or leave out --survival-strata"
            )


def warn_if_few(data: Survival) -> list[str]:
    """Warnings about too few events to say anything, and about patients who are alone in their stratum."""
    events, found = int(data.test.y.event.sum()), []
    if events < EVENTS_TO_VALIDATE:
        found.append(
            f"survival: {events} events among the scored patients are too few to say how well survival is predicted; "
            f"the rule of thumb is at least {EVENTS_TO_VALIDATE} (Collins et al., Stat Med 2016)"
        )
    learnt = int(data.train.y.event.sum())
    if data.clinical is not None and learnt < EVENTS_PER_VARIABLE * len(data.clinical.names):
        found.append(
            f"survival: {learnt} training events for {len(data.clinical.names)} clinical variables; the rule of thumb "
            f"is at least {EVENTS_PER_VARIABLE} for each (Peduzzi et al., J Clin Epidemiol 1995), so this baseline may "
            "be weaker than it could be"
        )
    pairs = data.test.y.comparable
    alone = ~(pairs | pairs.T).any(1)
    if alone.any() and data.test.strata[0]:
        found.append(f"survival: {alone.sum()} scored patients are compared with nobody in their stratum")
    return found


def mean_rows(slides: Sequence[Sequence[str]], rows: Mapping[str, Float[np.ndarray, "D"]]) -> Float[np.ndarray, "n D"]:
    """The mean over each patient's slides."""
    return np.stack([np.mean([rows[slide] for slide in own], axis=0) for own in slides])
