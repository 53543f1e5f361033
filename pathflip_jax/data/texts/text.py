"""Texts of slides: captions, questions and slide tables, in all supported formats (DESIGN section 5).

Features are written once; texts are separate tables, keyed by slide id. The canonical table is JSON Lines, one text
per line: {"slide_id": "a" or ["a", "b"], "case_id": "p", "caption": "...", "subcaptions": [...]}, of which only a
caption and a slide_id or case_id are required. SlideInstruct (also with the fine-grained concepts of PathFLIP2),
WSI-Bench, WSI-VQA and SlideBench files are read as published.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.cells import as_text
from pathflip_jax.data.texts.choices import OPTION, answer_letter, row_options
from pathflip_jax.data.texts.identity import (
    Cases,
    SlideNames,
    barcode_patient,
    clean_id,
    fold_slide,
    is_empty,
    is_missing,
)
from pathflip_jax.data.texts.split_files import SPLITS, SlideTableFile, read_split_rows
from pathflip_jax.data.texts.tables import Row, read_rows

IMAGE = "<image>"  # position of the slide in a prompt
SLIDE_COLUMNS = ("slide_id", "slide_ids", "slide", "slides", "image", "images", "filename", "file")
_CASE = ("case_id", "patient_id", "case", "patient")
_CAPTION = ("caption", "report", "text")
_CONCEPTS, _DESCRIPTION = "fine_grained_concepts", "visual_description"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideText:
    """Text of a slide, or of the slides of a case as one bag.

    `slide_ids` may be empty if the table names only a case; `case_id` is empty if the table does not give it (TCGA
    barcodes do). `subcaptions` are those given with the caption; None = sample them from its sentences.
    """

    slide_ids: tuple[str, ...]
    case_id: str
    caption: str
    subcaptions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Question:
    """A question about a slide. With `options` (letter -> text) the answer is a letter, otherwise free text.

    `category` is the narrowest one in the table, `broad_category` the broad one of SlideBench-VQA.
    """

    question_id: str
    slide_ids: tuple[str, ...]
    case_id: str
    question: str
    answer: str
    options: dict[str, str] = field(default_factory=dict)
    category: str = ""
    broad_category: str = ""


def read_texts(path: str | Path) -> list[SlideText]:
    """Texts of a table in any supported format, in its order and without duplicate rows.

    Raises ValueError with file and line for a row without a slide or with an empty caption, and for a table of
    questions, which `read_questions` reads.
    """
    rows = read_rows(path)
    texts = [_text(row) for row in rows]
    kept = list(dict.fromkeys(texts))
    if len(kept) < len(texts):
        repeats = len(texts) - len(kept)
        _log.warning("%s: %d of %d rows repeat an earlier one and are left out", path, repeats, len(texts))
    return kept


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a VQA table: SlideBench-VQA, WSI-VQA, WSI-Bench or SlideInstruct, or with columns of these names.

    Options that are null, NaN or empty are dropped; "None" and "unknown" are options and answers like any other. Raises
    ValueError with file and line for a row without question or answer, for indistinguishable options, and for an answer
    that matches none of its options or is ambiguous between two.
    """
    rows = enumerate(read_rows(path), 1)
    return [question for number, row in rows for question in row_questions(row, number)]


def row_questions(row: Row, number: int) -> list[Question]:
    """Questions of a row of `read_questions`: one, or one for each turn of a conversation."""
    slide_ids, case_id = row_slides(row)
    name = row_name(row, number)
    category = row.text("narrow category", "category", "broad category", "task", "type")
    broad = row.text("broad category")
    if row.first("conversations"):
        turns = turns_without_image(row)
    else:
        turns = [(as_text(row.first_nonempty("question")), _answer(row))]
    questions = []
    for turn, (asked, answer) in enumerate(turns):
        if not asked or not answer:
            what = "answer" if asked else "question"
            raise ValueError(f"{row.place}: no {what}; write it or remove the row, {row_columns(row)}")
        asked, options = row_options(row, asked)
        answer = answer_letter(row, answer, options) if options else answer
        turn_name = name if len(turns) == 1 else f"{name}/{turn}"
        questions.append(Question(turn_name, slide_ids, case_id, asked, answer, options, category, broad))
    return questions


