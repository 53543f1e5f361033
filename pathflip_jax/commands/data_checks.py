"""Data checks of `pathflip doctor`: records, slide table, texts and vocabulary, alone and against each other."""

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
from pathflip_jax.data.texts.split_files import SlideTableFile, folds_hint, read_split_rows
from pathflip_jax.data.texts.text import SlideText, match_rows, match_texts, read_texts, slide_row
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.evaluate.splits import check_split
from pathflip_jax.settings.sections import AlignmentDataSettings


class DataRead(NamedTuple):
    """Contents of the inputs that could be read, and the location of each input.

    `ids` and `cases` are those of the slides in the records, `rows` those of the slide table; `row_of` maps the id of a
    slide in the records to its row.
    """

    places: dict[str, SlideTableFile]
    ids: list[str] | None = None
    cases: list[str] | None = None
    rows: Sequence[dict] | None = None
    row_of: dict[str, dict] = {}
    texts: Sequence[SlideText] | None = None

    def sources(self) -> Sources:
        """Slide table and the names of all tables, for the comparison in `data/texts/cases.py`."""
        return Sources(self.row_of, *(str(self.places.get(name)) for name in ("slides", "records", "texts")))


def examine_data(
    records: Place | None, slides: SlideTableFile | None, texts: Place | None, tokenizer: Place | None
) -> list[Finding]:
    """Check each given input, and each against the others."""
    found: list[Finding] = []
    data = DataRead({"records": records, "slides": slides, "texts": texts})
    if records is not None:
        if (cohort := _opened("records", lambda: Records(records), found)) is not None:
            found.append(Finding("records", _size(cohort), "ok"))
            data = data._replace(ids=cohort.slides.column("slide_id"), cases=cohort.slides.column("case_id"))
            del cohort  # frees memory, mostly of its regions, before its shards are read in full
        found += guarded("records", _records, records, [finding.found for finding in found])
    if slides is not None and (rows := _opened("slides", lambda: _rows(slides), found)) is not None:
        data = data._replace(rows=rows)
        found += guarded("slides", _slides, rows, slides)
        if data.ids is not None:
            row_of = _opened("slides", lambda: match_rows(rows, data.ids, slides)[0], found)
            data = data._replace(row_of=row_of or {})
            found += guarded("slides", _slides_and_records, data)
    if texts is not None and (listed := _opened("texts", lambda: read_texts(texts), found)) is not None:
        data = data._replace(texts=listed)
        found += guarded("texts", _texts, data)
    if tokenizer is not None:
        found += guarded("tokenizer", _tokenizer, tokenizer, data.texts)
    return found


# State and consequence of slides without a record, by split.
MISSING_RECORDS = {
    "train": ("note", "training skips them"),
    "val": ("note", "validation skips them"),
    "test": ("fault", "`pathflip evaluate` refuses a split that lacks slides"),
}
CURES = {
    "records": "write them with `pathflip prepare` or `pathflip import`",
    "slides": "pass a CSV with the columns slide_id, patient_id, label, split",
    "texts": "pass a table with the columns slide_id (or case_id) and caption",
}


def _opened(name: str, read, found: list[Finding]):
    """Result of `read`; its warnings become notes, and an error becomes a fault, with the result None."""
    with logged_warnings() as warnings:
        try:
            content = read()
        except (ValueError, OSError) as error:
            found.append(Finding(name, str(error), "fault", CURES[name]))
            return None
    if name != "records":  # `verify` reports these too
        found += [Finding(name, warning, "note", "check these rows of the table") for warning in warnings]
    return content


def _rows(table: SlideTableFile) -> list[dict[str, str]]:
    """Rows of a slide table, including slides listed twice, which the check of the split reports."""
    return [slide_row(row) for row in read_split_rows(table)]


def _size(cohort: Records) -> str:
    encoder = cohort.encoder or "an unnamed encoder"
    patches = int(cohort.slides.column("num_patches").sum())
    return f"{len(cohort)} slides, {patches} patches of {encoder} (width {cohort.feature_dim})"


def _records(folder: Place, reported: Collection[str]) -> Iterator[Finding]:
    """Check records byte by byte, without repeating faults reported when they were opened."""
    try:
        faults = verify(folder)
    except OSError as error:  # no folder, or none with shards
        faults = [str(error)]
    for fault in faults:
        if not any(text.startswith(fault) for text in reported):
            yield Finding(
                "records", fault, "fault", "unless the message names another cure, copy or write that shard again"
            )


def _slides(rows: Sequence[dict], table: SlideTableFile) -> Iterator[Finding]:
    """Check the slide table: its splits and patients, as in `pathflip split --check`."""
    people = connected([patient_keys(row["slide_id"], row["case_id"], row["patient_id"]) for row in rows])
    sides = Counter(row["split"] or "none" for row in rows)
    listed = ", ".join(f"{side} {count}" for side, count in sides.items())
    hint = "" if any(row["split"] for row in rows) else folds_hint(rows)
    yield Finding("slides", f"{len(rows)} slides of {len(set(people))} patients; split: {listed}{hint}", "ok")
    nobody = [row["slide_id"] for row in rows if is_missing(row["patient_id"]) and is_missing(row["case_id"])]
    if nobody:
        found = (
            f"without a patient: {len(nobody)} of the {len(rows)} slides ({preview(nobody)}); "
            "each counts as a separate patient"
        )
        yield Finding("slides", found, "note", "fill in the column patient_id: slides of one patient must share it")
    for finding in check_split(rows).findings:
        cure = (
            f"list them with `pathflip split --check {table}`, or make a new split with "
            f"`pathflip split {table} --out new.csv`"
        )
        yield Finding("slides", finding.text, "fault" if finding.fault else "note", cure)


