"""Packing: every token kept, best fit, and enough rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.data.batches.packing import PackingOverflowError, enough_rows, pack, place, row_lengths

texts_of_ids = st.lists(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(1, 999), min_size=n, max_size=n)), max_size=20
)


@given(texts_of_ids, st.integers(3, 13))
@settings(max_examples=150)
def test_packing_keeps_every_token_of_every_text(texts, step):
    texts = [np.array(text, np.int32) for text in texts]
    widths = row_lengths(step, 12)
    packed = pack(texts, widths)
    assert all(x.dtype == np.int32 for rows in packed.rows for x in rows) and packed.cls_index.dtype == np.int32
    assert all(len({x.shape for x in rows}) == 1 for rows in packed.rows)
    assert sum((rows.segments > 0).sum() for rows in packed.rows) == sum(map(len, texts))
    laid = [[x[row] for x in rows] for rows in packed.rows for row in range(len(rows.tokens))]  # row after row
    starts = np.cumsum([0] + [len(tokens) for tokens, _, _ in laid])
    assert [len(tokens) for tokens, _, _ in laid] == sorted(len(tokens) for tokens, _, _ in laid)
    seen = set()
    for text, start in zip(texts, packed.cls_index, strict=True):
        row = int(np.searchsorted(starts, start, side="right")) - 1
        tokens, segments, positions = laid[row]
        segment = segments[start - starts[row]]
        where = np.flatnonzero(segments == segment)
        assert segment > 0 and (row, segment) not in seen
        seen.add((row, segment))
        assert where.tolist() == list(range(start - starts[row], start - starts[row] + len(text)))  # in one piece
        assert tokens[where].tolist() == text.tolist()
        assert positions[where].tolist() == list(range(len(text)))
    for tokens, segments, positions in laid:  # numbered 1, 2, ... from the left, padding behind
        assert segments.tolist() == sorted(segments.tolist(), key=lambda x: x or 10**6)
        assert set(segments.tolist()) - {0} == set(range(1, segments.max() + 1))
        assert not tokens[segments == 0].any() and not positions[segments == 0].any()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_best_fit_decreasing(lengths):
    rows, columns, widths = place(lengths, (10, 20, 30))
    found = [[] for _ in widths]  # the textbook algorithm
    room, expected = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row in range(len(room)) if room[row] >= lengths[i]]
        if not fits:
            room.append(next(width for width in (10, 20, 30) if width >= lengths[i]))
            fits = [len(room) - 1]
        row = min(fits, key=lambda row: (room[row], row))
        expected[i] = (row, widths[row] - room[row])
        found[row].append(lengths[i])
        room[row] -= lengths[i]
    assert [expected[i] for i in range(len(lengths))] == list(zip(rows, columns, strict=True))
    assert all(sum(members) <= width for members, width in zip(found, widths, strict=True))


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=20), min_size=1, max_size=5))
def test_rows_that_are_enough_hold_each_group_and_are_not_too_many(groups):
    widths = (10, 20, 30)
    rows = enough_rows(groups, widths)
    for lengths in groups:
        place(lengths, widths, rows)  # raises where they do not fit
    apart = [place(lengths, widths)[2] for lengths in groups]
    assert len(groups) > 1 or sum(n * width for n, width in zip(rows, widths, strict=True)) <= sum(apart[0])


def test_what_does_not_fit_is_an_error():
    texts = [np.ones(n, np.int32) for n in (6, 5, 5)]
    with pytest.raises(PackingOverflowError, match="no row has room for a text of 5 tokens; rows are 1 of 10 tokens"):
        pack(texts, (10,), rows=(1,))
    with pytest.raises(ValueError, match="a text of 6 tokens is longer than a row of 5"):
        pack(texts, (5,))
    (empty,) = pack([], (8, 16)).rows
    assert empty.tokens.shape == (1, 8)
    given = pack(texts, (5, 10), rows=(1, 2)).rows
    assert [rows.tokens.shape for rows in given] == [(1, 5), (2, 10)]
