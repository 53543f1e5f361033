"""The list of slides that failed: the first of them by name, the rest by number."""

from pathflip_jax.data.storage.failures import Failure, list_failures


def test_the_first_failures_are_named_and_the_rest_counted():
    failed = [Failure(f"S{i}", f"S{i}.h5", f"fault {i}") for i in range(5)]
    assert list_failures(failed) == [f"  S{i}: fault {i}" for i in range(5)]
    assert list_failures(failed, most=2) == ["  S0: fault 0", "  S1: fault 1", "  and 3 more"]
    assert list_failures([]) == []
