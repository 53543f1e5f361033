"""Reusable memory for batches, mapped and cleared once instead of at every step."""

import math
from collections import deque

import numpy as np


class BatchMemory:
    """Pool of batch memory, reused once the last array on a block is gone.

    A batch has tens of megabytes: the system would map and clear new pages for each, which took as long as reading the
    features. Blocks are not cleared: they hold the data of an earlier batch.
    """

    def __init__(self, keep: int) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialised array whose memory returns to the pool automatically."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            block = self._free.pop()
        except IndexError:  # all blocks are in use
            block = None
        if block is None or block.nbytes != size:  # the batch size changed
            block = np.empty(size, np.uint8)
        return np.asarray(_Allocation(block, self._free)).view(dtype).reshape(shape)


class _Allocation:
    """NumPy base object of a lent block, alive until no array, view or device uses the block."""

    def __init__(self, block: np.ndarray, free: deque[np.ndarray]) -> None:
        self.__array_interface__ = block.__array_interface__
        self._block, self._free = block, free

    def __del__(self) -> None:
        self._free.append(self._block)