def _slides_and_records(data: DataRead) -> Iterator[Finding]:
    """Check the slide table against the records: slides missing from either, and contradictory patients."""
    records, slides = data.places["records"], data.ids
    names = SlideNames(slides)
    unmatched = [row for row in data.rows if not names.find(row["slide_id"])]
    if len(unmatched) == len(data.rows):
        found = f"none of its slides ({preview(row['slide_id'] for row in unmatched)}) is in {records}"
        yield Finding("slides", found, "fault", f"pass the table of the slides in the records: {preview(slides)}")
        return
    yield Finding("slides", f"{len(data.row_of)} of {len(slides)} slides of {records} have a row", "ok")
    listed = {row["slide_id"] for row in data.rows}
    if respelt := [slide for slide in data.row_of if slide not in listed]:
        found = f"matched despite different spelling: {len(respelt)} slides of {records} ({preview(respelt)})"
        yield Finding("slides", found, "note", "spell the ids alike, or rename one if they are different slides")
    for side, (state, what) in MISSING_RECORDS.items():
        if absent := [row["slide_id"] for row in unmatched if row["split"] == side]:
            size = sum(row["split"] == side for row in data.rows)
            found = f"without a record: {len(absent)} of the {size} slides of split {side} ({preview(absent)}); {what}"
            yield Finding("slides", found, state, "prepare or import them, or remove them from the table")
    if left := [slide for slide in slides if slide not in data.row_of]:
        found = f"without a row: {len(left)} of the {len(slides)} slides of {records} ({preview(left)})"
        yield Finding(
            "slides", found, "note", "add rows with a split: without one, a slide is neither trained on nor scored"
        )
    yield from _agreeing("slides", data, {(slide,): [] for slide in slides})


def _agreeing(name: str, data: DataRead, grouped: dict[tuple[str, ...], list[SlideText]]) -> Iterator[Finding]:
    """Report a fault if two tables assign a slide to different patients, an error that would stop training."""
    case_of = dict(zip(data.ids, data.cases, strict=True))
    try:
        bag_keys(list(grouped), grouped, case_of, data.sources())
    except ValueError as error:
        yield Finding(name, str(error), "fault")


def _texts(data: DataRead) -> Iterator[Finding]:
    """Check the texts, matched to the slides of the records as in training (`data/batches/bags.py`)."""
    if data.ids is None:
        yield Finding("texts", f"{len(data.texts)} texts", "ok")
        return
    of_case = slides_of_case(data.row_of.values())
    texts = [text if text.slide_ids else replace(text, slide_ids=of_case(text.case_id)) for text in data.texts]
    try:
        with logged_warnings() as warnings:
            matched = match_texts(texts, data.ids, data.cases)
    except ValueError as error:
        yield Finding("texts", str(error), "fault", "or pass a slide table that assigns the slides to cases: --slides")
        return
    yield Finding("texts", f"{len(texts)} texts, {len(matched)} of them with a slide in {data.places['records']}", "ok")
    for warning in warnings:
        yield Finding(
            "texts", warning, "note", "if this is unexpected, compare the ids of the texts with those of the records"
        )
    train = {slide for slide, row in data.row_of.items() if row["split"] == "train"}
    if train and train.isdisjoint(slide for text in matched for slide in text.slide_ids):
        found = f"none of the {len(train)} slides of split train has a text"
        yield Finding("texts", found, "fault", "add reports of these slides: training needs them")
    grouped: defaultdict[tuple[str, ...], list[SlideText]] = defaultdict(list)
    for text in matched:
        grouped[text.slide_ids].append(text)
    yield from _agreeing("texts", data, grouped)


def _tokenizer(folder: Place, texts: Sequence[SlideText] | None) -> Iterator[Finding]:
    """Check the vocabulary, and measure the fraction of the texts' word pieces that it lacks."""
    try:
        with logged_warnings() as warnings:
            tokenizer = TextTokenizer(folder)
    except (ValueError, OSError) as error:
        cure = "pass a Hugging Face BERT folder, or make one with `pathflip vocabulary`"
        yield Finding("tokenizer", str(error), "fault", cure)
        return
    size = f"{folder}: {tokenizer.vocab_size} word pieces"
    for warning in warnings:
        yield Finding("tokenizer", warning, "note", "check the file named there")
    if texts is None:
        yield Finding("tokenizer", size, "ok")
        return
    share, most = (
        tokenizer.unknown_share(tokenizer.ids([text.caption for text in texts])),
        AlignmentDataSettings.max_unknown_share,
    )
    found = f"{size}; {share:.1%} of the word pieces of the texts are unknown to it"
    cure = "use a vocabulary of the texts' language, or train one: `pathflip vocabulary TEXTS --out FOLDER`"
    bad = share > most
    yield Finding("tokenizer", found, "fault" if bad else "ok", cure if bad else "")
