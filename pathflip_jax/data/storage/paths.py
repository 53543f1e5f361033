"""Paths as people write them: `~` and environment variables, which no shell expands behind `=` or in a file.

URLs stay as they are. What cannot be expanded, and what is no text, is an error: a folder called `~` is nobody's wish.
"""

import os
import re
from collections.abc import Sequence

from pathflip_jax.data.storage.files import is_url

# $$ is a dollar sign itself; $5 is no variable, and stays.
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{(\w+)\})")


def expand(text: str) -> str:
    """The text with `~` at its start, `$NAME` and `${NAME}` expanded; a URL as it is.

    Raises ValueError for a variable that is not set, naming it, and for a `~` of nobody known.
    """
    if is_url(text):
        return text
    expanded = _VARIABLE.sub(_value_in(text), text)
    if expanded.startswith("~"):
        expanded = os.path.expanduser(expanded)
    if expanded.startswith("~"):
        owner = expanded.partition("/")[0]
        why = "HOME is not set, and this user has no home folder" if owner == "~" else f"no user is called {owner[1:]}"
        raise ValueError(f"{text}: {owner} cannot be expanded, {why}; write the path out (./{text} if it is a name)")
    require_text(expanded)
    return expanded


def _value_in(text: str):
    """A function from a match of `_VARIABLE` to what stands for it."""

    def value(match: re.Match) -> str:
        if match.group(1):
            return "$"
        name = match.group(2) or match.group(3)
        if name not in os.environ:
            raise ValueError(
                f"{text}: the environment variable {name} is not set; set it (export {name}=...), or write the path "
                "out ($$ stands for a dollar sign)"
            )
        return os.environ[name]

    return value


def require_text(*texts: str) -> None:
    """Raise ValueError for a text with bytes that are no UTF-8, which Python carries along until it writes them."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = "".join(f"\\x{ord(x) - 0xDC00:02x}" if "\udc80" <= x <= "\udcff" else x for x in text)
            raise ValueError(
                f"{shown.encode(errors='backslashreplace').decode()}: bytes that are no UTF-8; such a name cannot be "
                "written into records, tables and configs: rename the file or folder (convmv does a whole tree), or "
                "set LC_ALL=C.UTF-8 if it is UTF-8"
            ) from None


def refuse_undecodable(argv: Sequence[str]) -> None:
    """Raise ValueError for bytes that are no UTF-8 in an argument or in the name of the current folder."""
    require_text(*argv, _current_folder())


def _current_folder() -> str:
    try:
        return os.fsdecode(os.getcwdb())
    except FileNotFoundError:  # it was deleted: relative paths fail where they are used
        return ""
