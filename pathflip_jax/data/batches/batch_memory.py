"""Memory of batches, used again: what a batch takes is mapped and cleared once, not for every step."""

import math
from collections import deque

import numpy as np


class BatchMemory:
    """Memory of batches, lent again once the last array over it is gone.

    A batch has tens of megabytes: the system would map new pages for each and clear them, which took as long as
    reading the features. What is lent holds what an earlier batch left in it.
    """

    def __init__(self, keep: int) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def lend(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array whose memory comes back here by itself."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            block = self._free.pop()
        except IndexError:  # all are in use
            block = None
        if block is None or block.nbytes != size:  # batches were resized
            block = np.empty(size, np.uint8)
        return np.asarray(_Loan(block, self._free)).view(dtype).reshape(shape)


class _Loan:
    """What NumPy takes for the owner of a lent block, and keeps until no array, view or device needs it."""

    def __init__(self, block: np.ndarray, free: deque[np.ndarray]) -> None:
        self.__array_interface__ = block.__array_interface__
        self._block, self._free = block, free

    def __del__(self) -> None:
        self._free.append(self._block)
