"""Tokenization into words for the metrics of captions, answers and concepts.

Captioning metrics are published on the tokens of Stanford's PTB tokenizer (Java, in pycocoevalcap): lower case, without
punctuation. These words are the same in running text: "1.8", "pt2b", "gland-forming" and "her2/neu" are one word each,
"patient's" is two ("patient", "'s"), and so is "doesn't" ("does", "n't"). PTB differs in keeping symbols (%, +, =, and
brackets as "-lrb-") and the full stop of abbreviations ("no."). Of the 105,545 PTB tokens of the 732 SlideBench
captions, 98.2% are the same, and 99.9% of those that are not symbols.
"""

import re
from typing import NamedTuple

_WORD = re.compile(
    r"[^\W_]+?(?=n['’]t\b)"  # does|n't
    r"|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b"
    r"|[^\W_]+(?:(?:[-/&]|(?<=\d)[.,](?=\d))[^\W_]+)*",
    re.IGNORECASE,
)
_ARTICLES = frozenset(("a", "an", "the"))


class Word(NamedTuple):
    """A word in lower case, at the characters `start` to `end` of the text."""

    text: str
    start: int
    end: int


def find_words(text: str) -> list[Word]:
    """The words of a text with their positions."""
    return [Word(match.group().lower().replace("’", "'"), *match.span()) for match in _WORD.finditer(text)]


def words(text: str) -> list[str]:
    """The words of a text."""
    return [word.text for word in find_words(text)]


def normal_form(text: str) -> str:
    """The normalised text by which answers are compared: its words without articles, separated by spaces."""
    return " ".join(word for word in words(text) if word not in _ARTICLES)