def _answer(row: Row) -> str:
    given = row.first_nonempty("answer")
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if isinstance(given, list | dict):
        raise ValueError(f"{row.place}: an answer must be one text, not {given!r:.60}; a question has one right answer")
    return as_text(given)


def read_slide_table(table: SlideTableFile) -> list[dict[str, str]]:
    """Rows of a slide table, or of a split file of CLAM or Patho-Bench (`read_split_rows`), as read by `slide_row`.

    Raises ValueError with file and line as `slide_row` does, and for a slide listed twice, also in two spellings.
    """
    found: list[dict[str, str]] = []
    places: dict[str, tuple[str, str]] = {}
    for row in read_split_rows(table):
        found.append(slide_row(row))
        slide = found[-1]["slide_id"]
        other, place = places.setdefault(fold_slide(slide, zeros=True), (slide, row.place))
        if place != row.place:
            spelt = "" if other == slide else f" as {other}"
            raise ValueError(
                f"{row.place}: slide {slide} is listed more than once (first in {place}{spelt}); "
                "a slide may be listed only once, remove the others"
            )
    return found


def slide_row(row: Row) -> dict[str, str]:
    """Row of a slide table: slide_id, case_id, patient_id, label, split, and the table's other columns unchanged.

    Case and patient substitute for each other, TCGA and CPTAC barcodes for both; missing values are "". The split is
    train, val, test or "". Raises ValueError with file and line for a row without a slide id and for an unknown split.
    """
    raw = row.first(*SLIDE_COLUMNS)
    slide = clean_id(as_text(raw)) if isinstance(raw, str | int | float) else ""
    if not slide:
        raise ValueError(f"{row.place}: no slide id; a column slide_id is needed, {row_columns(row)}")
    split = row.text("split").lower()
    if split not in SPLITS:
        raise ValueError(f"{row.place}: split {split!r} of slide {slide}; expected train, val, test or nothing")
    case = row.text("case_id", "patient_id", "case", "patient") or barcode_patient(slide)
    patient = row.text("patient_id", "case_id", "patient", "case") or case
    known = {"slide_id": slide, "case_id": case, "patient_id": patient, "split": SPLITS[split]}
    return {"label": ""} | {name: row.text(name) for name in row.values} | known


def match_texts(texts: Sequence[SlideText], slide_ids: Sequence[str], case_ids: Cases | None = None) -> list[SlideText]:
    """Texts of these slides, with `slide_ids` in the slides' spelling.

    An id matches an identical id, then the same file name ignoring folder, extension and case, then TCGA ids of which
    one lacks the `.UUID`, if the match is unique: DX1 is not DX10 (`SlideNames`). A text of a case (its id, or no slide
    at all) gets all slides of that case; `case_ids` gives the case of each slide, as do TCGA and CPTAC barcodes. Texts
    without a match are dropped and logged with their count. Raises ValueError when nothing matches.
    """
    found = match_slides([(text.slide_ids, text.case_id) for text in texts], slide_ids, case_ids)
    return [replace(text, slide_ids=slides) for text, slides in zip(texts, found, strict=True) if slides]


