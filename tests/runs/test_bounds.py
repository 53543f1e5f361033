"""Bounds of the options of commands: every one takes what it is for and refuses what is absurd."""

import math

import pytest

from pathflip_jax.runs.bounds import OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_takes_what_is_no_number_or_absurd(name):
    bound = OPTIONS[name]
    for value in (math.nan, math.inf, -math.inf, -(10.0**9), True, "8", None):
        assert not bound.holds(value), value
    assert bound.holds(math.floor(bound.least) + 1 if bound.whole else min(bound.least + 0.25, bound.most))
    assert "number" in bound.words()
