"""TFRecord files without TensorFlow: framing and checksums, files that appear whole or not at all, payload offsets.

A record is a little-endian uint64 length, its masked CRC32C, the data, and the masked CRC32C of the data.
"""

import errno
import glob
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from pathflip_jax.data.storage.blocks import row_blocks
from pathflip_jax.data.storage.durable import sync
from pathflip_jax.data.storage.files import Place, file_sizes, open_stream, upload

LENGTH_CODE = struct.Struct("<QI")
CRC_CODE = struct.Struct("<I")
ABANDONED_AFTER = 3600.0  # seconds; a living writer touches its file all the time


class Frame(NamedTuple):
    """A record of a TFRecord file: its data and where the data starts in the file."""

    offset: int
    data: bytes


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


class WholeFile:
    """The file that `whole_file` yields: counts what is written and sums it up."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self.path = path
        self.bytes = 0
        self.crc32c = 0

    def write(self, data: bytes | np.ndarray) -> None:
        """Write all of `data`. Raises OSError naming the file and the cure, such as on a full disk."""
        for piece in in_pieces(data):
            self._write(piece)

    def _write(self, data: bytes | np.ndarray) -> None:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self.failure(error) from None
        self.bytes += size
        self.crc32c = crc32c(data, start=self.crc32c)

    def write_record(self, *parts: bytes | np.ndarray) -> int:
        """Write one TFRecord of parts that stay uncopied; returns where its data starts."""
        head, tail = frame(*parts)
        self.write(head)
        offset = self.bytes
        for part in parts:
            self.write(part)
        self.write(tail)
        return offset

    def failure(self, error: OSError) -> OSError:
        """The error of the operating system, with what to do about it; it keeps its errno."""
        cure = "free space there or write elsewhere"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "check that the disk is there and may be written"
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"{reason} after {self.bytes / 1e6:.1f} MB; nothing of it is left behind, {cure}"
        return OSError(error.errno, message, str(self.path))


@contextmanager
def whole_file(path: Place) -> Iterator[WholeFile]:
    """Write a file that appears whole or not at all: a temporary beside it, fsync, rename.

    The temporary's name is unique, so two writers of one file never mix; what killed writers of it left more than an
    hour ago is removed once the file stands. What goes to a URL is made in the system's temporary folder and
    uploaded in one: buckets show an object once it is whole. Raises OSError when the disk is full or the folder cannot
    be written.
    """
    if not isinstance(path, Path):
        with tempfile.NamedTemporaryFile(prefix="pathflip-", buffering=0) as raw:
            yield WholeFile(raw, Path(raw.name))
            upload(Path(raw.name), path)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    out = WholeFile(None, path)
    try:
        try:
            raw = temporary.open("xb", buffering=0)
        except OSError as error:
            raise out.failure(error) from None
        with raw:
            out._file = raw
            yield out
            try:
                sync(raw.fileno())
            except OSError as error:
                raise out.failure(error) from None
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - ABANDONED_AFTER:
                left.unlink()
    sync(path.parent)


def read_frames(path: Place) -> Iterator[Frame]:
    """The records of a TFRecord file, in order, both CRCs of each checked.

    Raises ValueError where a byte was flipped, OSError where the file was cut short.
    """
    cure = "copy the file again, or delete it and its .idx and run the same command again"
    (size,) = file_sizes([path])
    if size is None:
        raise FileNotFoundError(f"{path}: no such shard; restore it, or write it again")
    offset = number = 0
    with open_stream(path, size) as file:
        while offset < size:
            header = file.read(LENGTH_CODE.size)
            if len(header) < LENGTH_CODE.size:
                raise OSError(f"{path}: ends within the header of record {number}; {cure}")
            length, crc = LENGTH_CODE.unpack(header)
            if mask(crc32c(header[:8])) != crc:
                raise ValueError(f"{path}: record {number} at byte {offset} is no TFRecord or a byte flipped; {cure}")
            if offset + LENGTH_CODE.size + length + CRC_CODE.size > size:
                missing = offset + LENGTH_CODE.size + length + CRC_CODE.size - size
                raise OSError(f"{path}: cut short in record {number}, {missing} bytes are missing; {cure}")
            data = file.read(length)
            if CRC_CODE.unpack(file.read(CRC_CODE.size))[0] != mask(crc32c(data)):
                raise ValueError(f"{path}: record {number} at byte {offset} fails its CRC: a byte flipped; {cure}")
            yield Frame(offset + LENGTH_CODE.size, data)
            offset += LENGTH_CODE.size + length + CRC_CODE.size
            number += 1


def example_parts(features: bytes, payloads: dict[str, np.ndarray]) -> list[bytes | np.ndarray]:
    """A serialized tf.train.Example, in parts: a serialized Features message with bytes values put behind it.

    What protobuf would make, but the payloads, nearly all of it, are not copied three times on the way.
    """
    parts: list[bytes | np.ndarray] = [features]
    for key, payload in payloads.items():
        head, name = b"", key.encode()
        for field in (1, 1, 2):  # BytesList.value, Feature.bytes_list, the value of the map entry
            head = bytes([field << 3 | 2]) + _encode_varint(payload.nbytes + len(head)) + head
        entry = bytes([10]) + _encode_varint(len(name)) + name + head
        parts += [bytes([10]) + _encode_varint(len(entry) + payload.nbytes) + entry]
        parts.append(payload if payload.size else b"")
    return [bytes([10]) + _encode_varint(sum(memoryview(part).nbytes for part in parts)), *parts]


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def bytes_offsets(example: bytes) -> dict[str, tuple[int, int]]:
    """Where the single bytes values of a serialized tf.train.Example lie in it: key -> (offset, length).

    Walks the protobuf tags, so whoever wrote the Example, in whatever order, its payloads can be read in place. Of a
    key given twice the last counts, as in every protobuf parser. Raises ValueError for what is no Example.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        for features in _fields(example, 0, len(example), 1):  # Example.features
            for entry in _fields(example, *features, 1):  # Features.feature, a map entry each
                keys = list(_fields(example, *entry, 1))
                values = [v for feature in _fields(example, *entry, 2) for v in _fields(example, *feature, 1)]
                payloads = [payload for value in values for payload in _fields(example, *value, 1)]  # BytesList.value
                key = example[keys[-1][0] : keys[-1][1]].decode() if keys else ""
                found.pop(key, None)
                if len(payloads) == 1:
                    found[key] = (payloads[0][0], payloads[0][1] - payloads[0][0])
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not a serialized tf.train.Example ({error})") from None
    return found


def _fields(data: bytes, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    """The extents of the length-delimited fields with a number, in a message that spans [start, end)."""
    while start < end:
        tag, start = _varint(data, start, end)
        kind = tag & 7
        if kind == 2:
            length, start = _varint(data, start, end)
            if start + length > end:
                raise IndexError("a field runs past its message")
            if tag >> 3 == wanted:
                yield start, start + length
            start += length
        elif kind == 0:
            _, start = _varint(data, start, end)
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
        else:
            raise IndexError(f"wire type {kind}")


def _varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while start < end and shift < 70:
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
    raise IndexError("a number runs past its message")
