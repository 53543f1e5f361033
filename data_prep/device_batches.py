"""Batches of an encoder on the devices: of one size, several in flight, smaller ones when the memory runs out."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from data_prep.encoders import DeviceEncoder

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")


@dataclass
class Batch:
    """Patches of several slides: `used` of `patches` are filled, by the `spans`, whatever their owner puts there."""

    patches: UInt8[np.ndarray, "B P P 3"]
    used: int = 0
    spans: list[Any] = field(default_factory=list)
    dispatched: float = 0.0
    size: int = 0  # patches in each array of `running`
    running: list[Any] | Exception | None = None  # JAX arrays, perhaps not computed yet, or why there are none

    @property
    def room(self) -> int:
        """Number of patches still to fill."""
        return len(self.patches) - self.used


class EncoderQueue:
    """Batches of one encoder: filled and started by one thread, awaited by another."""

    def __init__(self, encoder: DeviceEncoder, patch_size: int) -> None:
        self.encoder = encoder
        self._patch_size = patch_size
        self._buffers: SimpleQueue[np.ndarray] = SimpleQueue()
        self._lock = Lock()  # the batch size changes for both threads at once

    def new_batch(self) -> Batch:
        """Empty batch, in the memory of one that is over where there is one."""
        size = self.encoder.batch_size
        while True:
            try:
                buffer = self._buffers.get_nowait()
            except Empty:
                return Batch(np.zeros((size, self._patch_size, self._patch_size, 3), np.uint8))
            if len(buffer) == size:
                return Batch(buffer)

    def start(self, batch: Batch) -> None:
        """Start a batch; an error of the device is kept until the batch is awaited."""
        with self._lock:
            batch.size = self.encoder.batch_size
            try:
                batch.running = [self.encoder.dispatch(piece) for piece in _pieces(batch, batch.size)]
            except (RuntimeError, MemoryError) as error:
                batch.running = error.with_traceback(None)  # whose frames would keep what the caller holds

    def features(self, batch: Batch) -> Float[np.ndarray, "n F"]:
        """Features of the `used` patches of a batch, in smaller batches where the device's memory runs out.

        Raises OSError for other errors of the device, and where no smaller batch is possible.
        """
        while True:
            try:
                if isinstance(batch.running, Exception):
                    raise batch.running
                rows = np.concatenate([np.asarray(array, np.float32) for array in batch.running])[: batch.used]
            except (RuntimeError, MemoryError) as error:
                batch.running = None
                self._make_smaller(batch, error)
                self.start(batch)
            else:
                self._buffers.put(batch.patches)
                return rows

    def _make_smaller(self, batch: Batch, error: Exception) -> None:
        name, size = self.encoder.name, batch.size
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not isinstance(error, MemoryError) and not any(mark in str(error) for mark in _OUT_OF_MEMORY):
            raise OSError(f"encoder {name!r}: the device failed: {said}") from error
        with self._lock:
            if self.encoder.batch_size < size:  # since this batch was started
                return
            halve = getattr(self.encoder, "halve", None)
            if halve is None or not halve():
                raise OSError(
                    f"encoder {name!r}: the device's memory ran out with batches of {size} patches of "
                    f"{self._patch_size} px ({said}); pass a smaller --batch-size"
                ) from error
            line = f"encoder {name!r}: the device's memory ran out with batches of {size} patches, going on with "
            tqdm.write(f"{line}{self.encoder.batch_size}", file=sys.stderr)


def check_encoder(encoder: DeviceEncoder, patch_size: int) -> None:
    """Run an encoder once, which compiles it, so that its faults are reported before any slide is read.

    Raises ValueError for a patch size that it does not take, and OSError for errors of the device.
    """
    queue = EncoderQueue(encoder, patch_size)
    batch = queue.new_batch()
    batch.used = len(batch.patches)
    queue.start(batch)
    queue.features(batch)


def _pieces(batch: Batch, size: int) -> Iterator[np.ndarray]:
    """The patches of a batch in pieces of `size`, the last one padded; a batch filled before `halve` has several."""
    batch.patches[batch.used :] = 0
    for start in range(0, batch.used, size):
        piece = batch.patches[start : start + size]
        if len(piece) < size:
            piece = np.concatenate([piece, np.zeros((size - len(piece), *piece.shape[1:]), np.uint8)])
        yield piece
