"""Arrays of a NumPy file (.npy, .npz); runs only in the worker of `guarded.py`. Never unpickles."""

import os
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from pathflip_jax.data.readers.guarded import Parsed, Refused, shared_empty

ALONE = "array"  # name of the array of a .npy file
MAGIC = b"\x93NUMPY"
MOST_NAMES = 100


def read(path: str, wanted: Sequence[str]) -> Parsed:
    """Arrays under the `wanted` names, as far as the file has them; the fact `shapes` gives those of all by name.

    Raises Refused for arrays of objects and for one larger than its file can hold, OSError for a damaged file.
    """
    size = os.path.getsize(path)
    shapes, arrays = {}, {}
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                shapes[ALONE], array = _array(file, ALONE, size, ALONE in wanted)
                return {"shapes": shapes}, {} if array is None else {ALONE: array}
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist()[:MOST_NAMES]:
                    name = member.removesuffix(".npy")
                    with archive.open(member) as stream:
                        shapes[name], array = _array(stream, name, size, name in wanted)
                    if array is not None:
                        arrays[name] = array
    except (Refused, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise errors of many types
        raise OSError(f"not a complete NumPy file ({error}); copy it again") from None
    return {"shapes": shapes}, arrays


def _array(stream: BinaryIO, name: str, size: int, wanted: bool) -> tuple[list[int], np.ndarray | None]:
    """Shape of the next array of a stream, and the array itself if it is wanted."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_header(stream)
    if not wanted:
        return list(shape), None
    if dtype.hasobject or dtype.kind not in "fiub":
        raise Refused(f"{name!r} has type {dtype}, expected numbers; save it as numbers")
    array = shared_empty(shape[::-1] if by_columns else shape, dtype, size, repr(name))
    if array.size:
        view, filled = memoryview(array.reshape(-1)).cast("B"), 0
        while filled < len(view):
            if not (count := stream.readinto(view[filled:])):
                raise OSError(f"{name!r} ends after {filled} of {len(view)} bytes")
            filled += count
    array = array.T if by_columns else array
    return list(shape), array.astype(dtype.newbyteorder("="), copy=False)
