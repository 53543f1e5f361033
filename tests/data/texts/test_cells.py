"""Cells as texts and lists: what data frames and JSON write is read back, and nothing is evaluated."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.texts import cells
from pathflip_jax.data.texts.cells import as_list, as_text

plain = st.text(max_size=8) | st.integers(-99, 99) | st.booleans()


@given(st.lists(plain, max_size=4) | st.dictionaries(st.text(max_size=4), plain, max_size=3))
def test_a_list_written_as_text_is_that_list_again(value):
    assert as_list(str(value)) == as_list(json.dumps(value)) == value


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_an_array_written_as_text_is_a_list(texts):
    assert as_list(str(np.array(texts, object))) == texts


def test_arrays_of_numbers_and_values_that_are_missing():
    assert as_list(str(np.array([0, 1, 2]))) == [0, 1, 2]
    assert as_list(str(["Yes", float("nan"), None])) == ["Yes", None, None]


@given(st.text(max_size=20))
def test_any_other_text_stays_as_it_is(text):
    assert as_list(text) == text or text.strip()[0] in "[{"


@pytest.mark.parametrize(
    "text",
    [
        "[__import__('os')]",
        "[f()]",
        "[0045, 2]",
        "['it''s', 'b']",
        "[A] Yes [B] No",
        "[1 + 2]",
        "['a',",
        '["\\ud800"]',
        "[" * 9999 + "]" * 9999,
    ],
)
def test_what_is_no_plain_list_is_a_text(text):
    assert as_list(text) == text


def test_a_list_beyond_all_measure_is_refused(monkeypatch):
    monkeypatch.setattr(cells, "LONGEST_LIST", 10)
    with pytest.raises(ValueError, match="a list of 14 characters as text, expected at most 10"):
        as_list("['abcd', 'ef']")


@pytest.mark.parametrize(
    ("value", "text"),
    [(123.0, "123"), (0.25, "0.25"), (0, "0"), (False, "False"), (" a ", "a"), ("None", "None"), (float("nan"), "")],
)
def test_cells_as_text(value, text):
    assert as_text(value) == text