def match_slides(
    named: Sequence[tuple[Sequence[str], str]], slide_ids: Sequence[str], case_ids: Cases | None = None
) -> list[tuple[str, ...]]:
    """Slides of each text by its (slide ids, case id), matched as in `match_texts`; () without a match."""
    known = SlideNames(slide_ids, case_ids)
    matched, lost, samples = [], 0, []
    for names, case in named:
        slides = [known.find(name) or known.of_case(name) for name in names] or [known.of_case(case)]
        found = list(dict.fromkeys(slide for some_slides in slides for slide in some_slides))
        missing = [name for name, own in zip(names or [case], slides, strict=True) if not own]
        lost += len(missing)
        samples += missing
        matched.append(tuple(found))
    if not any(matched):
        raise ValueError(
            f"none of the {len(named)} texts belongs to any of the {len(slide_ids)} slides: the texts name "
            f"{preview(samples)}, the slides are {preview(slide_ids)}; give the table of these slides, or change its "
            "ids to those of the slides (file names without extension)"
        )
    silent = sorted(set(slide_ids) - {slide for found in matched for slide in found})
    if other := {
        clean_id(name): found[0]
        for (names, _), found in zip(named, matched, strict=True)
        for name in names
        if len(names) == len(found) == 1 and clean_id(name) != clean_id(found[0]) and known.find(name)
    }:
        pairs = [f"{name} is slide {slide}" for name, slide in other.items()]
        _log.warning("%d ids of the text table are spelt differently from the slides (%s)", len(other), preview(pairs))
    if lost:
        _log.warning("%d ids of the text table match no slide (%s) and are left out", lost, preview(samples))
    if silent:
        _log.warning("%d of %d slides have no text (%s)", len(silent), len(slide_ids), preview(silent))
    return matched


def match_rows(
    rows: Sequence[Mapping[str, str]], slide_ids: Sequence[str], table: object
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Slide table row of each slide that has one, and notes, matched by `rename_rows`."""
    renamed, notes = rename_rows(rows, slide_ids, table)
    known = set(slide_ids)
    return {row["slide_id"]: row for row in renamed if row["slide_id"] in known}, notes


def rename_rows(
    rows: Sequence[Mapping[str, str]], slide_ids: Sequence[str], table: object
) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of a slide table with `slide_id` in the spelling of the matching slide, and notes.

    The notes list ids that matched only in another spelling, and rows without a slide. Raises ValueError for two rows
    of one slide; `table` is the table's name for messages.
    """
    known, exact = SlideNames(slide_ids), {row["slide_id"] for row in rows}
    renamed: list[dict[str, str]] = []
    spelt: dict[str, str] = {}
    absent = []
    for row in rows:
        name = row["slide_id"]
        slide = next(iter(known.find(name)), None)
        if slide is None or (name != slide and slide in exact):  # the slide has a row with its exact name
            absent.append(name)
            renamed.append(dict(row))
            continue
        if slide in spelt:
            both = f"{spelt[slide]} and {name} are both slide {slide}"
            raise ValueError(f"{table}: {both}; a slide may be listed only once, remove one of the rows")
        spelt[slide] = name
        renamed.append(dict(row) | {"slide_id": slide})
    notes = []
    if other := [f"{name} is slide {slide}" for slide, name in spelt.items() if name != slide]:
        notes.append(f"{len(other)} ids of {table} are spelt differently from the slides ({preview(other)})")
    if absent:
        notes.append(f"{len(absent)} of {len(rows)} rows of {table} match no slide ({preview(absent)})")
    return renamed, notes


def _text(row: Row) -> SlideText:
    slide_ids, case_id = row_slides(row)
    if row.first("conversations"):
        turns = turns_without_image(row)
        if any(OPTION.search(asked) and len(answer) <= 2 for asked, answer in turns):
            raise ValueError(f"{row.place}: a multiple-choice question; read_questions reads tables of questions")
        caption = "\n".join(answer for _, answer in turns)
    elif has_caption(row):
        caption = _caption(row)
    else:
        hint = "; read_questions reads tables of questions" if "answer" in row.values else ""
        raise ValueError(f"{row.place}: no column caption, {row_columns(row)}{hint}")
    return SlideText(slide_ids, case_id, _checked_caption(row, caption, slide_ids, case_id), _subcaptions(row))


def has_caption(row: Row) -> bool:
    """Whether a row has a column for a caption, even if empty."""
    return any(name in row.values for name in _CAPTION)


def row_caption(row: Row) -> str:
    """Caption of a row that has a column for it. Raises ValueError if it is empty."""
    return _checked_caption(row, _caption(row), *row_slides(row))


def _caption(row: Row) -> object:
    """First caption that is not missing, else the content of its column."""
    return row.first(*_CAPTION) or next(row.values[name] for name in _CAPTION if name in row.values)


def _checked_caption(row: Row, caption: object, slide_ids: tuple[str, ...], case_id: str) -> str:
    if is_missing(caption) or not isinstance(caption, str) or not any(letter.isalnum() for letter in caption):
        raise ValueError(
            f"{row.place}: the caption of {preview(slide_ids) or case_id} is empty ({str(caption)[:20]!r}); "
            "write it or remove the row"
        )
    return caption


def _subcaptions(row: Row) -> tuple[str, ...] | None:
    given = row.listed("subcaptions") or _descriptions(row)
    if isinstance(given, str):
        given = given.splitlines()
    if not isinstance(given, list) or not all(isinstance(item, str) or is_empty(item) for item in given):
        raise ValueError(f"{row.place}: subcaptions must be a list of texts (in CSV, one per line), not {given!r:.60}")
    given = [item for item in given if isinstance(item, str)]  # lists are padded with null
    if any(is_missing(item) or not any(letter.isalnum() for letter in item) for item in given):
        raise ValueError(f"{row.place}: an empty subcaption; write it or remove it")
    return tuple(item.strip() for item in given) or None


def _descriptions(row: Row) -> list[str]:
    """Subcaptions of a row in the format of PathFLIP2's code: objects with a visual description."""
    found = row.listed(_CONCEPTS) or []
    found = [one for one in found if not is_empty(one)] if isinstance(found, list) else found
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.get(_DESCRIPTION) for one in found):
        raise ValueError(f"{row.place}: {_CONCEPTS} must be a list of objects with a {_DESCRIPTION}, not {found!r:.60}")
    return [one[_DESCRIPTION] for one in found]


