"""Cells of a table as texts and as lists, whichever program wrote them: ids that became floats, lists that became text.

A data frame writes a list into CSV as Python shows it (`['Yes', 'No']`, or `['Yes' 'No']` where it was an array), other
programs as JSON.
"""

import ast
import io
import json
import tokenize
import warnings
from typing import Any

from pathflip_jax.data.texts.identity import is_empty

LONGEST_LIST = 2**18  # characters of a list written as text
_CONSTANTS = {"nan": "None", "NaN": "None", "NaT": "None", "null": "None", "true": "True", "false": "False"}
_SPACE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


def as_text(value: Any) -> str:
    """A cell as text, "" where it is empty; a whole number that became a float (123.0) is whole again."""
    if is_empty(value):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def as_list(value: Any) -> Any:
    """The list or object that a text writes, else the value as it is. Nothing is ever evaluated but plain values."""
    if not isinstance(value, str) or (value.strip()[:1], value.strip()[-1:]) not in {("[", "]"), ("{", "}")}:
        return value
    text = value.strip()
    if len(text) > LONGEST_LIST:
        raise ValueError(f"a list of {len(text)} characters as text, expected at most {LONGEST_LIST}; use JSON Lines")
    try:
        found = _parsed(text)
        json.dumps(found, ensure_ascii=False, default=str).encode()  # half a surrogate pair cannot be written again
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        with warnings.catch_warnings(action="ignore"):  # of "\d" in a text
            return ast.literal_eval(_python(text))


def _python(text: str) -> str:
    """The text with commas where NumPy leaves them out, and constants as Python spells them.

    Raises ValueError for values with neither comma nor white space between them, such as 0045 or 'it''s'.
    """
    found: list[str] = []
    values = {tokenize.STRING, tokenize.NUMBER, tokenize.NAME}
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _SPACE:
            continue
        if before and token.type in values and before.type in values:
            if token.start == before.end:
                raise ValueError(f"{before.string} and {token.string} are not parted")
            found.append(",")
        found.append(_CONSTANTS.get(token.string, token.string))
        before = token
    return " ".join(found).strip()
