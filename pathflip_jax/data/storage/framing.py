"""Framing of TFRecord files: the length of a record and the masked CRC32Cs around it."""

import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

from pathflip_jax.data.storage.blocks import row_blocks

LENGTH_CODE = struct.Struct("<QI")
CRC_CODE = struct.Struct("<I")


def crc32c(*parts, start: int = 0) -> int:
    """CRC32C of bytes or contiguous arrays, one after the other; `start` is that of what came before them."""
    for part in parts:
        start = google_crc32c.extend(start, part)
    return start


def mask(crc: int) -> int:
    """A CRC as TFRecord stores it: rotated and shifted, so that a CRC of data that holds CRCs stays strong."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(*parts: bytes | np.ndarray) -> tuple[bytes, bytes]:
    """What stands before and after a record's data, given in parts."""
    length = struct.pack("<Q", sum(memoryview(part).nbytes for part in parts))
    crc = 0
    for part in parts:
        for piece in in_pieces(part):
            crc = crc32c(piece, start=crc)
    return length + CRC_CODE.pack(mask(crc32c(length))), CRC_CODE.pack(mask(crc))


def in_pieces(data: bytes | np.ndarray) -> Iterator[bytes | np.ndarray]:
    """Data as it is; what maps a file, a block at a time."""
    if isinstance(data, np.memmap):
        yield from (block for _, block in row_blocks(data))
    else:
        yield data
