"""Matching of a slide table's splits to records and texts, with counts of matched and missing slides.

A split without any match is an error that lists the existing splits; partially missing slides are counted.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.identity import fold
from pathflip_jax.data.texts.split_files import SPLITS, SlideTableFile, folds_hint
from pathflip_jax.data.texts.text import read_slide_table, rename_rows

Row = Mapping[str, str]
NO_VALIDATION = ("", "none")


class SlideTable(NamedTuple):
    """A slide table matched to records, with their names for messages, `name` and `records`.

    `listed` are all rows, with ids spelt as in the records; `rows` those of slides in the records, by slide. `case_of`
    gives the case of every slide of the records.
    """

    name: str
    records: str
    listed: list[dict[str, str]]
    rows: dict[str, dict[str, str]]
    case_of: dict[str, str]

    def slides(self, split: str) -> list[str]:
        """Slides of a split that are in the records, in the order of the table."""
        return [slide for slide, row in self.rows.items() if row["split"] == split]

    def require(self, split: str, cure: str) -> list[str]:
        """Slides of a split as from `slides`, at least one. Raises ValueError for a split without rows or records."""
        listed = [row["slide_id"] for row in self.listed if row["split"] == split]
        if not listed:
            raise ValueError(f"{unknown_split_message(self.name, split, self.listed)}; {cure}")
        if not (found := self.slides(split)):
            raise ValueError(
                f"{self.name}: none of the {len(listed)} slides of split {split!r} ({preview(listed)}) is among the "
                f"{len(self.case_of)} slides of {self.records} ({preview(self.case_of)}); prepare them, or {cure}"
            )
        return found


def read_matched_table(table: SlideTableFile, name: str, records: Records) -> tuple[SlideTable, list[str]]:
    """Read a slide table and match it to records (called `name` in messages); inexact matches are noted."""
    case_of = _cases_of(records)
    listed, notes = rename_rows(read_slide_table(table), list(case_of), table)
    rows = {row["slide_id"]: row for row in listed if row["slide_id"] in case_of}
    return SlideTable(str(table), str(name), listed, rows, case_of), notes


def _cases_of(records: Records) -> dict[str, str]:
    return dict(zip(records.slides.column("slide_id"), records.slides.column("case_id"), strict=True))


def unknown_split_message(table: object, split: str, rows: Iterable[Row]) -> str:
    """Message for a split without rows, with the existing splits and the closest match."""
    rows = list(rows)
    counts = Counter(row["split"] for row in rows)
    there = ", ".join(f"{name or '(empty)'} ({count})" for name, count in sorted(counts.items()))
    meant = SPLITS.get(split.lower(), "")
    near = [meant] if counts[meant] and meant else difflib.get_close_matches(split, list(filter(None, counts)), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{table}: no slide is in split {split!r}; the splits are {there or '(none: no rows)'}{hint or _folds(rows)}"


def _folds(rows: Sequence[Row]) -> str:
    return "" if any(row["split"] for row in rows) else folds_hint(rows)


def count_splits(held: SlideTable | None, records: Records, texts: Mapping[str, Iterable[Sequence[str]]]) -> dict:
    """Counts of each split, for messages and for the facts of a run; `texts` are the slides of each text of a split.

    Without a table all slides form one split, "all".
    """
    if held is None:
        case_of = _cases_of(records)
        return {"all": _count(case_of, {}, case_of, texts.get("all"))}
    found = {}
    for split in dict.fromkeys(row["split"] for row in held.listed):
        slides = held.slides(split)
        lacking = sum(row["split"] == split for row in held.listed) - len(slides)
        found[split or "without a split"] = _count(slides, held.rows, held.case_of, texts.get(split)) | {
            "no_record": lacking
        }
    return found | {"not_in_table": len(held.case_of) - len(held.rows)}


def _count(slides: Iterable[str], rows: Mapping[str, Row], case_of: Mapping[str, str], texts) -> dict[str, int]:
    slides = list(slides)
    persons = {fold(rows.get(slide, {}).get("patient_id") or case_of[slide] or slide) for slide in slides}
    counts = {"slides": len(slides), "patients": len(persons)}
    if texts is not None:
        texts = list(texts)
        told = {slide for own in texts for slide in own}
        counts |= {"texts": len(texts), "no_text": len(set(slides) - told)}
    return counts


def describe(counts: Mapping[str, dict | int], validates: bool) -> str:
    """Counts as a line of text."""
    parts = []
    for split, found in counts.items():
        if split == "not_in_table":
            parts += [f"{found} slides of the records are not in the table"] if found else []
            continue
        texts = f", {found['texts']} texts" if "texts" in found else ""
        labels = {"no_record": "more have no record", "no_text": "have no text"}
        lacking = [f"{found[name]} {words}" for name, words in labels.items() if found.get(name)]
        missing = f" ({', '.join(lacking)})" if lacking else ""
        parts.append(f"{split} {found['slides']} slides of {found['patients']} patients{texts}{missing}")
    return "data: " + "; ".join(parts) + ("" if validates else "; no validation, so the latest checkpoint is the best")
