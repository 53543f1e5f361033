"""Slides to encode one by one, and what became of them: the input and output of `slide_encoder.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Encoded:
    """Slide that was encoded into its folder, or the `error` of one that could not be; `notes` are for the user."""

    slide_id: str
    folder: Path
    error: str = ""
    notes: tuple[str, ...] = ()


class Task(NamedTuple):
    """Slide to encode: its id, its file, and the folder of records to write."""

    slide_id: str
    file: Path
    folder: Path
