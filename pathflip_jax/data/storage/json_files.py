"""JSON files of a run, with atomic writes."""

import json
from pathlib import Path

from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, as_path, read_bytes
from pathflip_jax.data.storage.json_values import parse_json


def write_json(path: Place, content: dict | list, *, indent: int = 2, **options: bool) -> None:
    """Write a JSON file atomically; further options are those of `json.dumps`."""
    with atomic_file(as_path(path)) as file:
        file.write((json.dumps(content, indent=indent, **options) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON file; ValueError names an invalid one."""
    try:
        found = parse_json(read_bytes(as_path(path)).decode())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); it was not written by this program, restore a copy") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: holds a {type(found).__name__}, expected an object with named values; restore a copy"
        )
    return found
