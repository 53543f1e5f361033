"""Slides that could not be done in a job over many, which goes on without them and tells of them at its end."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Failure(NamedTuple):
    """A slide that is missing from what a job made: its id, the file it comes from and what was wrong with it."""

    slide: str
    file: str
    error: str


def list_failures(failed: Sequence[Failure], most: int = 20) -> list[str]:
    """A line for each of the first failures, and how many more there are."""
    lines = [f"  {failure.slide}: {failure.error}" for failure in failed[:most]]
    return lines + [f"  and {len(failed) - most} more"] * (len(failed) > most)


def preview(names: Iterable[object], most: int = 3) -> str:
    """A few names for a message, and how many more there are."""
    names = [str(name) for name in names]
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
