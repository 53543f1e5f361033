"""Recognition of URLs among paths."""

import re

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")  # with a single slash: mangled by pathlib


def is_url(place: object) -> bool:
    """Whether a text or path is a URL; file:// is local."""
    match = URL.match(str(place))
    return bool(match) and match.group(2) == "//" and match.group(1) != "file"
