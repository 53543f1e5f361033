"""Checksums of arrays: any one changed bit shows, and so do numbers that changed places."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.runs.checksums import checksums


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 35), st.integers(0, 31), st.booleans())
def test_any_flipped_bit_changes_its_checksum(seed, place, bit, half):
    x = np.random.default_rng(seed).integers(0, 2**32, (4, 3, 3), dtype=np.uint32)
    y = x.copy()
    y.reshape(-1)[place] ^= np.uint32(1 << bit)
    kind = np.uint16 if half else np.uint32
    before, after = (checksums({"x": jnp.asarray(z.view(kind))})["x"] for z in (x, y))
    assert int(before) != int(after)


def test_swapped_numbers_change_the_checksum():
    x = jnp.arange(12.0).reshape(3, 4)
    assert int(checksums({"x": x})["x"]) != int(checksums({"x": x[::-1]})["x"])
