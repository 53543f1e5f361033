"""The products of a decoder that writes one token at a time: weights laid out so that each is read once, at full speed.

Which layout that is depends on the platform: `pathflip_jax.ops.packed_matmul`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pathflip_jax.llm.decoder import Decoder, Projection
from pathflip_jax.ops.packed_matmul import Layout, layout_for, packed_matmul, store
from pathflip_jax.ops.platform import traced_for


class Product(nnx.Module):
    """x @ kernel (+ bias) without a gradient, the kernel stored in a layout of `ops.packed_matmul`."""

    def __init__(self, kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None, layout: Layout) -> None:
        self.inputs, self.layout = kernel.shape[0], layout
        self.kernel = nnx.Param(store(kernel, layout))
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "B T I"], key: None = None) -> Float[Array, "B T O"]:
        """[B, T, I] -> [B, T, O] in the dtype of x; `key` stands where `Projection` has it."""
        y = self.sums(x)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)

    def sums(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """The product without bias, in float32."""
        y = packed_matmul(x.reshape(-1, self.inputs), self.kernel[...], self.layout)
        return y.reshape(*x.shape[:-1], -1)


def for_generation(decoder: Decoder) -> Decoder:
    """The decoder with its weights laid out for generation, adapters merged into them; one that is so comes back.

    Its parameters have other names and no gradient. Queries, keys and values are one product, gate and up another. It
    holds a copy of the kernels, in half the bytes if the decoder's or its computation's dtype is bfloat16.
    """
    if decoder.layers[0].attention.joined is not None:
        return decoder
    return _lay_out(traced_for(), decoder)


@partial(jax.jit, static_argnums=0)
def _lay_out(_platform: str, decoder: Decoder) -> Decoder:  # compiled for each platform: layouts differ
    dtype = jnp.dtype(decoder.config.compute_dtype)

    def join(*projections: Projection) -> Product:
        kernels = [_merged(projection) for projection in projections]
        kernel = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)
        biases = [projection.bias for projection in projections]
        bias = None if biases[0] is None else jnp.concatenate([b[...] for b in biases]).astype(jnp.float32)
        return lay_out(kernel, bias)

    def lay_out(kernel: Array, bias: Array | None) -> Product:
        layout = layout_for(kernel.dtype, dtype)
        return Product(kernel.astype(dtype) if layout == "plain" else kernel, bias, layout)

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
