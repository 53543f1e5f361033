"""Bounded cache of tiles, encoded slides and layers, each computed once under concurrent requests."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

RETRY_SECONDS = 10.0  # time for which an error is cached


@dataclass
class _Entry:
    """Value that is ready or being computed, its size once ready, and its expiry."""

    future: Future = field(default_factory=Future)
    size: int = 0
    until: float = float("inf")


class Cache:
    """Values by key; when their total `size` exceeds `capacity`, the least recently used are evicted.

    Threads that request a value being computed wait for it. Errors are cached for ten seconds, so that a file that
    crashed its reader is not read again for each of fifty tiles.
    """

    def __init__(self, capacity: int, size: Callable[[Any], int]) -> None:
        self._capacity, self._size = capacity, size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value of a key, computed by `make` if missing; raises what `make` raised."""
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None or time.monotonic() > entry.until
            if mine:
                entry = self._entries[key] = _Entry()
            self._entries.move_to_end(key)
        if mine:
            try:
                value = make()
            except BaseException as error:
                entry.until = time.monotonic() + RETRY_SECONDS
                entry.future.set_exception(error)
            else:
                self._account(key, entry, self._size(value))
                entry.future.set_result(value)
        return entry.future.result()

    def holds(self, key: Hashable) -> bool:
        """Whether the value of a key is ready."""
        with self._lock:
            entry = self._entries.get(key)
        return entry is not None and entry.future.done() and entry.future.exception() is None

    def _account(self, key: Hashable, entry: _Entry, size: int) -> None:
        with self._lock:
            entry.size = size
            self._total += size
            for old in list(self._entries):
                if self._total <= self._capacity:
                    break
                if old != key and self._entries[old].future.done():
                    self._total -= self._entries.pop(old).size
