"""Packing of texts into rows of a few lengths (DESIGN section 5)."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class TextRows(NamedTuple):
    """Rows of one length, each of concatenated texts.

    Segments number the texts of a row from 1, positions the tokens of a text from 0; segment 0 is padding.
    """

    tokens: Int[np.ndarray, "P L"]
    segments: Int[np.ndarray, "P L"]
    positions: Int[np.ndarray, "P L"]


class PackedText(NamedTuple):
    """Packed texts in rows of several lengths, shortest first.

    `cls_index[i]` is the index of the [CLS] of text i in the concatenation of all rows.
    """

    rows: tuple[TextRows, ...]
    cls_index: Int[np.ndarray, "n"]


class PackingOverflowError(ValueError):
    """The texts do not fit into the available rows."""

    def __init__(self, length: int, rows: Mapping[int, int]) -> None:
        found = ", ".join(f"{count} of {width}" for width, count in rows.items() if count)
        super().__init__(
            f"no row has room for a text of {length} tokens; rows are {found} tokens; increase text_rows, or leave "
            "it empty to have the number of rows measured"
        )


def row_lengths(step: int, longest: int) -> tuple[int, ...]:
    """Row lengths, multiples of `step`, for packing texts of up to `longest` tokens."""
    return tuple(range(step, longest + step, step))


def place(
    lengths: Sequence[int], widths: Sequence[int], rows: Sequence[int] | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Best-fit decreasing bin packing: the row and column of each text, and the width of each row.

    Longest first, each into the row with the least remaining room that holds it, or a new row of the shortest
    sufficient width; `rows` limits their number for each width. The cost of attention is quadratic in the row length,
    so short texts are not put into long rows unnecessarily. Raises ValueError for a text longer than every width,
    PackingOverflowError when the rows do not suffice: no text is dropped.
    """
    row_of, column_of = [0] * len(lengths), [0] * len(lengths)
    # The number of new rows is unlimited, or as given, in which case all rows exist from the start.
    found = [] if rows is None else [w for w, count in zip(widths, rows, strict=True) for _ in range(count)]
    rooms = sorted((width, row) for row, width in enumerate(found))
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        at = bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room = next((width for width in widths if width >= length), None)
            if room is None:
                raise ValueError(f"a text of {length} tokens is longer than a row of {widths[-1]}")
            if rows is not None:
                raise PackingOverflowError(length, dict(zip(widths, rows, strict=True)))
            row = len(found)
            found.append(room)
        row_of[i], column_of[i] = row, found[row] - room
        insort(rooms, (room - length, row))
    return row_of, column_of, found


def enough_rows(groups: Sequence[Sequence[int]], widths: Sequence[int]) -> tuple[int, ...]:
    """Numbers of rows of each width that suffice for every group of texts, given by the texts' lengths."""
    # A longer row can replace a shorter one: the largest count of rows of at least each width over all groups suffices.
    least = np.zeros(len(widths) + 1, int)
    for lengths in groups:
        counts = np.bincount(np.searchsorted(widths, place(lengths, widths)[2]), minlength=len(widths))
        least[:-1] = np.maximum(least[:-1], counts[::-1].cumsum()[::-1])
    rows = (least[:-1] - least[1:]).tolist()
    # This overestimates: no group needs the maximum of every width, and its unused long rows hold short texts.
    for i in range(len(widths)):
        rows[i] = bisect_left(
            range(rows[i]), True, key=lambda n: _all_fit(groups, widths, [*rows[:i], n, *rows[i + 1 :]])
        )
    return tuple(rows)


def _all_fit(groups: Sequence[Sequence[int]], widths: Sequence[int], rows: Sequence[int]) -> bool:
    try:
        for lengths in groups:
            place(lengths, widths, rows)
    except PackingOverflowError:
        return False
    return True


def pack(texts: Sequence[Int[np.ndarray, "t"]], widths: Sequence[int], rows: Sequence[int] | None = None) -> PackedText:
    """Pack texts into rows of the given ascending widths: `rows` of each, or as many as needed.

    Raises as `place`.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    row_of, column_of, found = place(lengths.tolist(), widths, rows)
    found = np.array(found or widths[:1], np.int64)
    order = np.argsort(found, kind="stable")  # rows ordered by width
    first = np.empty(len(found), np.int64)
    first[order] = np.cumsum(found[order]) - found[order]
    starts = first[np.array(row_of, np.int64)] + np.array(column_of, np.int64)
    tokens, segments, positions = flat = np.zeros((3, found.sum()), np.int32)
    if len(lengths):
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(starts, lengths) + within
        number = np.empty(len(lengths), np.int64)  # number of a text within its row
        by_start = np.argsort(starts, kind="stable")
        rank = np.argsort(order, kind="stable")[np.array(row_of)[by_start]]
        number[by_start] = np.arange(len(lengths)) - np.searchsorted(rank, rank)
        tokens[places] = np.concatenate(texts)
        segments[places] = np.repeat(number + 1, lengths)
        positions[places] = within
    groups, done = [], 0
    for width in sorted(set(found.tolist())):
        size = width * int((found == width).sum())
        groups.append(TextRows(*flat[:, done : done + size].reshape(3, -1, width)))
        done += size
    return PackedText(tuple(groups), starts.astype(np.int32))
