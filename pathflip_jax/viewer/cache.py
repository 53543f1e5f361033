"""A bounded cache of tiles, encoded slides and layers, each made once however many ask at once."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

RETRY_SECONDS = 10.0  # for so long an error stands for its value


@dataclass
class _Entry:
    """A value that is there or being made, its size once it is there, and until when it holds."""

    future: Future = field(default_factory=Future)
    size: int = 0
    until: float = float("inf")


class Cache:
    """Values by key; beyond `capacity`, counted by `size` of each, the least recently used go.

    Threads that want a value that is being made wait for its one maker. Errors are kept for ten seconds: a file that
    cost its reader the life is not tried again for each of fifty tiles.
    """

    def __init__(self, capacity: int, size: Callable[[Any], int]) -> None:
        self._capacity, self._size = capacity, size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made by `make` if it is not there; raises what `make` raised."""
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
        """Whether the value of a key stands ready."""
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
