"""Table cells as texts and lists, undoing conversions by other programs, such as ids to floats and lists to text.

A data frame writes a list to CSV in Python's notation (`['Yes', 'No']`, or `['Yes' 'No']` for an array), other programs
as JSON.
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
    """Cell as text, "" if it is empty; an integer that became a float (123.0) is restored."""
    if is_empty(value):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def as_list(value: Any) -> Any:
    """List or object represented by a text, else the unchanged value. Only plain literals are ever evaluated."""
    if not isinstance(value, str) or (value.strip()[:1], value.strip()[-1:]) not in {("[", "]"), ("{", "}")}:
        return value
    text = value.strip()
    if len(text) > LONGEST_LIST:
        raise ValueError(f"a list of {len(text)} characters as text, expected at most {LONGEST_LIST}; use JSON Lines")
    try:
        found = _parsed(text)
        json.dumps(found, ensure_ascii=False, default=str).encode()  # a lone surrogate cannot be encoded again
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
    """Text with the commas that NumPy omits added, and constants in Python's spelling.

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
                raise ValueError(f"{before.string} and {token.string} are not separated")
            found.append(",")
        found.append(_CONSTANTS.get(token.string, token.string))
        before = token
    return " ".join(found).strip()
