"""Checksums of arrays, computed on the devices that hold them and independent of their sharding."""

import hashlib
import json
import zlib

import jax
import jax.numpy as jnp


@jax.jit
def checksums(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A uint32 checksum per array that detects any single changed number.

    A sum of the bits, each number weighted by an odd factor of its index, modulo 2**32: it is independent of sharding,
    so it is computed on the devices that hold the array and verified on any other mesh.
    """

    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def content_hash(params: dict[str, jax.Array]) -> str:
    """SHA-256 over the checksums of all parameters, by name: equal if every number is."""
    sums = {name: int(value) for name, value in jax.device_get(checksums(params)).items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def checksum_of_facts(facts: dict) -> int:
    """Checksum of JSON values."""
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def verified(arrays: dict[str, dict], kept: dict[str, dict]) -> dict[str, dict]:
    """The arrays, if they match the saved checksums; ValueError names one that does not."""
    for item, tree in arrays.items():
        for name, value in jax.device_get(checksums(tree)).items():
            if int(value) != kept[item][name]:
                raise ValueError(f"the numbers of {name} do not match their checksum")
    return arrays
