"""JSON parsing with a single error type that names the file."""

import json
import re
from typing import Any

from pathflip_jax.data.storage.files import Place

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, **options: Any) -> Any:
    """Parsed JSON, with ValueError as the only error, including for too deep nesting and invalid Unicode.

    `options` are those of `json.loads`. A lone surrogate (`"\\ud800"`) is refused, as it cannot be encoded again.
    """
    try:
        found = json.loads(text, **options)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {error.object[error.start]!r}, which is not a character") from None
    return found


def json_object(path: Place, data: bytes) -> dict[str, Any]:
    """Object in a small JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        found = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not an object; copy the file again")
    return found
