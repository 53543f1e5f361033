"""TFRecord framing: a record's length and the masked CRC32Cs around its data."""

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Union

import google_crc32c
import numpy as np

from pathflip_jax.data.storage.blocks import row_blocks

LENGTH_CODE = struct.Struct("<QI")
CRC_CODE = struct.Struct("<I")
CASTAGNOLI = 0x82F63B78  # the CRC32C polynomial, bit-reflected
JOINED = 1 << 17  # bytes whose CRC takes as long as combining two CRCs
Data = Union[bytes, np.ndarray, "Checksummed"]


class Checksummed(NamedTuple):
    """Bytes or a contiguous array with its CRC32C, so that it is computed only once."""

    data: bytes | np.ndarray
    crc: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return memoryview(self.data).nbytes


def nbytes(data: Data) -> int:
    """Size of data in bytes."""
    return data.nbytes if isinstance(data, Checksummed) else memoryview(data).nbytes


def crc32c(*parts, start: int = 0) -> int:
    """CRC32C of concatenated bytes or contiguous arrays; `start` is the CRC of preceding data."""
    for part in parts:
        start = google_crc32c.extend(start, part)
    return start


def extended(crc: int, data: Data) -> int:
    """CRC32C of preceding data with CRC `crc`, extended by `data`."""
    if isinstance(data, Checksummed):
        if data.nbytes >= JOINED:
            return joined_crc(crc, data.crc, data.nbytes)
        data = data.data
    for piece in in_blocks(data):
        crc = crc32c(piece, start=crc)
    return crc


def joined_crc(first: int, second: int, size: int) -> int:
    """CRC32C of the concatenation of two parts from their CRCs; the second has `size` bytes."""
    return _times(_shift(size), first) ^ second


@lru_cache(maxsize=4096)  # regions of a cohort have few distinct sizes
def _shift(size: int) -> int:
    """Factor of a CRC when `size` bytes follow: x^(8 size)."""
    power, square = 1 << 31, 1 << 23  # x^0 and x^8
    while size:
        if size & 1:
            power = _times(square, power)
        square = _times(square, square)
        size >>= 1
    return power


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo that of CRC32C; bit 31 is x^0."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (CASTAGNOLI if b & 1 else 0)
    return product


def mask(crc: int) -> int:
    """Masked CRC of TFRecord: rotated and offset, so that CRCs of data that contains CRCs stay strong."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(*parts: Data) -> tuple[bytes, bytes]:
    """Header and footer of a record, whose data are given in parts."""
    crc = 0
    for part in parts:
        crc = extended(crc, part)
    length = struct.pack("<Q", sum(map(nbytes, parts)))
    return length + CRC_CODE.pack(mask(crc32c(length))), CRC_CODE.pack(mask(crc))


def in_blocks(data: bytes | np.ndarray) -> Iterator[bytes | np.ndarray]:
    """Data in one piece or, for a mapped file, in blocks."""
    if isinstance(data, np.memmap):
        yield from (block for _, block in row_blocks(data))
    else:
        yield data
