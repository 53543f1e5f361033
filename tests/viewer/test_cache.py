"""The viewer's cache: one computation for concurrent requests, bounded, and errors are not retried immediately."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pathflip_jax.viewer import cache
from pathflip_jax.viewer.cache import Cache


def test_many_that_ask_at_once_wait_for_one_maker():
    made, start = [], threading.Barrier(8)
    values = Cache(100, len)

    def make():
        made.append(1)
        time.sleep(0.05)
        return "value"

    def ask(_):
        start.wait()
        return values.get("key", make)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == ["value"] * 8
    assert len(made) == 1


def test_the_least_recently_used_go_first():
    values, made = Cache(10, len), []

    def get(key):
        return values.get(key, lambda: made.append(key) or "x" * 4)

    for key in ("a", "b", "a", "c"):  # c makes 12, so that b goes
        get(key)
    assert values.holds("a") and values.holds("c") and not values.holds("b")
    get("a"), get("b")
    assert made == ["a", "b", "c", "b"]


def test_what_is_larger_than_the_cache_is_given_and_ends_the_others():
    values = Cache(10, len)
    values.get("small", lambda: "x")
    assert values.get("large", lambda: "x" * 50) == "x" * 50
    assert not values.holds("small")


def test_an_error_stands_for_a_while_and_is_then_tried_again(monkeypatch):
    values, made, clock = Cache(10, len), [], [0.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: clock[0])

    def fail():
        made.append(1)
        raise ValueError("broken")

    for now, expected in ((0.0, 1), (cache.RETRY_SECONDS - 1, 1), (cache.RETRY_SECONDS + 1, 2)):
        clock[0] = now
        with pytest.raises(ValueError, match="broken"):
            values.get("key", fail)
        assert len(made) == expected and not values.holds("key")
    clock[0] *= 3
    assert values.get("key", lambda: "mended") == "mended"
