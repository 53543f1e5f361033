"""Questions to a language model about slides, and their answers, from any table of texts (DESIGN, sections 5 and 7).

Conversations of SlideInstruct are taken as they are; a caption answers an instruction, and the options of a question
are asked a line each (`ask`, which evaluation uses too, so that a model is tested as it was taught).
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

DESCRIBE = "Describe the input pathology whole slide image."  # what a caption answers that comes without a question


class Turn(NamedTuple):
    """A question and its answer; `asked` may hold IMAGE, where the slide stands."""

    asked: str
    answer: str


class Conversation(NamedTuple):
    """Turns about a slide, or about the slides of a case as one bag; the first of them holds IMAGE, once.

    `slide_ids` and `case_id` as in `SlideText`.
    """

    conversation_id: str
    slide_ids: tuple[str, ...]
    case_id: str
    turns: tuple[Turn, ...]


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a table, a row each: of SlideInstruct or WSI-Bench, of captions, or of questions.

    A caption answers the question of its row, else DESCRIBE. Questions with options are asked as `ask` does and
    answered by the letter; turns of a conversation too, where the answer is an option and nothing more. Where no IMAGE
    is written, it comes first. Raises ValueError with file and line for a row without a slide, question or answer, and
    for an IMAGE that is written twice, in an answer or later than the first turn.
    """
    return [_conversation(row, number) for number, row in enumerate(read_rows(path), 1)]


def ask(question: Question) -> str:
    """The prompt of a question: its text, then its options, "A. text", a line each."""
    return "\n".join([question.question, *(f"{letter}. {text}" for letter, text in question.options.items())])


def read_mixture(tables: str) -> list[tuple[Place, int]]:
    """Tables that are learnt together, and how often each is seen in an epoch: "reports.jsonl*2, vqa.csv".

    Raises ValueError that names the part that is wrong.
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
                f"part {number} of {tables!r:.200}: {name} is to be seen {times!r:.20} times in an epoch; expected a "
                "whole number of at least 1 behind the *, and no other * in the name"
            )
        place = as_path(name)
        if place in [known for known, _ in mixture]:
            raise ValueError(f"part {number} of {tables!r:.200} names {name} again; name it once, with *2 behind it")
        mixture.append((place, int(times)))
    return mixture


def match_conversations(
    conversations: Sequence[Conversation], slide_ids: Sequence[str], case_ids: Cases | None = None
) -> list[Conversation]:
    """The conversations about these slides, with their `slide_ids` spelt as the slides'; matched as `match_texts`."""
    found = match_slides([(talk.slide_ids, talk.case_id) for talk in conversations], slide_ids, case_ids)
    return [talk._replace(slide_ids=slides) for talk, slides in zip(conversations, found, strict=True) if slides]


def _conversation(row: Row, number: int) -> Conversation:
    slide_ids, case_id = row_slides(row)
    if row.first("conversations") or ("conversations" in row.values and not has_caption(row)):
        turns = [_turn(row, asked, answer) for asked, answer in row_turns(row)]
    elif "answer" in row.values and not (row.said("answer") == "" and has_caption(row)):
        turns = [Turn(ask(question), question.answer) for question in row_questions(row, number)]
    elif has_caption(row):
        instruction = row.said("question") or DESCRIBE
        if not isinstance(instruction, str):
            raise ValueError(f"{row.place}: a question must be a text, not {instruction!r:.60}")
        turns = [Turn(instruction, row_caption(row).strip())]
    else:
        raise ValueError(
            f"{row.place}: nothing is answered; columns question and answer are needed, or caption, or conversations, "
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
            found = f"nothing but {IMAGE}" if asked else "nothing"
            raise ValueError(f"{where}: {found} is asked; write the question, or remove the row")
        if is_empty(answer):
            raise ValueError(f"{where}: the answer to {asked!r:.60} is empty; write it or remove the row")
        if IMAGE in answer:
            raise ValueError(f"{where}: {IMAGE} in the answer {answer!r:.60}; it belongs into the first question")
        if asked.count(IMAGE) > 1:
            raise ValueError(
                f"{where}: {asked.count(IMAGE)} times {IMAGE} in {asked!r:.60}; all slides of a conversation stand in "
                "one place, write it once"
            )
        if IMAGE in asked and number > 1:
            raise ValueError(f"{where}: {IMAGE} in {asked!r:.60}; it belongs into the first turn, move it there")


def _turn(row: Row, asked: str, answer: str) -> Turn:
    """A turn as it is; one that is answered by an option and no more is asked as all such questions are."""
    question, options = row_options(row, asked)
    behind = any(IMAGE in text for text in options.values())  # the slide stands behind the last option
    options = {letter: text.replace(IMAGE, "").strip() for letter, text in options.items()}
    letter = _letter(answer, options)
    if not letter or asked.count(IMAGE) > 1:
        return Turn(asked, answer)
    text = ask(Question("", (), "", question, answer, options))
    return Turn(f"{text}\n{IMAGE}" if behind else text, letter)


def _letter(answer: str, options: dict[str, str]) -> str:
    """The letter of an answer given as "B", "B) text" or the text of an option; "" for one that says anything else."""
    match = re.fullmatch(r"\(?([A-Ha-h])(?:[).:]+\s*(.*))?", answer, re.DOTALL)
    named = same_text(answer, options)
    if match and (letter := match.group(1).upper()) in options:
        said = match.group(2) or ""
        if letter in same_text(said, options) if said else letter in (named or [letter]):
            return letter
        return ""
    return named[0] if named else ""
