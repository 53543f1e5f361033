"""Decoder for token-by-token generation: weights fused and stored so that each is read once, at full bandwidth.

The layout depends on the platform: `pathflip_jax.ops.packed_matmul`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pathflip_jax.llm.decoder import Attention, CausalDecoder, Decoder, DecoderLayer, FeedForward, Projection
from pathflip_jax.ops.packed_matmul import Layout, best_layout, packed_matmul, store
from pathflip_jax.ops.platform import target_platform


class PackedLinear(nnx.Module):
    """x @ kernel (+ bias) of one or several projections side by side, without a gradient.

    The kernel is stored in a layout of `ops.packed_matmul`; sums are in float32.
    """

    def __init__(self, kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None, layout: Layout) -> None:
        self.inputs, self.layout = kernel.shape[0], layout
        self.kernel = nnx.Param(store(kernel, layout))
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "B T I"], key: None = None) -> Float[Array, "B T O"]:
        """[B, T, I] -> [B, T, O] in the dtype of x; `key` is there for the signature of `Projection`."""
        y = packed_matmul(x.reshape(-1, self.inputs), self.kernel[...], self.layout).reshape(*x.shape[:-1], -1)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class ServingAttention(Attention):
    """Attention with queries, keys and values from one product."""

    def __init__(self, attention: Attention, pack: "_Packer") -> None:
        self.shape = attention.shape
        self.query_key_value = pack(attention.query, attention.key, attention.value)
        self.output = pack(attention.output)
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm

    def project(self, x: Float[Array, "B T W"], keys) -> tuple[Array, Array, Array]:
        """Queries, keys and values of all heads."""
        heads, kv_heads, d = self.shape
        return jnp.split(self.query_key_value(x), [heads * d, (heads + kv_heads) * d], axis=-1)


class ServingFeedForward(FeedForward):
    """SwiGLU with gate and up from one product."""

    def __init__(self, feed_forward: FeedForward, pack: "_Packer") -> None:
        self.gate_up = pack(feed_forward.gate, feed_forward.up)
        self.down = pack(feed_forward.down)

    def project(self, x: Float[Array, "B T W"], keys) -> tuple[Array, Array]:
        """Gate and up."""
        return jnp.split(self.gate_up(x), 2, axis=-1)


class ServingDecoder(CausalDecoder):
    """Decoder for generation: as `Decoder`, with adapters merged into its kernels and without a gradient."""

    def __init__(self, decoder: Decoder, pack: "_Packer") -> None:
        self.config, self.embedding, self.norm = decoder.config, decoder.embedding, decoder.norm
        self.layers = nnx.List(
            [
                DecoderLayer(
                    layer.attention_norm,
                    ServingAttention(layer.attention, pack),
                    layer.feed_forward_norm,
                    ServingFeedForward(layer.feed_forward, pack),
                )
                for layer in decoder.layers
            ]
        )
        tied = decoder.head is None
        self.head = pack.kernel(decoder.embedding.embedding[...].T, None) if tied else pack(decoder.head)

    def logits(self, states: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """The logits of states, in float32."""
        with jax.named_scope("logits"):
            return self.head(states).astype(jnp.float32)


def fuse_for_decoding(decoder: Decoder | ServingDecoder) -> ServingDecoder:
    """Store a decoder's weights for generation; a `ServingDecoder` is returned unchanged.

    It holds a copy of the kernels: on a CPU in float32 whatever their dtype, elsewhere in the dtype of computation.
    """
    return decoder if isinstance(decoder, ServingDecoder) else _fuse(target_platform(), decoder)


@partial(jax.jit, static_argnums=0)
def _fuse(_platform: str, decoder: Decoder) -> ServingDecoder:  # compiled for each platform: layouts differ
    return ServingDecoder(decoder, _Packer(best_layout(), decoder.config.compute_dtype))


class _Packer:
    """Packer of projections: their kernels side by side, in a layout and (if plain) a dtype."""

    def __init__(self, layout: Layout, dtype: str) -> None:
        self.layout, self.dtype = layout, jnp.dtype(dtype)

    def __call__(self, *projections: Projection) -> PackedLinear:
        kernel = jnp.concatenate([_merged(projection) for projection in projections], axis=1)
        biases = [projection.bias[...] for projection in projections if projection.bias is not None]
        return self.kernel(kernel, jnp.concatenate(biases).astype(jnp.float32) if biases else None)

    def kernel(self, kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None) -> PackedLinear:
        """Kernel with its bias."""
        return PackedLinear(kernel.astype(self.dtype) if self.layout == "plain" else kernel, bias, self.layout)


def _merged(projection: Projection) -> Float[Array, "I O"]:
    """Kernel with its adapter merged in, in the kernel's dtype."""
    kernel = projection.kernel[...]
    if (lora := projection.lora) is None:
        return kernel
    added = jnp.matmul(lora.a[...], lora.b[...], precision="highest") * lora.scale
    return (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
