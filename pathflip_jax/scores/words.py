"""The words of a text, as every score of captions, answers and concepts counts them.

Captioning scores are published on the tokens of Stanford's PTB tokenizer (Java, in pycocoevalcap): lower case, without
punctuation. These words are the same in running text: "1.8", "pt2b", "gland-forming" and "her2/neu" are one word each,
"patient's" is two ("patient", "'s"), and so is "doesn't" ("does", "n't"). They differ where PTB keeps signs (%, +, =,
and brackets as "-lrb-"), all dropped here, and in abbreviations ("no." keeps its full stop there). Of the 105,545
tokens that PTB makes of the 732 SlideBench captions, 98.2% are the same, 99.9% of those that are no signs.
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
    """A word in lower case, and where it stands in the text: characters `start` to `end`."""

    text: str
    start: int
    end: int


def find_words(text: str) -> list[Word]:
    """The words of a text with their places."""
    return [Word(match.group().lower().replace("’", "'"), *match.span()) for match in _WORD.finditer(text)]


def words(text: str) -> list[str]:
    """The words of a text."""
    return [word.text for word in find_words(text)]


def normal_form(text: str) -> str:
    """The text as answers are compared: its words without articles, one space apart."""
    return " ".join(word for word in words(text) if word not in _ARTICLES)
