"""Dropout as a function of the key and an entry's index, independent of the devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


def split_key(key: Array | None, n: int) -> list[Array | None]:
    """Split a key in n; None, which means no dropout, yields n times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each entry with probability `rate` and rescale the rest; the identity without a key.

    The mask is a function of the key and the entry's index, independent of the devices. It is redrawn in the backward
    pass instead of being kept as a residual.
    """
    if key is None or rate == 0:
        return x
    return drop(x, rate, jax.random.key_data(key))


def dropout_reference(x: Array, rate: float, key: Array) -> Array:
    """Dropout drawn by `jax.random`: a different mask from that of `dropout`, at the same rate."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def drop(x: Array, rate: float, seed: Array) -> Array:
    """`dropout` seeded by the two words of a key: uint32 [2]."""
    dropped = round(rate * 2**32)
    return jnp.where(_hash(x.shape, seed) >= np.uint32(dropped), x * (1 / (1 - dropped / 2**32)), 0)


drop.defvjp(lambda x, rate, seed: (drop(x, rate, seed), seed), lambda rate, seed, g: (drop(g, rate, seed), None))


def _hash(shape: tuple[int, ...], seed: Array) -> Array:
    """A random word per entry from its index and the seed's two words, with a period of 2**32 entries.

    The mixing is the finalizer of MurmurHash3, in which every output bit depends on every input bit. Threefry, the
    generator of `jax.random`, costs more on a CPU than the attention whose weights it drops.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = place * np.uint32(0x9E3779B9) + seed[0]
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B) + seed[1]
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
