"""TFRecord files without TensorFlow: framing, checksums, and payload offsets.

A record is a little-endian uint64 length, its masked CRC32C, the data, and the masked CRC32C of the data.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pathflip_jax.data.storage.files import Place, file_sizes, open_stream
from pathflip_jax.data.storage.framing import CRC_CODE, LENGTH_CODE, Data, crc32c, mask, nbytes


class Frame(NamedTuple):
    """Record of a TFRecord file: its data, and the offset of the data in the file."""

    offset: int
    data: bytes


def read_frames(path: Place) -> Iterator[Frame]:
    """Records of a TFRecord file, in order and with both CRCs of each checked.

    Raises ValueError for a flipped byte, OSError for a truncated file.
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
                raise ValueError(f"{path}: record {number} at byte {offset} is not a TFRecord or damaged; {cure}")
            if offset + LENGTH_CODE.size + length + CRC_CODE.size > size:
                missing = offset + LENGTH_CODE.size + length + CRC_CODE.size - size
                raise OSError(f"{path}: cut short in record {number}, {missing} bytes are missing; {cure}")
            data = file.read(length)
            if CRC_CODE.unpack(file.read(CRC_CODE.size))[0] != mask(crc32c(data)):
                raise ValueError(f"{path}: record {number} at byte {offset} fails its CRC: a byte flipped; {cure}")
            yield Frame(offset + LENGTH_CODE.size, data)
            offset += LENGTH_CODE.size + length + CRC_CODE.size
            number += 1


def example_parts(features: bytes, payloads: dict[str, Data]) -> list[Data]:
    """Serialized tf.train.Example in parts: a serialized Features message followed by bytes values.

    The result equals protobuf's, without copying the payloads, nearly all of it, three times.
    """
    parts: list[Data] = [features]
    for key, payload in payloads.items():
        head, name = b"", key.encode()
        for field in (1, 1, 2):  # BytesList.value, Feature.bytes_list, the value of the map entry
            head = bytes([field << 3 | 2]) + _encode_varint(nbytes(payload) + len(head)) + head
        entry = bytes([10]) + _encode_varint(len(name)) + name + head
        parts += [bytes([10]) + _encode_varint(len(entry) + nbytes(payload)) + entry]
        parts.append(payload if nbytes(payload) else b"")
    return [bytes([10]) + _encode_varint(sum(map(nbytes, parts))), *parts]


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def bytes_offsets(example: bytes) -> dict[str, tuple[int, int]]:
    """Locations of single bytes values in a serialized tf.train.Example: key -> (offset, length).

    Walks the protobuf tags, so payloads can be read in place, whatever the writer and the field order. Of duplicate
    keys the last counts, as in every protobuf parser. Raises ValueError for anything but an Example.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        for features in _fields(example, 0, len(example), 1):  # Example.features
            for entry in _fields(example, *features, 1):  # Features.feature, one map entry each
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
    """Extents of the length-delimited fields of number `wanted`, in a message that spans [start, end)."""
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
