"""Patient-level splits of slide tables, and checks of splits for leakage and wrong labels.

If a patient has slides in both the training and the test split, a model can recognise the patient; if a site has, its
scanner and stain (Howard et al., Nature Communications 2021). Normal tissue with a tumor label is mislabelled.
Published splits have all three faults.
"""

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.files import as_path
from pathflip_jax.data.texts.identity import connected, fold, fold_slide, is_missing, preferred_spelling
from pathflip_jax.data.texts.split_files import SIDES, is_fold, one_fold, read_split_rows, side_and_table
from pathflip_jax.data.texts.tables import write_csv
from pathflip_jax.data.texts.text import row_columns, slide_row
from pathflip_jax.evaluate.patients import Patient, name_patients, name_sites, patients

SHARES = (0.7, 0.1, 0.2)
LABEL_WEIGHT = 50  # relative to sites: a label imbalance of 2% of a share outweighs a site that is entirely in one part
MOST_LABELS = 20  # maximum number of distinct values in a column of labels
_NOT_LABELS = {"slide_id", "case_id", "patient_id", "case", "patient", "label", "split", "site", "mpp", "magnification"}
NO_SIDE = "slides on no side"
_BARCODE = re.compile(r"TCGA-(\w{2})-\w{4}(?:-(\d{2}))?(?!\d)", re.IGNORECASE)
_NORMAL_LABEL = re.compile(r"normal|benign|healthy|non[-_ ]?(?:tumou?r|neoplastic)|negative", re.IGNORECASE)
# Second half of the TCGA code table of sample types: 01 to 09 are tumors, 10 to 19 normal tissues.
NORMAL_TYPES = {"10": "blood", "11": "solid tissue", "12": "buccal cells", "13": "EBV cells", "14": "bone marrow"}


class Finding(NamedTuple):
    """A finding about a split, either a fault or a note, with the affected patients, slides, sites or labels."""

    kind: str
    fault: bool
    text: str
    of: list[str]


class Check(NamedTuple):
    """The result of checking a split: its sides (train, val, test), its known sites, and findings."""

    sides: dict[str, dict]
    sites: list[dict]
    findings: list[Finding]

    @property
    def faults(self) -> list[Finding]:
        """The findings that make scores on this split invalid."""
        return [finding for finding in self.findings if finding.fault]

    def as_json(self) -> dict:
        """The check as a tree for JSON."""
        findings = [finding._asdict() for finding in self.findings]
        return {"faulty": bool(self.faults), "sides": self.sides, "sites": self.sites, "findings": findings}


def read_split(tables: Sequence[str], label: str = "", fold_name: str = "") -> list[dict[str, str]]:
    """The rows of one slide table, or of several as one; "test=FILE" puts the rows of a file on that side.

    `label` is the column of labels if it is not `label`, `fold_name` the fold of tables that hold several. A slide
    listed twice is kept twice, for the check to find. Raises ValueError as `slide_row`, and for a table without that
    column.
    """
    found, column = [], label.strip().lower()
    for table in tables:
        side, path = side_and_table(str(table))
        before, equals, _ = path.partition("=")
        if equals and not as_path(path).exists():
            raise ValueError(f"{table}: {before!r} before the file is not a split; expected {', '.join(SIDES)}")
        read = read_split_rows(one_fold(path, fold_name))
        if column and (lacking := next((row for row in read if column not in row.values), None)):
            raise ValueError(f"{lacking.place}: no column {label!r}, {row_columns(lacking)}")
        rows = [slide_row(row) for row in read]
        found += [row | ({"split": side} if side else {}) | ({"label": row[column]} if column else {}) for row in rows]
    return found


