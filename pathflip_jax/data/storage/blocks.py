"""Blockwise processing of arrays, so that a large one is never completely in memory."""

import mmap
import os
import tempfile
from collections.abc import Iterator

import numpy as np

LARGE = 256 << 20  # bytes: smaller arrays are held in memory
BLOCK = 16 << 20  # bytes of a block


def row_blocks(array: np.ndarray, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of about `size` bytes, with their slices; pages of a mapped file are released after use."""
    rows = max(1, (size or BLOCK) // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), rows):
        where = slice(start, min(start + rows, len(array)))
        yield where, array[where]
        release(array)


def release(array: np.ndarray) -> None:
    """Release the resident pages of a mapped array; they are read again on access."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


def row_mean(array: np.ndarray) -> np.ndarray:
    """Mean over all rows, in float32."""
    parts = [np.asarray(block, np.float32).mean(0) * (len(block) / len(array)) for _, block in row_blocks(array, LARGE)]
    return np.sum(parts, axis=0, dtype=np.float32)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array in memory, or for a large one in a temporary file (`scratch`)."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.empty(shape, dtype) if size <= LARGE else scratch(shape, dtype)


def scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Array in an anonymous temporary file, freed with the array. Raises OSError if the disk is full."""
    with tempfile.TemporaryFile() as file:
        reserve(file.fileno(), int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


def reserve(file: int, size: int) -> None:
    """Allocate an empty file's space, so that a full disk fails here and not on writing a mapped page."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.ftruncate(file, size)
    except OSError as error:
        cure = "free space there, or set the environment variable TMPDIR to another folder"
        message = f"{os.strerror(error.errno)}: a large slide takes {size / 1e9:.1f} GB there temporarily; {cure}"
        raise OSError(error.errno, message, tempfile.gettempdir()) from None
