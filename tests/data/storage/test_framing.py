"""CRC32C of data in parts, against the checksum of the whole."""

import numpy as np
import pytest

from pathflip_jax.data.storage import framing
from pathflip_jax.data.storage.framing import Checksummed, crc32c, extended, frame, joined_crc, nbytes


@pytest.mark.parametrize("sizes", [(0, 0), (0, 9), (9, 0), (1, 1), (7, 256), (300, 1023), (5, 70_001)])
def test_two_sums_joined_are_that_of_the_whole(sizes):
    first, second = (np.random.default_rng(size).bytes(size) for size in sizes)
    assert joined_crc(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


def test_the_published_check_value_in_two_parts():
    assert joined_crc(crc32c(b"1234"), crc32c(b"56789"), 5) == 0xE3069283


@pytest.mark.parametrize("joined", [0, 1 << 17])
def test_what_was_summed_up_before_frames_alike(monkeypatch, joined):
    monkeypatch.setattr(framing, "JOINED", joined)
    rng = np.random.default_rng(0)
    head, rows, tail = rng.bytes(11), rng.normal(size=(50, 6)).astype(np.float16), rng.bytes(3)
    known = Checksummed(rows, crc32c(rows))
    assert nbytes(known) == rows.nbytes and extended(7, known) == crc32c(rows, start=7)
    assert frame(head, known, tail) == frame(head, rows, tail) == frame(head + rows.tobytes() + tail)


def test_a_sum_that_is_believed_is_not_taken_again(monkeypatch):
    monkeypatch.setattr(framing, "JOINED", 0)
    assert extended(0, Checksummed(b"abc", 5)) == 5
