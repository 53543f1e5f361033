"""Expansion of `~` and environment variables in paths, which no shell expands after `=` or in a file.

URLs are unchanged. Anything that cannot be expanded or decoded is an error: a folder called `~` is never intended.
"""

import os
import re
from collections.abc import Sequence

from pathflip_jax.data.storage.urls import is_url

# $$ is a literal dollar sign; $5 is not a variable, and is kept.
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{(\w+)\})")


def expand(text: str) -> str:
    """Text with a leading `~`, `$NAME` and `${NAME}` expanded; URLs are unchanged.

    Raises ValueError for an unset variable, naming it, and for a `~` of an unknown user.
    """
    if is_url(text):
        return text
    expanded = _VARIABLE.sub(_value_in(text), text)
    if expanded.startswith("~"):
        expanded = os.path.expanduser(expanded)
    if expanded.startswith("~"):
        owner = expanded.partition("/")[0]
        why = "HOME is not set, and this user has no home folder" if owner == "~" else f"no user is called {owner[1:]}"
        raise ValueError(
            f"{text}: {owner} cannot be expanded, {why}; write the full path (./{text} if that is its name)"
        )
    require_text(expanded)
    return expanded


def _value_in(text: str):
    """Function from a match of `_VARIABLE` to its replacement."""

    def value(match: re.Match) -> str:
        if match.group(1):
            return "$"
        name = match.group(2) or match.group(3)
        if name not in os.environ:
            raise ValueError(
                f"{text}: the environment variable {name} is not set; set it (export {name}=...), or write the full "
                "path ($$ stands for a dollar sign)"
            )
        return os.environ[name]

    return value


def require_text(*texts: str) -> None:
    """Raise ValueError for a text with non-UTF-8 bytes, which Python would only refuse on writing."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = "".join(f"\\x{ord(x) - 0xDC00:02x}" if "\udc80" <= x <= "\udcff" else x for x in text)
            raise ValueError(
                f"{shown.encode(errors='backslashreplace').decode()}: not valid UTF-8; such a name cannot be "
                "written into records, tables and configs: rename the file or folder (convmv renames a whole tree), "
                "or set LC_ALL=C.UTF-8 if the name is UTF-8"
            ) from None


def refuse_undecodable(argv: Sequence[str]) -> None:
    """Raise ValueError for non-UTF-8 bytes in an argument or in the name of the current folder."""
    require_text(*argv, _current_folder())


def _current_folder() -> str:
    try:
        return os.fsdecode(os.getcwdb())
    except FileNotFoundError:  # the folder was deleted: relative paths fail on use
        return ""
