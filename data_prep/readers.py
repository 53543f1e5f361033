"""Reader processes, as the process that encodes sees them: each with a ring of slots for pixels in shared memory."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data_prep.jobs import Job
from data_prep.pool import PRELOADED
from data_prep.reading import Slot, fill
from pathflip_jax.runtime.workers import Worker

SLOTS = 3  # of a ring: one being read, one waiting, one being copied to a batch
SECONDS = 3600.0  # per slot, opening and tissue included: a slide that takes longer is stuck
_SHARED = Path("/dev/shm")  # where Linux holds shared memory segments


class Reader:
    """Process that reads one slide after the other into its ring."""

    def __init__(self, slot_size: int) -> None:
        self.requests = 0  # without an answer, as its user counts them
        self._size = slot_size
        self._ring = SharedMemory(create=True, size=SLOTS * slot_size)
        self._pixels: np.ndarray | None = np.frombuffer(self._ring.buf, np.uint8)
        try:
            _reserve(self._ring.name, SLOTS * slot_size)
            self._worker = Worker(preload=PRELOADED)
        except BaseException:
            self._free()
            raise

    def request(self, index: int, slide: int, jobs: Sequence[Job], done: Callable[[Future], None]) -> None:
        """Request the next patches of a slide in a slot; `done` is called with the future of `fill`, in a thread."""
        slot = Slot(self._ring.name, index, self._size)
        self._worker.submit(fill, slot, slide, jobs, seconds=SECONDS).add_done_callback(done)

    def pixels(self, index: int) -> UInt8[np.ndarray, "bytes"]:
        """Bytes of a slot, not to be kept."""
        return self._pixels[index * self._size : (index + 1) * self._size]

    @property
    def is_over(self) -> bool:
        """Whether the process ended between two requests, whose answers may never come."""
        return self._worker.is_over

    def close(self) -> None:
        """End the process and free the ring, also where a part of it has been freed before."""
        try:
            self._worker.stop()
        finally:
            self._free()

    def _free(self) -> None:
        self._pixels = None
        with suppress(FileNotFoundError):
            self._ring.unlink()
        self._ring.close()


def _reserve(name: str, size: int) -> None:
    """Allocate a segment, so that too little shared memory fails here and does not end a reader while it writes."""
    if not (path := _SHARED / name).exists() or not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            message = f"{os.strerror(error.errno)}: a reader of slides takes {size / 1e6:.0f} MB of {_SHARED}; free "
            message += "some, give the container more (`docker run --shm-size=8g`), or use fewer --workers"
            raise OSError(error.errno, message) from None
