"""Failed slides of a batch job, which continues without them and reports them at its end."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Failure(NamedTuple):
    """A failed slide: its id, its file and the reason."""

    slide: str
    file: str
    error: str


def list_failures(failed: Sequence[Failure], most: int = 20) -> list[str]:
    """A line for each of the first failures, and the number of others."""
    lines = [f"  {failure.slide}: {failure.error}" for failure in failed[:most]]
    return lines + [f"  and {len(failed) - most} more"] * (len(failed) > most)


def preview(names: Iterable[object], most: int = 3) -> str:
    """A few names for a message, and the number of others."""
    names = [str(name) for name in names]
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
