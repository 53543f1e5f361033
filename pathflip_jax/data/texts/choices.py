"""Answer options of a question, in every format of the supported tables, and the letter of an answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pathflip_jax.data.texts.cells import as_text
from pathflip_jax.data.texts.identity import fold
from pathflip_jax.data.texts.tables import Row

OPTION = re.compile(r"(?:^|\s)\(?([A-H])[).:]\s+")  # the label of an option within a text
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLUMNS = "abcdefgh"
_LETTERED = re.compile(r"\(?([A-Z])[).:]\s+(.*)", re.DOTALL)


def row_options(row: Row, asked: str) -> tuple[str, dict[str, str]]:
    """Question without its options, and the options by letter: from a list, from columns, or from the question.

    Raises ValueError for options of another format, for a gap that makes the letters ambiguous, and for a single
    option.
    """
    given = row.listed("choice", "choices", "options")
    try:
        if given != "":
            found = _given_options(given)
        elif columns := {name.upper(): as_text(row.first_nonempty(name)) for name in _COLUMNS if name in row.values}:
            found = {letter: text for letter, text in columns.items() if text}
        else:
            return _asked_options(asked)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error
    if len(found) == 1:
        raise ValueError(f"{row.place}: {found} is the only option; write the others, or ask without options")
    return asked, found


def _given_options(given: Any) -> dict[str, str]:
    """Options by letter from a list of texts or of objects, an object, or one text."""
    if isinstance(given, str):
        given = _split_options(given)
    if isinstance(given, dict):
        named = {str(name).lower(): value for name, value in given.items()}
        if named.keys() == {"label", "text"} and all(isinstance(value, list) for value in named.values()):
            given = dict(zip(named["label"], named["text"], strict=True))
        return {as_text(letter).upper(): text for letter, value in given.items() if (text := _option_text(value))}
    if not isinstance(given, list):
        raise ValueError(f"options must be a list of texts or texts by letter, not {given!r:.60}")
    if given and all(isinstance(one, dict) and {"label", "text"} <= one.keys() for one in given):
        return _given_options({one["label"]: one["text"] for one in given})
    texts = [_option_text(value) for value in given]
    while texts and not texts[-1]:
        texts.pop()
    if "" in texts or len(texts) > len(LETTERS):
        what = f"option {texts.index('') + 1} of {len(texts)} is empty" if "" in texts else f"{len(texts)} options"
        raise ValueError(f"{what}, so their letters are ambiguous; give the options by letter")
    lettered = [_LETTERED.fullmatch(text) for text in texts]
    if all(lettered) and [match[1] for match in lettered] == [*LETTERS[: len(texts)]]:
        texts = [match[2].strip() for match in lettered]
    return dict(zip(LETTERS, texts, strict=False))


def _option_text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise ValueError(f"an option must be a text, not {value!r:.60}")
    return as_text(value)


def _split_options(text: str) -> dict[str, str] | list[str]:
    """Options in a text: labelled by letters, else one per line, or separated by ; or |."""
    asked, options = _asked_options(text)
    if options and not asked:
        return {letter: option.rstrip(" ;|,") for letter, option in options.items()}
    for mark in ("\n", "|", ";"):
        if len(parts := [part.strip() for part in text.split(mark) if part.strip()]) > 1:
            return parts
    raise ValueError(f"the options {text!r:.60} cannot be separated; write a list, or one per line")


def _asked_options(asked: str) -> tuple[str, dict[str, str]]:
    """Question without its inline options ("A) Yes B) No"), and these options."""
    found = list(OPTION.finditer(asked))
    if len(found) < 2 or [match.group(1) for match in found] != [*LETTERS[: len(found)]]:
        return asked, {}
    ends = [match.start() for match in found[1:]] + [len(asked)]
    options = {m.group(1): asked[m.end() : end].strip() for m, end in zip(found, ends, strict=True)}
    return asked[: found[0].start()].strip(), options


def same_text(answer: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options equal to an answer up to case, or up to ".0" if there is no other match."""
    if not answer.strip(" ."):
        return []
    plain = {letter: text.strip(" .").casefold() for letter, text in options.items()}
    found = [letter for letter, text in plain.items() if text == answer.strip(" .").casefold()]
    return found or [letter for letter, text in options.items() if fold(text) == fold(answer)]


def answer_letter(row: Row, answer: str, options: Mapping[str, str]) -> str:
    """Letter of an answer given as "B", "B) text" or the text of an option."""
    same: Sequence[str] = same_text(answer, options)
    letter = answer.strip().upper()
    if letter in options and same and letter not in same:
        raise ValueError(
            f"{row.place}: the answer {answer!r} is the letter of {options[letter]!r} and the text of option "
            f"{same[0]}; write the letter and the text of the correct one ({letter}. {options[letter]})"
        )
    if letter in options:
        return letter
    if len({options[one] for one in same}) > 1:
        raise ValueError(f"{row.place}: the answer {answer!r:.60} matches each of {', '.join(same)}; write the letter")
    if same:
        return same[0]
    match = re.fullmatch(r"\(?([A-Z])(?:[).:]+\s*(.*))?", answer.strip(), re.IGNORECASE | re.DOTALL)
    if match and (letter := match.group(1).upper()) in options:
        named = same_text(match.group(2) or "", options)
        if named and letter not in named:
            raise ValueError(f"{row.place}: the answer {answer!r:.60} has letter {letter} and the text of {named[0]}")
        return letter
    raise ValueError(f"{row.place}: the answer {answer!r:.60} is none of the options {options}")