def row_name(row: Row, number: int) -> str:
    """Name of a row: its id, unless that is the slide's or patient's, else its number."""
    return row.text("question_id") or (row.text(*SLIDE_COLUMNS, *_CASE) and row.text("id")) or str(number)


def row_slides(row: Row) -> tuple[tuple[str, ...], str]:
    """Slide ids and case of a row; WSI-VQA has neither, only an `Id`, which is the patient."""
    given = row.listed(*SLIDE_COLUMNS)
    case = row.text(*_CASE)
    if given == "" and not case:
        given = row.first("id")
    if isinstance(given, str):
        given = given.split(";")
    given = [name for name in (given if isinstance(given, list) else [given]) if not is_missing(name)]
    if not all(isinstance(name, str | int | float) for name in given):
        raise ValueError(f"{row.place}: slide ids must be texts, not {given!r:.60}")
    slide_ids = tuple(dict.fromkeys(filter(None, (clean_id(as_text(name)) for name in given))))
    if not slide_ids and not case:
        raise ValueError(f"{row.place}: no slide; a column slide_id or case_id is needed, {row_columns(row)}")
    return slide_ids, case or (barcode_patient(slide_ids[0]) if slide_ids else "")


def row_turns(row: Row) -> list[tuple[str, str]]:
    """Question-answer pairs of the conversation in a row, in order. Raises ValueError for anything else."""
    turns = row.listed("conversations")
    try:
        spoken = [(turn["from"], str.strip(turn["value"])) for turn in turns]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{row.place}: conversations must be a list of {{"from", "value"}}, found {turns!r:.80}'
        ) from error
    if [who for who, _ in spoken] != ["human", "gpt"] * (len(spoken) // 2) or not spoken:
        raise ValueError(
            f"{row.place}: human and gpt must alternate, found {[who for who, _ in spoken]!s:.80}; merge the turns "
            "of one speaker, and add what is missing or remove the row"
        )
    return [(spoken[i][1], spoken[i + 1][1]) for i in range(0, len(spoken), 2)]


def turns_without_image(row: Row) -> list[tuple[str, str]]:
    """`row_turns` without the image token; an answer that is empty or "nan" is ""."""
    turns = [(asked.replace(IMAGE, "").strip(), answer.replace(IMAGE, "").strip()) for asked, answer in row_turns(row)]
    return [(asked, "" if is_empty(answer) else answer) for asked, answer in turns]


def row_columns(row: Row) -> str:
    """Columns of a row, for a message."""
    return f"found {preview((name[:40] or '(no name)' for name in row.values), 12)}"
