"""Conversations about slides for the language model, from any table of texts (DESIGN, sections 5 and 7).

Conversations of SlideInstruct are used unchanged; a caption answers an instruction, and the options of a question are
listed one per line (`ask`, also used in evaluation, so that training and test prompts match).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pathflip_jax.data.storage.files import Place, as_path
from pathflip_jax.data.texts.choices import row_options, same_text
from pathflip_jax.data.texts.identity import Cases, is_empty
from pathflip_jax.data.texts.tables import Row, read_rows
from pathflip_jax.data.texts.text import (
    IMAGE,
    Question,
    has_caption,
    match_slides,
    row_caption,
    row_columns,
    row_name,
    row_questions,
    row_slides,
    row_turns,
)

DESCRIBE = "Describe the input pathology whole slide image."  # the instruction for a caption without a question


class Turn(NamedTuple):
    """A question and its answer; `asked` may contain IMAGE, the position of the slide."""

    asked: str
    answer: str


class Conversation(NamedTuple):
    """Turns about a slide, or about the slides of a case as one bag; the first contains IMAGE once.

    `slide_ids` and `case_id` as in `SlideText`.
    """

    conversation_id: str
    slide_ids: tuple[str, ...]
    case_id: str
    turns: tuple[Turn, ...]


def read_conversations(path: str | Path) -> list[Conversation]:
    """Conversations of a table, one per row: of SlideInstruct or WSI-Bench, of captions, or of questions.

    A caption answers the question of its row, else DESCRIBE. Questions with options are formatted by `ask` and answered
    by the letter, as are turns of a conversation whose answer is exactly one of the options. If IMAGE is missing, it is
    put first. Raises ValueError with file and line for a row without a slide, question or answer, and for an IMAGE that
    occurs twice, in an answer or after the first turn.
    """
    return [_conversation(row, number) for number, row in enumerate(read_rows(path), 1)]


def ask(question: Question) -> str:
    """Prompt of a question: its text, then its options, "A. text", one per line."""
    return "\n".join([question.question, *(f"{letter}. {text}" for letter, text in question.options.items())])


def read_mixture(tables: str) -> list[tuple[Place, int]]:
    """Tables of a training mixture, with their repetitions per epoch: "reports.jsonl*2, vqa.csv".

    Raises ValueError naming the invalid part.
    """
    mixture: list[tuple[Place, int]] = []
    for number, part in enumerate(tables.split(","), 1):
        name, star, times = (text.strip() for text in part.rpartition("*")) if "*" in part else (part.strip(), "", "1")
        if not name:
            raise ValueError(
                f"part {number} of {tables!r:.200} names no table; expected tables like reports.jsonl*2,vqa.csv"
            )
        if not re.fullmatch(r"0*[1-9][0-9]{0,5}", times, re.ASCII):
            raise ValueError(
                f"part {number} of {tables!r:.200}: {name} has the repetition count {times!r:.20}; expected a whole "
                "number of at least 1 after the *, and no other * in the name"
            )
        place = as_path(name)
        if place in [known for known, _ in mixture]:
            raise ValueError(f"part {number} of {tables!r:.200} names {name} again; name it once, followed by *2")
        mixture.append((place, int(times)))
    return mixture


def match_conversations(
    conversations: Sequence[Conversation], slide_ids: Sequence[str], case_ids: Cases | None = None
) -> list[Conversation]:
    """Conversations about these slides, with `slide_ids` in the slides' spelling; matched as in `match_texts`."""
    found = match_slides([(talk.slide_ids, talk.case_id) for talk in conversations], slide_ids, case_ids)
    return [talk._replace(slide_ids=slides) for talk, slides in zip(conversations, found, strict=True) if slides]


def _conversation(row: Row, number: int) -> Conversation:
    slide_ids, case_id = row_slides(row)
    if row.first("conversations") or ("conversations" in row.values and not has_caption(row)):
        turns = [_turn(row, asked, answer) for asked, answer in row_turns(row)]
    elif "answer" in row.values and not (row.first_nonempty("answer") == "" and has_caption(row)):
        turns = [Turn(ask(question), question.answer) for question in row_questions(row, number)]
    elif has_caption(row):
        instruction = row.first_nonempty("question") or DESCRIBE
        if not isinstance(instruction, str):
            raise ValueError(f"{row.place}: a question must be a text, not {instruction!r:.60}")
        turns = [Turn(instruction, row_caption(row).strip())]
    else:
        raise ValueError(
            f"{row.place}: no answer; columns question and answer are needed, or caption, or conversations, "
            f"{row_columns(row)}"
        )
    _check_turns(row, turns)
    if IMAGE not in turns[0].asked:
        turns[0] = Turn(f"{IMAGE}\n{turns[0].asked}", turns[0].answer)
    return Conversation(row_name(row, number), slide_ids, case_id, tuple(turns))


def _check_turns(row: Row, turns: Sequence[Turn]) -> None:
    for number, (asked, answer) in enumerate(turns, 1):
        where = row.place if len(turns) == 1 else f"{row.place}, turn {number}"
        if not asked.replace(IMAGE, "").strip():
            found = f"holds only {IMAGE}" if asked else "is empty"
            raise ValueError(f"{where}: the question {found}; write it, or remove the row")
        if is_empty(answer):
            raise ValueError(f"{where}: the answer to {asked!r:.60} is empty; write it or remove the row")
        if IMAGE in answer:
            raise ValueError(f"{where}: {IMAGE} in the answer {answer!r:.60}; it belongs in the first question")
        if asked.count(IMAGE) > 1:
            raise ValueError(
                f"{where}: {asked.count(IMAGE)} times {IMAGE} in {asked!r:.60}; all slides of a conversation are "
                "inserted in one place, so write it once"
            )
        if IMAGE in asked and number > 1:
            raise ValueError(f"{where}: {IMAGE} in {asked!r:.60}; it belongs in the first turn; move it there")


def _turn(row: Row, asked: str, answer: str) -> Turn:
    """A turn, with the standard multiple-choice prompt if its answer is exactly one of the options."""
    question, options = row_options(row, asked)
    image_last = any(IMAGE in text for text in options.values())  # IMAGE then follows the last one
    options = {letter: text.replace(IMAGE, "").strip() for letter, text in options.items()}
    letter = _letter(answer, options)
    if not letter or asked.count(IMAGE) > 1:
        return Turn(asked, answer)
    text = ask(Question("", (), "", question, answer, options))
    return Turn(f"{text}\n{IMAGE}" if image_last else text, letter)


def _letter(answer: str, options: dict[str, str]) -> str:
    """Letter of an answer given as "B", "B) text" or the text of an option; "" for any other answer."""
    match = re.fullmatch(r"\(?([A-Ha-h])(?:[).:]+\s*(.*))?", answer, re.DOTALL)
    named = same_text(answer, options)
    if match and (letter := match.group(1).upper()) in options:
        text = match.group(2) or ""
        if letter in same_text(text, options) if text else letter in (named or [letter]):
            return letter
        return ""
    return named[0] if named else ""