def unlabelled(rows: Sequence[Mapping[str, str]]) -> list[Finding]:
    """A note if no slide has a label, with the columns that could be labels: few values for many slides."""
    if any(row["label"] for row in rows):
        return []
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if name and name not in _NOT_LABELS):
        if is_fold(name):
            continue
        values = [row[name] for row in rows if not is_missing(row.get(name, ""))]
        if 2 <= len(set(values)) <= min(MOST_LABELS, len(values) // 2):
            found[name] = f"{name} ({len(set(values))} values)"
    listed = (
        f"columns that could be one: {preview(found.values(), 8)}; choose with --label" if found else "pass --label"
    )
    return [Finding("no labels", False, f"no column label; {listed}", list(found))]


def site_of(row: Mapping[str, str]) -> str:
    """The site of a slide: the column `site`, else the tissue source site of a TCGA barcode, else ""."""
    barcode = _BARCODE.match(row["slide_id"])
    return row.get("site") or (barcode.group(1).upper() if barcode else "")


def sample_type(slide_id: str) -> str:
    """The two digits of the TCGA sample type ("11" is normal solid tissue), "" if the id has none."""
    barcode = _BARCODE.match(slide_id)
    return (barcode.group(2) or "") if barcode else ""


def check_split(rows: Sequence[Mapping[str, str]]) -> Check:
    """The check of a split: patients, slides and labels of its sides, TCGA sample types, and shared sites."""
    of = patients(rows)
    sites = name_sites([site_of(row) for row in rows])
    rows = [dict(row) | {"patient_id": p.name, "site": site} for row, p, site in zip(rows, of, sites, strict=True)]
    used = [row for row in rows if row["split"]]
    sides = {side: _side([row for row in used if row["split"] == side]) for side in SIDES}
    sides = {side: found for side, found in sides.items() if found["slides"]}
    sites = _sites(used)
    findings = [*_shared_patients(of), *_listed_twice(rows), *_normal_tissue(used), *_lacking_labels(sides)]
    findings += [*_labels_in_two_spellings(used), *_spellings(of)]
    shared = [site for site in sites if len(site["slides"]) > 1]
    if shared:
        count = sum(sum(site["slides"].values()) for site in shared)
        text = (
            f"{len(shared)} of {len(sites)} sites are in more than one split, with {count} of {len(used)} slides, so "
            "the scores cannot reveal a model that recognises a site's stain and scanner"
        )
        findings.append(Finding("shared sites", False, text, [site["site"] for site in shared]))
    if 0 < len(used) < len(rows):
        out = [row["slide_id"] for row in rows if not row["split"]]
        text = f"{len(out)} of {len(rows)} slides are in no split: {preview(out)}"
        findings.append(Finding(NO_SIDE, False, text, out))
    return Check(sides, sites, findings)


def _side(rows: list[Mapping[str, str]]) -> dict:
    labels = Counter(row["label"] for row in rows if row["label"])
    people = {row["patient_id"] for row in rows}
    return {"slides": len(rows), "patients": len(people), "labels": dict(sorted(labels.items()))}


def _sites(rows: Sequence[Mapping[str, str]]) -> list[dict]:
    """Every known site with its slides by side and its labels, in descending order of size."""
    found: dict[str, dict[str, Counter]] = {}
    for row in rows:
        if site := row["site"]:
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


def _shared_patients(of: Sequence[Patient]) -> list[Finding]:
    shared = sorted({p.name: p for p in of if len([side for side in p.splits if side]) > 1}.items())
    if not shared:
        return []
    names = preview(str(patient) for _, patient in shared)
    text = f"{len(shared)} patients have slides in more than one split ({names}), so its scores are optimistic"
    return [Finding("shared patients", True, text, [name for name, _ in shared])]


def _spellings(of: Sequence[Patient]) -> list[Finding]:
    """Notes on patients that were merged although the table spells them differently."""
    several = sorted({p.name: p for p in of if len(p.spellings) > 1}.items())
    zeros = [p for _, p in several if len({fold(name, zeros=True) for name in p.spellings}) > p.ids]
    joined = [p for _, p in several if p.ids > 1]
    spelt = [p for _, p in several if p not in zeros and p not in joined]
    kinds = {
        "patients in several spellings": (spelt, "are written in more than one way"),
        "zeros in front of patients": (zeros, "differ only by leading zeros, which spreadsheets lose"),
        "patients under several ids": (joined, "have several ids, joined by a barcode, a case or a slide"),
    }
    return [
        Finding(kind, False, f"{len(found)} patients {text}, and count as one each ({_written(found)})", _names(found))
        for kind, (found, text) in kinds.items()
        if found
    ]


def _written(found: Sequence[Patient]) -> str:
    return preview(" = ".join(list(patient.spellings)[:4]) for patient in found)


def _names(found: Sequence[Patient]) -> list[str]:
    return [patient.name for patient in found]


def _labels_in_two_spellings(rows) -> list[Finding]:
    spelt: dict[str, list[str]] = {}
    for label in sorted({row["label"] for row in rows if row["label"]}):
        spelt.setdefault(fold(label), []).append(label)
    twice = [" = ".join(found) for found in spelt.values() if len(found) > 1]
    if not twice:
        return []
    text = (
        f"{len(twice)} labels have more than one spelling ({preview(twice)}), which count as separate labels: keep one "
        "spelling"
    )
    return [Finding("labels in several spellings", True, text, twice)]


def _listed_twice(rows) -> list[Finding]:
    spelt: dict[str, list[str]] = {}
    for row in rows:
        spelt.setdefault(fold_slide(row["slide_id"], zeros=True), []).append(row["slide_id"])
    twice = {preferred_spelling(found): " = ".join(dict.fromkeys(found)) for found in spelt.values() if len(found) > 1}
    if not twice:
        return []
    text = f"{len(twice)} slides are listed twice ({preview(twice[name] for name in sorted(twice))})"
    return [Finding("slides listed twice", True, text, sorted(twice))]


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
        f"{len(wrong)} slides of normal tissue (TCGA sample type {kinds}) have a tumor label "
        f"({preview(wrong)}): remove them"
    )
    return [Finding("normal tissue under a tumor label", True, text, wrong)]


