"""The products of a decoder that writes one token at a time: weights laid out so that each is read once, at full speed.

A token of few sequences is bound by the bytes of the weights. XLA for CPU reads them at the memory's speed in two forms
only (benchmarks/ROOFLINE.md, "Generation"): float32 kernels [outputs, inputs] on the left of a product, and
bfloat16 kernels as pairs in words of 32 bits, taken apart within a sum of rows. Other backends read plain kernels well.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, UInt

from pathflip_jax.llm.decoder import Decoder, Projection

Layout = Literal["plain", "rows", "pairs"]
# Words in a row of sums, and rows that are summed at once: of 1 to 6 and 2 to 32 these read fastest for all shapes.
PARTS, STEP = 2, 8
FEW = 16  # rows of inputs up to which these forms are faster; those of a prompt make plain products, of pairs unpacked


class Product(nnx.Module):
    """x @ kernel (+ bias) without a gradient, the kernel stored as `layout` says; sums are in float32.

    plain [I, O]; rows [O, I] in float32; pairs: uint32 [I / 4, 2, O], two bfloat16 inputs of one output in a word.
    """

    def __init__(self, kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None, layout: Layout) -> None:
        self.inputs, self.layout = kernel.shape[0], layout
        stored = {"plain": lambda k: k, "rows": lambda k: k.T.astype(jnp.float32), "pairs": _pack}[layout](kernel)
        self.kernel = nnx.Param(stored)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "B T I"], key: None = None) -> Float[Array, "B T O"]:
        """[B, T, I] -> [B, T, O] in the dtype of x; `key` stands where `Projection` has it."""
        y = self.sums(x)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)

    def sums(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """The product without bias, in float32."""
        kernel, rows = self.kernel[...], x.reshape(-1, self.inputs)
        if self.layout == "plain":
            y = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        elif self.layout == "rows" and len(rows) <= FEW:
            # Without the barrier XLA would turn the product round, to spare the transpose, at half the speed.
            y = lax.optimization_barrier(jnp.einsum("oi,ni->on", kernel, rows.astype(jnp.float32))).T
        elif self.layout == "rows":
            y = jnp.einsum("ni,oi->no", rows.astype(jnp.float32), kernel)
        else:
            y = _multiply_pairs(rows.astype(jnp.float32), kernel)
        return y.reshape(*x.shape[:-1], -1)


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


def for_generation(decoder: Decoder) -> Decoder:
    """The decoder with its weights laid out for generation, adapters merged into them; one that is so comes back.

    Its parameters have other names and no gradient. Queries, keys and values are one product, gate and up another. It
    holds a copy of the kernels, in half the bytes if the decoder's or its computation's dtype is bfloat16.
    """
    if decoder.layers[0].attention.joined is not None:
        return decoder
    return _lay_out(jax.default_backend(), decoder)


@partial(jax.jit, static_argnums=0)
def _lay_out(backend: str, decoder: Decoder) -> Decoder:
    dtype = jnp.dtype(decoder.config.compute_dtype)

    def join(*projections: Projection) -> Product:
        kernels = [_merged(projection) for projection in projections]
        kernel = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)
        biases = [projection.bias for projection in projections]
        bias = None if biases[0] is None else jnp.concatenate([b[...] for b in biases]).astype(jnp.float32)
        return lay_out(kernel, bias)

    def lay_out(kernel: Array, bias: Array | None) -> Product:
        if backend != "cpu":
            return Product(kernel.astype(dtype), bias, "plain")
        return Product(kernel, bias, "pairs" if jnp.bfloat16 in (dtype, kernel.dtype) else "rows")

    for layer in decoder.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        attention.joined = nnx.data(join(attention.query, attention.key, attention.value))
        attention.query = attention.key = attention.value = None
        attention.output = join(attention.output)
        feed_forward.joined = nnx.data(join(feed_forward.gate, feed_forward.up))
        feed_forward.gate = feed_forward.up = None
        feed_forward.down = join(feed_forward.down)
    if decoder.head is not None:
        decoder.head = join(decoder.head)
    else:
        decoder.head = nnx.data(lay_out(decoder.embedding.embedding[...].T, None))
    decoder.lora = None
    return decoder


def _merged(projection: Projection) -> Float[Array, "I O"]:
    """The kernel with what its adapter adds to it, in the kernel's dtype."""
    kernel = projection.kernel[...]
    if (lora := projection.lora) is None:
        return kernel
    added = jnp.matmul(lora.a[...], lora.b[...], precision="highest") * lora.scale
    return (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
