"""Data checks of `pathflip doctor`: records, slide table, texts and vocabulary, individually and together."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pathflip_jax.commands.findings import Finding, guarded, logged_warnings
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.verify import verify
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.texts.cases import Sources, bag_keys, slides_of_case
from pathflip_jax.data.texts.identity import SlideNames, connected, is_missing, patient_keys
from pathflip_jax.data.texts.tables import read_rows
from pathflip_jax.data.texts.text import SlideText, match_rows, match_texts, read_texts, slide_row
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.evaluate.splits import check_split
from pathflip_jax.settings.sections import AlignmentDataSettings


class Seen(NamedTuple):
    """Readable tables and their locations: `rows` of the slide table, and `row_of` a slide of the records.

    From the records it holds the ids of slides and cases.
    """

    places: dict[str, Place]
    ids: list[str] | None = None
    cases: list[str] | None = None
    rows: Sequence[dict] | None = None
    row_of: dict[str, dict] = {}
    texts: Sequence[SlideText] | None = None

    def sources(self) -> Sources:
        """Slide table with the names of all tables, as `data/texts/cases.py` compares them."""
        return Sources(self.row_of, *(str(self.places.get(name)) for name in ("slides", "records", "texts")))


def examine_data(
    records: Place | None, slides: Place | None, texts: Place | None, tokenizer: Place | None
) -> list[Finding]:
    """Check each given input, and each against the others."""
    found: list[Finding] = []
    seen = Seen({"records": records, "slides": slides, "texts": texts})
    if records is not None:
        if (cohort := _opened("records", lambda: Records(records), found)) is not None:
            found.append(Finding("records", _size(cohort), "ok"))
            seen = seen._replace(ids=cohort.slides.column("slide_id"), cases=cohort.slides.column("case_id"))
            del cohort  # its shards are read in full next, and its regions take most of the memory
        found += guarded("records", _records, records, [finding.found for finding in found])
    if slides is not None and (rows := _opened("slides", lambda: _rows(slides), found)) is not None:
        seen = seen._replace(rows=rows)
        found += guarded("slides", _slides, rows, slides)
        if seen.ids is not None:
            row_of = _opened("slides", lambda: match_rows(rows, seen.ids, slides)[0], found)
            seen = seen._replace(row_of=row_of or {})
            found += guarded("slides", _slides_and_records, seen)
    if texts is not None and (listed := _opened("texts", lambda: read_texts(texts), found)) is not None:
        seen = seen._replace(texts=listed)
        found += guarded("texts", _texts, seen)
    if tokenizer is not None:
        found += guarded("tokenizer", _tokenizer, tokenizer, seen.texts)
    return found


# Consequence of a slide without a record, by split.
UNPREPARED = {
    "train": ("note", "training leaves them out"),
    "val": ("note", "validation leaves them out"),
    "test": ("fault", "`pathflip evaluate` refuses a split that lacks slides"),
}
CURES = {
    "records": "write them with `pathflip prepare` or `pathflip import`",
    "slides": "a CSV with the columns slide_id, patient_id, label, split is needed",
    "texts": "a table with the columns slide_id (or case_id) and caption is needed",
}


def _opened(name: str, read, found: list[Finding]):
    """Result of `read`, with its warnings as notes; None, with a fault among the findings, if it cannot be read."""
    with logged_warnings() as warnings:
        try:
            content = read()
        except (ValueError, OSError) as error:
            found.append(Finding(name, str(error), "fault", CURES[name]))
            return None
    if name != "records":  # the check of every byte reports these too
        found += [Finding(name, warning, "note", "look at these rows of the table") for warning in warnings]
    return content


def _rows(table: Place) -> list[dict[str, str]]:
    """Rows of a slide table, including slides listed twice, which the check of the split reports."""
    return [slide_row(row) for row in read_rows(table)]


def _size(cohort: Records) -> str:
    encoder = cohort.encoder or "an encoder that is not named"
    patches = int(cohort.slides.column("num_patches").sum())
    return f"{len(cohort)} slides, {patches} patches of {encoder} ({cohort.feature_dim} wide)"


def _records(folder: Place, told: Collection[str]) -> Iterator[Finding]:
    """Check records byte by byte, without repeating faults reported when they were opened."""
    try:
        faults = verify(folder)
    except OSError as error:  # no folder, or none with shards
        faults = [str(error)]
    for fault in faults:
        if not any(text.startswith(fault) for text in told):
            yield Finding("records", fault, "fault", "if no other cure is named, copy or write that shard again")


def _slides(rows: Sequence[dict], table: Place) -> Iterator[Finding]:
    """Check the slide table: its splits and patients, as in `pathflip split --check`."""
    people = connected([patient_keys(row["slide_id"], row["case_id"], row["patient_id"]) for row in rows])
    sides = Counter(row["split"] or "none" for row in rows)
    listed = ", ".join(f"{side} {count}" for side, count in sides.items())
    yield Finding("slides", f"{len(rows)} slides of {len(set(people))} patients; split: {listed}", "ok")
    nobody = [row["slide_id"] for row in rows if is_missing(row["patient_id"]) and is_missing(row["case_id"])]
    if nobody:
        found = (
            f"without a patient: {len(nobody)} of the {len(rows)} slides ({preview(nobody)}); each counts as its own"
        )
        yield Finding("slides", found, "note", "fill in the column patient_id: slides of one patient must share it")
    for finding in check_split(rows).findings:
        cure = f"`pathflip split --check {table}` lists them; `pathflip split {table} --out new.csv` makes a new split"
        yield Finding("slides", finding.text, "fault" if finding.fault else "note", cure)


def _slides_and_records(seen: Seen) -> Iterator[Finding]:
    """Check the slide table against the records: slides missing from either, and contradictory cases."""
    records, slides = seen.places["records"], seen.ids
    names = SlideNames(slides)
    strange = [row for row in seen.rows if not names.find(row["slide_id"])]
    if len(strange) == len(seen.rows):
        found = f"none of its slides ({preview(row['slide_id'] for row in strange)}) is among those of {records}"
        yield Finding("slides", found, "fault", f"give the table of these slides: {preview(slides)}")
        return
    yield Finding("slides", f"{len(seen.row_of)} of {len(slides)} slides of {records} have a row", "ok")
    listed = {row["slide_id"] for row in seen.rows}
    if respelt := [slide for slide in seen.row_of if slide not in listed]:
        found = (
            f"spelt differently there, and taken as the same: {len(respelt)} slides of {records} ({preview(respelt)})"
        )
        yield Finding("slides", found, "note", "spell them alike, or rename one if they are not the same")
    for side, (state, what) in UNPREPARED.items():
        if absent := [row["slide_id"] for row in strange if row["split"] == side]:
            size = sum(row["split"] == side for row in seen.rows)
            found = f"without a record: {len(absent)} of the {size} slides of split {side} ({preview(absent)}); {what}"
            yield Finding("slides", found, state, "prepare or import them, or remove them from the table")
    if left := [slide for slide in slides if slide not in seen.row_of]:
        found = f"without a row: {len(left)} of the {len(slides)} slides of {records} ({preview(left)})"
        yield Finding("slides", found, "note", "without a row and a split, a slide is neither trained on nor scored")
    yield from _agreeing("slides", seen, {(slide,): [] for slide in slides})


def _agreeing(name: str, seen: Seen, grouped: dict[tuple[str, ...], list[SlideText]]) -> Iterator[Finding]:
    """Report a fault where two tables assign a slide to different patients, at which training would stop."""
    case_of = dict(zip(seen.ids, seen.cases, strict=True))
    try:
        bag_keys(list(grouped), grouped, case_of, seen.sources())
    except ValueError as error:
        yield Finding(name, str(error), "fault")


def _texts(seen: Seen) -> Iterator[Finding]:
    """Check the texts, matched with the slides of the records as in training (`data/batches/bags.py`)."""
    if seen.ids is None:
        yield Finding("texts", f"{len(seen.texts)} texts", "ok")
        return
    of_case = slides_of_case(seen.row_of.values())
    texts = [text if text.slide_ids else replace(text, slide_ids=of_case(text.case_id)) for text in seen.texts]
    try:
        with logged_warnings() as warnings:
            matched = match_texts(texts, seen.ids, seen.cases)
    except ValueError as error:
        yield Finding("texts", str(error), "fault", "or give a table that names the cases of the slides: --slides")
        return
    yield Finding("texts", f"{len(texts)} texts, {len(matched)} of them with a slide in {seen.places['records']}", "ok")
    for warning in warnings:
        yield Finding("texts", warning, "note", "if this is unexpected, compare the ids of both")
    train = {slide for slide, row in seen.row_of.items() if row["split"] == "train"}
    if train and train.isdisjoint(slide for text in matched for slide in text.slide_ids):
        found = f"none of the {len(train)} slides of split train has a text"
        yield Finding("texts", found, "fault", "training needs reports of these slides")
    grouped: defaultdict[tuple[str, ...], list[SlideText]] = defaultdict(list)
    for text in matched:
        grouped[text.slide_ids].append(text)
    yield from _agreeing("texts", seen, grouped)


def _tokenizer(folder: Place, texts: Sequence[SlideText] | None) -> Iterator[Finding]:
    """Check the vocabulary, and count the pieces of the texts that it lacks."""
    try:
        with logged_warnings() as warnings:
            tokenizer = TextTokenizer(folder)
    except (ValueError, OSError) as error:
        cure = "name a BERT folder of Hugging Face, or make one with `pathflip vocabulary`"
        yield Finding("tokenizer", str(error), "fault", cure)
        return
    size = f"{folder}: {tokenizer.vocab_size} pieces"
    for warning in warnings:
        yield Finding("tokenizer", warning, "note", "see the file named")
    if texts is None:
        yield Finding("tokenizer", size, "ok")
        return
    share, most = (
        tokenizer.unknown_share(tokenizer.ids([text.caption for text in texts])),
        AlignmentDataSettings.max_unknown_share,
    )
    found = f"{size}; {share:.1%} of the pieces of the texts are unknown to it"
    cure = "use a vocabulary of the texts' language, or learn one: `pathflip vocabulary TEXTS --out FOLDER`"
    bad = share > most
    yield Finding("tokenizer", found, "fault" if bad else "ok", cure if bad else "")