def _lacking_labels(sides: Mapping[str, dict]) -> list[Finding]:
    found = []
    labels = sorted({label for side in sides.values() for label in side["labels"]})
    for name, side in sides.items():
        lacking = [label for label in labels if label not in side["labels"]]
        if lacking and side["labels"]:  # a split without any label is unlabelled
            text = f"split {name!r} has no slide with the label {preview(lacking)}, which other splits have"
            found.append(Finding("label lacking", True, text, lacking))
    return found


def make_split(
    rows: Sequence[Mapping[str, str]], shares: Sequence[float], seed: int, by_site: bool = False
) -> list[int]:
    """The part (0 to len(shares) - 1) of each row, with no patient in two parts and, if `by_site`, no site either.

    Labels and sites are balanced over the parts as far as whole patients (or sites) allow. The seed draws the order of
    assignment.
    """
    shares = np.asarray(shares, float) / np.sum(shares)
    rows = name_patients(rows)
    sites = name_sites([site_of(row) for row in rows])
    rows = [row | {"site": site} for row, site in zip(rows, sites, strict=True)]
    groups = connected(
        [{row["patient_id"], *([("site", row["site"])] if by_site and row["site"] else [])} for row in rows]
    )
    members: dict[int, list[Mapping[str, str]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    order = np.random.default_rng(seed).permutation(sorted(members)).tolist()
    part = _assign(sorted(order, key=lambda group: -len(members[group])), members, shares)
    _fill_lacking(part, members, len(shares))
    return [part[group] for group in groups]


def _assign(order: list[int], members: Mapping[int, list], shares: np.ndarray) -> dict[int, int]:
    """Assign each group, in descending order of size, to the part that most lacks its labels and their sites.

    A part is full of a label when it holds its share of that label's slides. Labels outweigh sites unless labels are
    balanced within a few percent; small groups are assigned last and even out imbalances.
    """

    counts = {group: Counter(kind for row in rows for kind in _kinds(row)) for group, rows in members.items()}
    total = sum(counts.values(), Counter())
    given = {kind: np.zeros(len(shares)) for kind in total}
    part = {}
    for group in order:
        full = np.zeros(len(shares))
        for (label, site), count in counts[group].items():
            # Counting half of the group itself minimises the squared error and keeps parts from being overfilled.
            held = given[label, site] + (count / 2 if site is None else 0)
            full += (LABEL_WEIGHT if site is None else 1) * count * held / (total[label, site] * shares)
        part[group] = int(np.argmin(full))
        for kind, count in counts[group].items():
            given[kind][part[group]] += count
    return part


def _kinds(row) -> tuple:
    """The two strata of a slide: its label, and its label at its site."""
    return (row["label"], None), (row["label"], row["site"])


def _fill_lacking(part: dict[int, int], members: Mapping[int, list], parts: int) -> None:
    """Swap groups so that every part has each label that enough groups have."""
    labels = {group: {row["label"] for row in rows if row["label"]} for group, rows in members.items()}
    total = Counter(label for own in labels.values() for label in own)
    held = Counter((label, part[group]) for group, own in labels.items() for label in own)

    def can_spare(group: int) -> bool:
        return all(held[label, part[group]] > 1 or total[label] < parts for label in labels[group])

    def move(group: int, to: int) -> None:
        held.subtract((label, part[group]) for label in labels[group])
        held.update((label, to) for label in labels[group])
        part[group] = to

    for label in sorted(total, key=lambda label: (total[label], label)):
        for lacking in [p for p in range(parts) if total[label] >= parts and not held[label, p]]:
            spare = [group for group in labels if label in labels[group] and can_spare(group)]
            if not spare:
                continue
            group = min(spare, key=lambda g: (len(labels[g]), len(members[g]), -held[label, part[g]]))
            back, size = part[group], len(members[group])
            move(group, lacking)
            others = [g for g in labels if part[g] == lacking and label not in labels[g] and can_spare(g)]
            if others:
                other = min(others, key=lambda g: abs(len(members[g]) - size))
                if abs(len(members[other]) - size) < size:
                    move(other, back)


def write_splits(
    rows: Sequence[Mapping[str, str]], out: Path, *, shares=None, folds=None, by_site: bool = False, seed: int = 0
) -> dict[str, Check]:
    """Split a slide table into the file `out`, or with `folds` into a folder of files; returns the check of each.

    The table's own split is replaced; other columns are kept. Raises ValueError for slides listed twice, invalid
    shares, unknown sites with `by_site`, and more parts than patients or sites.
    """
    if twice := _listed_twice(rows):
        raise ValueError(f"{twice[0].text}: keep one row per slide")
    if by_site and (lost := [row["slide_id"] for row in rows if not site_of(row)]):
        raise ValueError(f"the site of {preview(lost)} is unknown; add a column `site`, or split by patient only")
    if folds is not None and (folds < 3 or shares):
        raise ValueError(f"{folds} folds: pass at least 3 (train, val and test), and no shares with them")
    shares = [1.0] * folds if folds else list(shares or SHARES)
    if len(shares) < 2 or (not folds and len(shares) > 3) or not all(np.isfinite(shares)) or min(shares) <= 0:
        raise ValueError(f"shares {shares}: expected two (train, test) or three (train, val, test) numbers above 0")
    part, notes = make_split(rows, shares, seed, by_site), _spellings(patients(rows))

    def examined(table: list[dict[str, str]]) -> Check:
        check = check_split(table)
        return check._replace(findings=[*check.findings, *notes])

    if empty := set(range(len(shares))) - set(part):
        kind = "sites" if by_site else "patients"
        raise ValueError(f"too few {kind}: {len(empty)} of {len(shares)} parts would be empty; take larger shares")
    if not folds:
        sides = SIDES if len(shares) == 3 else ("train", "test")
        table = with_sides(rows, [sides[p] for p in part])
        write_csv(out, table)
        return {str(out): examined(table)}
    if out.exists():
        raise FileExistsError(f"{out}: already exists; choose a new folder for the folds")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checks = {}
    for tested in range(folds):
        table = with_sides(rows, [{0: "test", 1: "val"}.get((p - tested) % folds, "train") for p in part])
        write_csv(partial / f"fold-{tested + 1}.csv", table)
        checks[str(out / f"fold-{tested + 1}.csv")] = examined(table)
    partial.rename(out)
    return checks


def with_sides(rows, sides: Sequence[str]) -> list[dict[str, str]]:
    """The rows with their new sides, all with the same columns, the standard ones first."""
    first = ("slide_id", "patient_id", "label", "split")
    columns = dict.fromkeys([*first, *(name for row in rows for name in row if name != "case_id")])
    return [
        {name: row.get(name, "") for name in columns} | {"split": side}
        for row, side in zip(name_patients(rows), sides, strict=True)
    ]


def describe(check: Check, name: str = "") -> str:
    """The check as text: a line for each side, then the findings."""
    lines = [name] if name else []
    for side, found in check.sides.items():
        labels = ", ".join(f"{label} {count}" for label, count in found["labels"].items()) or "no labels"
        lines.append(f"{side:5}  {found['slides']} slides of {found['patients']} patients: {labels}")
    lines += [f"{'FAULT' if finding.fault else 'note '}  {finding.text}" for finding in check.findings]
    for site in [site for site in check.sites if len(site["slides"]) > 1][:10]:
        sides, labels = (", ".join(f"{k} {v}" for k, v in site[part].items()) for part in ("slides", "labels"))
        lines.append(f"       site {site['site']}: {sides}; {labels}")
    return "\n".join(lines if check.findings else [*lines, "no fault found"])
