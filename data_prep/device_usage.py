"""Use of the devices by a run: patches per second, the share of the time when they computed, and what limited it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pathflip_jax.runtime.limits import processors

ENOUGH = 0.9  # busy share from which no advice is due


@dataclass(frozen=True)
class DeviceUsage:
    """Use of the devices from the first dispatch to the last completion of a batch, `seconds` in all.

    `encoded` patches went through an encoder, `decoded` ones were read, once for all encoders, by `readers` processes.
    `busy` seconds a batch was being computed; in `reading` and `writing` seconds the next batch waited for pixels, and
    for features to be written.
    """

    encoded: int = 0
    decoded: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    reading: float = 0.0
    writing: float = 0.0
    readers: int = 0

    @property
    def patches_per_second(self) -> float:
        """Patches encoded per second."""
        return self.encoded / self.seconds if self.seconds else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the time when the devices computed, 0 to 1."""
        return min(1.0, self.busy / self.seconds) if self.seconds else 0.0

    def advice(self) -> str:
        """Stage that limits the devices, and the cure; empty where they are busy enough."""
        if self.busy_share >= ENOUGH or not self.seconds:
            return ""
        rest = self.seconds - self.busy - self.reading - self.writing
        limit = max((self.reading, "reading"), (self.writing, "writing"), (rest, "filling"))[1]
        if limit == "writing":
            return "writing limits: give --out, and TMPDIR for large slides, a faster disk"
        if limit == "filling":
            return "filling batches limits: this process copies patches no faster; leave it a core (fewer --workers)"
        cores = processors()
        if self.readers < cores:
            return f"reading limits: raise --workers, {self.readers} now, up to the {cores} cores"
        return f"reading limits: {cores} cores decode {self.decoded / self.seconds:.0f} patches/s"

    def summary(self) -> str:
        """Summary for the user, with the advice."""
        shares = f"{self.patches_per_second:.0f} patches/s, busy {self.busy_share:.0%} of {self.seconds:.1f} s"
        return "; ".join(filter(None, [f"devices: {shares}", self.advice()]))

    def as_json(self) -> dict[str, float | str]:
        """The figures of the summary."""
        return {
            "patches": self.encoded, "seconds": self.seconds, "patches_per_second": self.patches_per_second,
            "busy_share": self.busy_share, "advice": self.advice(),
        }  # fmt: skip


class DeviceClock:
    """Times of batches that are completed in the order of their dispatch, each thread calling methods of its own."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = self._busy = 0.0
        self._encoded = 0
        self._waits = {"reading": 0.0, "writing": 0.0}

    def dispatch(self) -> float:
        """Time of dispatching a batch."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        return now

    def complete(self, dispatched: float, patches: int) -> None:
        """Count a batch whose features have just arrived."""
        now = time.perf_counter()
        self._busy += now - max(dispatched, self._last)
        self._last = now
        self._encoded += patches

    @contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """Count the time of the body as waiting for a stage, once a batch has been dispatched."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._first is not None:
                self._waits[stage] += time.perf_counter() - start

    def usage(self, decoded: int, readers: int) -> DeviceUsage:
        """Use of the devices so far."""
        seconds = max(0.0, self._last - self._first) if self._first is not None else 0.0
        waits = {stage: min(wait, seconds) for stage, wait in self._waits.items()}
        return DeviceUsage(self._encoded, decoded, seconds, self._busy, **waits, readers=readers)
