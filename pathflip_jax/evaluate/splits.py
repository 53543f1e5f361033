"""Splits that can be believed: made by patient, and examined for what makes a score too good.

A patient on both sides lets a model recognise the patient; a site on both sides, the scanner and the stain (Howard et
al., Nature Communications 2021); normal tissue under a tumor label is a wrong label. Published splits have all three.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pathflip_jax.data.tables import read_rows, write_csv
from pathflip_jax.data.text import slide_row, some

SIDES = ("train", "val", "test")
SHARES = (0.7, 0.1, 0.2)
LABEL_WEIGHT = 50  # against sites: labels that are uneven by 2% of a share outweigh a site that is all in one part
NO_SIDE = "slides on no side"
_BARCODE = re.compile(r"TCGA-(\w{2})-\w{4}(?:-(\d{2}))?(?!\d)", re.IGNORECASE)
_NORMAL_LABEL = re.compile(r"normal|benign|healthy|non[-_ ]?(?:tumou?r|neoplastic)|negative", re.IGNORECASE)
# Second half of the TCGA code table of sample types: 01 to 09 are tumors, 10 to 19 normal tissues.
NORMAL_TYPES = {"10": "blood", "11": "solid tissue", "12": "buccal cells", "13": "EBV cells", "14": "bone marrow"}


class Finding(NamedTuple):
    """What the check of a split found, a fault or something to know: of which patients, slides, sites or labels."""

    kind: str
    fault: bool
    text: str
    of: list[str]


class Check(NamedTuple):
    """A split examined: its sides, its sites (where they are known) and what was found."""

    sides: dict[str, dict]
    sites: list[dict]
    findings: list[Finding]

    @property
    def faults(self) -> list[Finding]:
        """What makes a score of this split wrong, or the split impossible to score."""
        return [finding for finding in self.findings if finding.fault]

    def as_json(self) -> dict:
        """The check as JSON holds it."""
        findings = [finding._asdict() for finding in self.findings]
        return {"faulty": bool(self.faults), "sides": self.sides, "sites": self.sites, "findings": findings}


def read_split(tables: Sequence[str]) -> list[dict[str, str]]:
    """The rows of one slide table, or of several as one; "test=FILE" puts the rows of a file on that side.

    A slide listed twice stays twice: that is for the check to find. Raises ValueError as `slide_row`.
    """
    found = []
    for table in tables:
        side, _, path = str(table).rpartition("=")
        if side and side not in SIDES:
            raise ValueError(f"{table}: {side!r} before the file is no side of a split; expected {', '.join(SIDES)}")
        rows = [slide_row(row) for row in read_rows(path)]
        found += [row | {"split": side} for row in rows] if side else rows
    return found


def patient_of(row: Mapping[str, str]) -> str:
    """The patient of a row of the slide table; a slide with no patient named is one by itself."""
    return row["patient_id"] or row["slide_id"]


def site_of(row: Mapping[str, str]) -> str:
    """The site that a slide comes from: the column `site`, else the tissue source site of a TCGA barcode, else ""."""
    barcode = _BARCODE.match(row["slide_id"])
    return row.get("site") or (barcode.group(1).upper() if barcode else "")


def sample_type(slide_id: str) -> str:
    """The two digits of the TCGA sample type ("11" is normal solid tissue), "" where the id has none."""
    barcode = _BARCODE.match(slide_id)
    return (barcode.group(2) or "") if barcode else ""


def check_split(rows: Sequence[Mapping[str, str]]) -> Check:
    """Examine a split: patients, slides and labels on its sides, TCGA sample types, and the sites it shares."""
    used = [row for row in rows if row["split"]]
    sides = {side: _side([row for row in used if row["split"] == side]) for side in SIDES}
    sides = {side: found for side, found in sides.items() if found["slides"]}
    sites = _sites(used)
    findings = [*_shared_patients(used), *_listed_twice(rows), *_normal_tissue(used), *_lacking_labels(sides)]
    shared = [site for site in sites if len(site["slides"]) > 1]
    if shared:
        count = sum(sum(site["slides"].values()) for site in shared)
        text = (
            f"{len(shared)} of {len(sites)} sites are on more than one side, with {count} of {len(used)} slides: a "
            "model that knows the site's stain and scanner is not found out"
        )
        findings.append(Finding("shared sites", False, text, [site["site"] for site in shared]))
    if 0 < len(used) < len(rows):
        out = [row["slide_id"] for row in rows if not row["split"]]
        text = f"{len(out)} of {len(rows)} slides are on no side: {some(out)}"
        findings.append(Finding(NO_SIDE, False, text, out))
    return Check(sides, sites, findings)


def _side(rows: list[Mapping[str, str]]) -> dict:
    labels = Counter(row["label"] for row in rows if row["label"])
    patients = {patient_of(row) for row in rows}
    return {"slides": len(rows), "patients": len(patients), "labels": dict(sorted(labels.items()))}


def _sites(rows: Sequence[Mapping[str, str]]) -> list[dict]:
    """Every known site with its slides by side and its labels, the largest first."""
    found: dict[str, dict[str, Counter]] = {}
    for row in rows:
        if site := site_of(row):
            entry = found.setdefault(site, {"slides": Counter(), "labels": Counter()})
            entry["slides"][row["split"]] += 1
            entry["labels"][row["label"] or "(none)"] += 1
    order = sorted(found, key=lambda site: (-found[site]["slides"].total(), site))
    return [
        {
            "site": site,
            "slides": {side: found[site]["slides"][side] for side in SIDES if found[site]["slides"][side]},
            "labels": dict(sorted(found[site]["labels"].items())),
        }
        for site in order
    ]


def _shared_patients(rows) -> list[Finding]:
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(patient_of(row), set()).add(row["split"])
    shared = sorted(patient for patient, found in sides.items() if len(found) > 1)
    if not shared:
        return []
    text = f"{len(shared)} patients have slides on more than one side ({some(shared)}): scores of it are too good"
    return [Finding("shared patients", True, text, shared)]


def _listed_twice(rows) -> list[Finding]:
    twice = sorted(slide for slide, count in Counter(row["slide_id"] for row in rows).items() if count > 1)
    if not twice:
        return []
    return [Finding("slides listed twice", True, f"{len(twice)} slides are listed twice ({some(twice)})", twice)]


def _normal_tissue(rows) -> list[Finding]:
    wrong = [
        row["slide_id"]
        for row in rows
        if sample_type(row["slide_id"]) in NORMAL_TYPES and row["label"] and not _NORMAL_LABEL.search(row["label"])
    ]
    if not wrong:
        return []
    kinds = ", ".join(sorted({f"{sample_type(slide)} {NORMAL_TYPES[sample_type(slide)]}" for slide in wrong}))
    text = (
        f"{len(wrong)} slides of normal tissue (TCGA sample type {kinds}) have the label of a tumor ({some(wrong)}): "
        "take them out"
    )
    return [Finding("normal tissue under a tumor label", True, text, wrong)]


def _lacking_labels(sides: Mapping[str, dict]) -> list[Finding]:
    found = []
    labels = sorted({label for side in sides.values() for label in side["labels"]})
    for name, side in sides.items():
        lacking = [label for label in labels if label not in side["labels"]]
        if lacking and side["labels"]:  # a side with no label at all is not labelled, and scores nothing by label
            text = f"split {name!r} has no slide of {some(lacking)}, which others have"
            found.append(Finding("label lacking", True, text, lacking))
    return found


def make_split(
    rows: Sequence[Mapping[str, str]], shares: Sequence[float], seed: int, by_site: bool = False
) -> list[int]:
    """The part (0 to len(shares) - 1) of each row, so that no patient is in two of them; `by_site`: no site either.

    Labels have the same shares in all parts, and so have sites, as far as whole patients (or whole sites) allow. The
    order in which they are dealt out is drawn by the seed.
    """
    shares = np.asarray(shares, float) / np.sum(shares)
    groups = _groups(rows, [patient_of, site_of] if by_site else [patient_of])
    members: dict[int, list[Mapping[str, str]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    order = np.random.default_rng(seed).permutation(sorted(members)).tolist()
    part = _deal(sorted(order, key=lambda group: -len(members[group])), members, shares)
    return [part[group] for group in groups]


def _deal(order: list[int], members: Mapping[int, list], shares: np.ndarray) -> dict[int, int]:
    """Give each group, the largest first, to the part that is least full of its labels and of its labels' sites.

    A part is full of a label when it holds its share of that label's slides. Labels count so much more that sites
    decide where labels are even to some percent; small groups, the last, even out what large ones left.
    """

    counts = {group: Counter(kind for row in rows for kind in _kinds(row)) for group, rows in members.items()}
    total = sum(counts.values(), Counter())
    given = {kind: np.zeros(len(shares)) for kind in total}
    part = {}
    for group in order:
        full = np.zeros(len(shares))
        for (label, site), count in counts[group].items():
            # With half of the group itself, a part is chosen that it does not overfill: the squared error falls most.
            held = given[label, site] + (count / 2 if site is None else 0)
            full += (LABEL_WEIGHT if site is None else 1) * count * held / (total[label, site] * shares)
        part[group] = int(np.argmin(full))
        for kind, count in counts[group].items():
            given[kind][part[group]] += count
    return part


def _kinds(row) -> tuple:
    """What a slide counts as: of its label, and of its label at its site."""
    return (row["label"], None), (row["label"], site_of(row))


def write_splits(
    rows: Sequence[Mapping[str, str]], out: Path, *, shares=None, folds=None, by_site: bool = False, seed: int = 0
) -> dict[str, Check]:
    """Split a slide table into the file `out`, or with `folds` into a folder of that many; returns the check of each.

    What a table says of its split is replaced; its other columns stay. Raises ValueError for slides listed twice, for
    shares that are none, sites that are not known where they are asked for, and more parts than patients or sites.
    """
    if twice := _listed_twice(rows):
        raise ValueError(f"{twice[0].text}: a slide counts once, remove the others")
    if by_site and (lost := [row["slide_id"] for row in rows if not site_of(row)]):
        raise ValueError(f"the site of {some(lost)} is not known; fill a column site, or split by patient only")
    if folds is not None and (folds < 3 or shares):
        raise ValueError(f"{folds} folds: give at least 3 (train, val and test), and no shares with them")
    shares = [1.0] * folds if folds else list(shares or SHARES)
    if len(shares) < 2 or (not folds and len(shares) > 3) or not all(np.isfinite(shares)) or min(shares) <= 0:
        raise ValueError(f"shares {shares}: expected two (train, test) or three (train, val, test) numbers above 0")
    part = make_split(rows, shares, seed, by_site)
    if empty := set(range(len(shares))) - set(part):
        kind = "sites" if by_site else "patients"
        raise ValueError(f"too few {kind}: {len(empty)} of {len(shares)} parts would be empty; take larger shares")
    if not folds:
        sides = SIDES if len(shares) == 3 else ("train", "test")
        table = _with_sides(rows, [sides[p] for p in part])
        write_csv(out, table)
        return {str(out): check_split(table)}
    if out.exists():
        raise FileExistsError(f"{out}: is there already; name a new folder for the folds")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checks = {}
    for fold in range(folds):
        table = _with_sides(rows, [{0: "test", 1: "val"}.get((p - fold) % folds, "train") for p in part])
        write_csv(partial / f"fold-{fold + 1}.csv", table)
        checks[str(out / f"fold-{fold + 1}.csv")] = check_split(table)
    partial.rename(out)
    return checks


def _with_sides(rows, sides: Sequence[str]) -> list[dict[str, str]]:
    """The rows with their new sides, all with the same columns: the well-known first."""
    first = ("slide_id", "patient_id", "label", "split")
    columns = dict.fromkeys([*first, *(name for row in rows for name in row if name != "case_id")])
    return [
        {name: row.get(name, "") for name in columns} | {"patient_id": patient_of(row), "split": side}
        for row, side in zip(rows, sides, strict=True)
    ]


def describe(check: Check, name: str = "") -> str:
    """The check in words: a line for each side, then what was found."""
    lines = [name] if name else []
    for side, found in check.sides.items():
        labels = ", ".join(f"{label} {count}" for label, count in found["labels"].items()) or "no labels"
        lines.append(f"{side:5}  {found['slides']} slides of {found['patients']} patients: {labels}")
    lines += [f"{'FAULT' if finding.fault else 'note '}  {finding.text}" for finding in check.findings]
    for site in [site for site in check.sites if len(site["slides"]) > 1][:10]:
        sides, labels = (", ".join(f"{k} {v}" for k, v in site[part].items()) for part in ("slides", "labels"))
        lines.append(f"       site {site['site']}: {sides}; {labels}")
    return "\n".join(lines if check.findings else [*lines, "no fault found"])


def _groups(rows, keys: Sequence[Callable]) -> list[int]:
    """The group of each row: rows that share a key (a patient, a site) are together, directly or by way of others."""
    ids: dict[tuple, int] = {}
    edges = []
    for number, row in enumerate(rows):
        for kind, key in enumerate(keys):
            if value := key(row):
                edges.append((number, len(rows) + ids.setdefault((kind, value), len(ids))))
    size = len(rows) + len(ids)
    graph = coo_array((np.ones(len(edges)), np.array(edges, int).T), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(rows)].tolist()
