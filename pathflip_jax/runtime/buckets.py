"""Bucketed sizes for padding, to bound the number of compilations: XLA compiles once per shape."""


def bucket(n: int) -> int:
    """Smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n: at most a third is padding."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power
