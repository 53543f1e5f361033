"""Framing of TFRecord files: the length of a record and the masked CRC32Cs around it."""

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Union

import google_crc32c
import numpy as np

from pathflip_jax.data.storage.blocks import row_blocks

LENGTH_CODE = struct.Struct("<QI")
CRC_CODE = struct.Struct("<I")
CASTAGNOLI = 0x82F63B78  # the polynomial of CRC32C, the bit of x^31 last
JOINED = 1 << 17  # bytes: joining two CRCs takes as long as summing up that much again
Data = Union[bytes, np.ndarray, "Summed"]


class Summed(NamedTuple):
    """Bytes or a contiguous array with its CRC32C, so that nothing is summed up twice."""

    data: bytes | np.ndarray
    crc: int

    @property
    def nbytes(self) -> int:
        """The size of the data."""
        return memoryview(self.data).nbytes


def nbytes(data: Data) -> int:
    """The size of data."""
    return data.nbytes if isinstance(data, Summed) else memoryview(data).nbytes


def crc32c(*parts, start: int = 0) -> int:
    """CRC32C of bytes or contiguous arrays, one after the other; `start` is that of what came before them."""
    for part in parts:
        start = google_crc32c.extend(start, part)
    return start


def extended(crc: int, data: Data) -> int:
    """The CRC32C of what had `crc` so far with data behind it."""
    if isinstance(data, Summed):
        if data.nbytes >= JOINED:
            return joined_crc(crc, data.crc, data.nbytes)
        data = data.data
    for piece in in_pieces(data):
        crc = crc32c(piece, start=crc)
    return crc


def joined_crc(first: int, second: int, size: int) -> int:
    """The CRC32C of data and `size` bytes behind it, from the CRCs of both."""
    return _times(_shift(size), first) ^ second


@lru_cache(maxsize=4096)  # regions of a cohort have few sizes
def _shift(size: int) -> int:
    """What a CRC is multiplied by when `size` bytes follow: x^(8 size)."""
    power, square = 1 << 31, 1 << 23  # x^0 and x^8
    while size:
        if size & 1:
            power = _times(square, power)
        square = _times(square, square)
        size >>= 1
    return power


def _times(a: int, b: int) -> int:
    """The product of two polynomials over bits, modulo that of CRC32C; bit 31 is x^0."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (CASTAGNOLI if b & 1 else 0)
    return product


def mask(crc: int) -> int:
    """A CRC as TFRecord stores it: rotated and shifted, so that a CRC of data that holds CRCs stays strong."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(*parts: Data) -> tuple[bytes, bytes]:
    """What stands before and after a record's data, given in parts."""
    crc = 0
    for part in parts:
        crc = extended(crc, part)
    length = struct.pack("<Q", sum(map(nbytes, parts)))
    return length + CRC_CODE.pack(mask(crc32c(length))), CRC_CODE.pack(mask(crc))


def in_pieces(data: bytes | np.ndarray) -> Iterator[bytes | np.ndarray]:
    """Data as it is; what maps a file, a block at a time."""
    if isinstance(data, np.memmap):
        yield from (block for _, block in row_blocks(data))
    else:
        yield data
