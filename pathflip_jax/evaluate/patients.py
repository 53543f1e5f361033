"""The patients and sites of a slide table, with several spellings or ids of one patient merged.

Patients are resolved over the whole table, because the barcode or case that links two slides may be in a row of another
split.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.identity import (
    barcode_patient,
    clean_id,
    connected,
    fold,
    fold_slide,
    is_missing,
    patient_keys,
    preferred_spelling,
)

Rows = Sequence[Mapping[str, str]]


class Patient(NamedTuple):
    """A patient: its name, and the spellings of its ids with the splits of their rows, in order."""

    name: str
    spellings: dict[str, list[str]]

    @property
    def ids(self) -> int:
        """The number of distinct ids among the spellings."""
        return len({fold(spelling) for spelling in self.spellings})

    @property
    def splits(self) -> list[str]:
        """The splits that hold slides of the patient."""
        return list(dict.fromkeys(split for found in self.spellings.values() for split in found))

    def __str__(self) -> str:
        """The name, or all spellings with their splits if there are several: "0045 (train), 45 (test)"."""
        if len(self.spellings) == 1:
            return self.name
        sides = {spelling: "/".join(filter(None, splits)) or "no split" for spelling, splits in self.spellings.items()}
        return preview((f"{spelling} ({splits})" for spelling, splits in sides.items()), 4)


def patients(rows: Rows) -> list[Patient]:
    """The patient of each row; a slide without a patient id is a patient of its own."""
    groups = connected([_keys(row) for row in rows])
    members: dict[int, list[Mapping[str, str]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    found = {group: _patient(own) for group, own in members.items()}
    return [found[group] for group in groups]


def name_patients(rows: Rows) -> list[dict[str, str]]:
    """The rows with one spelling of `patient_id` per patient."""
    return [dict(row) | {"patient_id": patient.name} for row, patient in zip(rows, patients(rows), strict=True)]


def name_sites(sites: Sequence[str]) -> list[str]:
    """The sites with one spelling each; "" stays."""
    spellings: dict[str, list[str]] = {}
    for site in sites:
        spellings.setdefault(fold(site), []).append(site)
    names = {site: preferred_spelling(found) for site, found in spellings.items()}
    return [names[fold(site)] if site else "" for site in sites]


def _keys(row: Mapping[str, str]) -> set:
    keys = patient_keys(row["slide_id"], row.get("case_id", ""), row["patient_id"])
    if is_missing(row["patient_id"]):  # the slide id stands in for the patient, possibly already in other rows
        keys.add(("patient", fold_slide(row["slide_id"])))
    return keys


def _patient(rows: Rows) -> Patient:
    spellings: dict[str, list[str]] = {}
    named = [row["patient_id"] for row in rows if not is_missing(row["patient_id"])]
    for row in rows:
        name = row["slide_id"] if is_missing(row["patient_id"]) else row["patient_id"]
        if not named or not is_missing(row["patient_id"]):
            splits = spellings.setdefault(name, [])
            splits += [row["split"]] if row["split"] not in splits else []
    texts = [
        clean_id(row[column]) for row in rows for column in ("slide_id", "patient_id", "case_id") if row.get(column)
    ]
    barcodes = list(filter(None, map(barcode_patient, texts)))
    several = len({fold(name) for name in spellings}) > 1
    name = barcodes[0] if several and barcodes else preferred_spelling(named or [row["slide_id"] for row in rows])
    return Patient(name, spellings)
