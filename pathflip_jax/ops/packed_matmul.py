"""Products of few rows with kernels stored in another form than [inputs, outputs], so that each weight is read once.

A token of few sequences is bound by the bytes of the weights. XLA for CPU reads them at the memory's speed in two forms
only (benchmarks/ROOFLINE.md, "Generation"): float32 kernels [outputs, inputs] on the left of a product, and
bfloat16 kernels as pairs in words of 32 bits, taken apart within a sum of rows. Other platforms read plain kernels
well. There is no gradient: these forms are for generation.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt

from pathflip_jax.ops.platform import traced_for

Layout = Literal["plain", "rows", "pairs"]
# Words in a row of sums, and rows that are summed at once: of 1 to 6 and 2 to 32 these read fastest for all shapes.
PARTS, STEP = 2, 8
FEW = 16  # rows of inputs up to which these forms are faster; those of a prompt make plain products, of pairs unpacked


def layout_for(kernel: jnp.dtype, compute: jnp.dtype) -> Layout:
    """The form that the platform traced for reads fastest, of a kernel of one dtype multiplied in another."""
    if traced_for() != "cpu":
        return "plain"
    return "pairs" if jnp.bfloat16 in (compute, kernel) else "rows"


def store(kernel: Float[Array, "I O"], layout: Layout) -> Array:
    """plain: [I, O]; rows: [O, I] in float32; pairs: uint32 [I / 4, 2, O], two bfloat16 inputs of one output a word."""
    return {"plain": lambda k: k, "rows": lambda k: k.T.astype(jnp.float32), "pairs": _pack}[layout](kernel)


def packed_matmul(x: Float[Array, "n I"], stored: Array, layout: Layout) -> Float[Array, "n O"]:
    """x @ kernel of a kernel as `store` gives it, summed in float32."""
    if layout == "plain":
        return packed_matmul_reference(x, stored)
    if layout == "pairs":
        return _multiply_pairs(x.astype(jnp.float32), stored)
    if len(x) > FEW:
        return jnp.einsum("ni,oi->no", x.astype(jnp.float32), stored)
    # Without the barrier XLA would turn the product round, to spare the transpose, at half the speed.
    return lax.optimization_barrier(jnp.einsum("oi,ni->on", stored, x.astype(jnp.float32))).T


def packed_matmul_reference(x: Float[Array, "n I"], kernel: Float[Array, "I O"]) -> Float[Array, "n O"]:
    """`packed_matmul` of a kernel as it was before it was stored."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _pack(kernel: Float[Array, "I O"]) -> UInt[Array, "I/4 2 O"]:
    """Words of two bfloat16 numbers, that of the lower input in the lower half; inputs are filled up with zeros."""
    kernel = jnp.pad(kernel.astype(jnp.bfloat16), ((0, -len(kernel) % (2 * PARTS * STEP)), (0, 0)))
    words = lax.bitcast_convert_type(kernel, jnp.uint16).astype(jnp.uint32)
    words = words.reshape(PARTS, -1, 2, kernel.shape[1])
    return (words[:, :, 0] | words[:, :, 1] << 16).swapaxes(0, 1)


def _halves(words: UInt[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both numbers of words of `_pack`, in float32: a bfloat16 is the upper half of a float32."""
    lower, upper = words << 16, words & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(lower, jnp.float32), lax.bitcast_convert_type(upper, jnp.float32)


def _multiply_pairs(x: Float[Array, "n I"], words: UInt[Array, "I/4 2 O"]) -> Float[Array, "n O"]:
    n, (length, _, outputs) = len(x), words.shape
    x = jnp.pad(x, ((0, 0), (0, length * 2 * PARTS - x.shape[1]))).reshape(n, PARTS, length, 2)
    if n > FEW:
        lower, upper = _halves(words.reshape(length * PARTS, outputs))
        x = x.transpose(0, 2, 1, 3).reshape(n, length * PARTS, 2)
        return x[:, :, 0] @ lower + x[:, :, 1] @ upper
    x = x.transpose(2, 3, 0, 1).reshape(-1, STEP, 2, n, PARTS)

    def add(i: Array, sums: Float[Array, "n 2 O"]) -> Float[Array, "n 2 O"]:
        # Where the inputs are not read ahead, XLA does not vectorise the sum: seven times as slow.
        part = lax.optimization_barrier(lax.dynamic_index_in_dim(x, i, keepdims=False))  # [STEP, 2, n, PARTS]
        for row in range(STEP):
            lower, upper = _halves(words.at[i * STEP + row].get(mode="promise_in_bounds"))  # [PARTS, O]
            sums = sums + part[row, 0, ..., None] * lower + part[row, 1, ..., None] * upper
        return sums

    return lax.fori_loop(0, length // STEP, add, jnp.zeros((n, PARTS, outputs), jnp.float32)).sum(1)
