"""Vision transformer of all registered patch encoders (ViT, arXiv 2010.11929; DINOv2, arXiv 2304.07193).

Letters: B images, I pixels on a side, T tokens (class token, registers, patches), d width, F features. Activations of a
layer are in the dtype of computation; the residual stream, softmax and normalisation stay in float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pathflip_jax.ops.activations import gelu, quick_gelu
from pathflip_jax.ops.attention import pool
from pathflip_jax.ops.platform import target_platform
from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.layers import Dense, Norm, Stack
from pathflip_jax.vision.positions import fitted, rotary_angles, rotated

_POOLER_EPS = 1e-5
_POOLER_HEADS = 8


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


def attend(query: Array, key: Array, value: Array) -> Float[Array, "B T heads h"]:
    """Softmax attention [B, T, heads, h], by cuDNN on a GPU in half precision.

    Elsewhere normalised after the product with the values, which saves a pass over the scores.
    """
    if target_platform() in ("gpu", "cuda") and query.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    query, key, value = (x.swapaxes(1, 2) for x in (query / math.sqrt(query.shape[-1]), key, value))
    return pool(query, key, value, None)[0].swapaxes(1, 2)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one projection to queries, keys and values."""

    def __init__(self, config: VisionConfig, stack: Stack) -> None:
        self.config = config
        self.qkv = Dense(config.width, 3 * config.width, stack=stack)
        self.output = Dense(config.width, config.width, stack=stack)

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """[B, T, d] -> [B, T, d]."""
        config = self.config
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, config.heads, -1)
        query, key, value = (qkv[:, :, i] for i in range(3))
        if config.rope:
            angles = rotary_angles(config)
            query, key = (rotated(rows, angles, config.prefix) for rows in (query, key))
        return self.output(attend(query, key, value).reshape(x.shape))


class FeedForward(nnx.Module):
    """Feed-forward network: an activation between two layers, or SwiGLU with gate and value in one layer."""

    def __init__(self, config: VisionConfig, stack: Stack) -> None:
        self.kind = config.feed_forward
        gated = 2 if self.kind == "swiglu" else 1
        self.inner = Dense(config.width, gated * config.hidden, stack=stack)
        self.outer = Dense(config.hidden, config.width, stack=stack)

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """[B, T, d] -> [B, T, d]."""
        inner = self.inner(x)
        if self.kind == "swiglu":
            gate, value = jnp.split(inner, 2, axis=-1)
            return self.outer(jax.nn.silu(gate) * value)
        return self.outer(ACTIVATIONS[self.kind](inner))


class Layer(nnx.Module):
    """Pre-normalised attention and feed-forward network, each with a residual connection and LayerScale."""

    def __init__(self, config: VisionConfig, stack: Stack) -> None:
        self.attention_norm = Norm(config.width, config.eps, stack=stack)
        self.attention = SelfAttention(config, stack)
        self.feed_forward_norm = Norm(config.width, config.eps, stack=stack)
        self.feed_forward = FeedForward(config, stack)
        zeros = jnp.zeros((*stack, config.width))
        self.attention_scale = nnx.Param(zeros) if config.layer_scale else None
        self.feed_forward_scale = nnx.Param(zeros) if config.layer_scale else None

    def __call__(self, x: Float[Array, "B T d"], dtype: DTypeLike) -> Float[Array, "B T d"]:
        """[B, T, d] -> [B, T, d], float32."""
        x = x + _scaled(self.attention(self.attention_norm(x, dtype)), self.attention_scale)
        return x + _scaled(self.feed_forward(self.feed_forward_norm(x, dtype)), self.feed_forward_scale)


def _scaled(x: Array, scale: nnx.Param | None) -> Float[Array, "B T d"]:
    x = x.astype(jnp.float32)
    return x if scale is None else x * jax.lax.broadcast_to_rank(scale[...], x.ndim)


class AttentionPooler(nnx.Module):
    """Attentional pooler of CONCH: one learned query over all tokens (CoCa, arXiv 2205.01917)."""

    def __init__(self, config: VisionConfig) -> None:
        width, bias = config.head_width, config.pooler_bias
        self.query = nnx.Param(jnp.zeros((1, width)))
        self.query_norm, self.token_norm = Norm(width, _POOLER_EPS), Norm(config.width, _POOLER_EPS)
        self.query_projection = Dense(width, width, bias=bias)
        self.key = Dense(config.width, width, bias=bias)
        self.value = Dense(config.width, width, bias=bias)
        self.output = Dense(width, width, bias=bias)
        self.norm = Norm(width, _POOLER_EPS)

    def __call__(self, tokens: Float[Array, "B T d"], dtype: DTypeLike) -> Float[Array, "B F"]:
        """[B, T, d] -> [B, F]."""
        tokens = self.token_norm(tokens, dtype)
        query = self.query_projection(self.query_norm(self.query[...], dtype))
        query = jnp.broadcast_to(query, (len(tokens), *query.shape))
        parts = (query, self.key(tokens), self.value(tokens))
        parts = (rows.reshape(*rows.shape[:2], _POOLER_HEADS, -1) for rows in parts)
        pooled = jax.nn.dot_product_attention(*parts).reshape(len(tokens), -1)
        return self.norm(self.output(pooled))


class MLPHead(nnx.Module):
    """Head of two layers with GELU between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.inner, self.outer = Dense(inputs, outputs), Dense(outputs, outputs)

    def __call__(self, x: Float[Array, "B d"]) -> Float[Array, "B F"]:
        """[B, d] -> [B, F]."""
        return self.outer(gelu(self.inner(x)))


class VisionTransformer(nnx.Module):
    """Network from normalised images to feature vectors."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        width, rows = config.width, config.prefix_positions + config.table_side**2
        self.patch = Dense(3 * config.patch**2, width, bias=not config.pre_norm)
        self.class_token = nnx.Param(jnp.zeros(width))
        self.registers = nnx.Param(jnp.zeros((config.registers, width))) if config.registers else None
        self.positions = None if config.rope else nnx.Param(jnp.zeros((rows, width)))
        self.pre_norm = Norm(width, config.eps) if config.pre_norm else None
        self.layers = Layer(config, (config.depth,))
        self.norm = Norm(width, config.eps)
        self.pooler = AttentionPooler(config) if config.pooling == "attention" else None
        self.head = _head(config)

    def __call__(self, images: Float[Array, "B I I 3"], dtype: DTypeLike = jnp.float32) -> Float[Array, "B F"]:
        """Feature vectors in float32; `dtype` is that of the products."""
        config, tokens = self.config, self.tokens(images, dtype)
        if self.pooler is not None:
            features = self.pooler(tokens, dtype)
        else:
            features = tokens[:, 0]
            if config.pooling == "class_and_mean":
                features = jnp.concatenate([features, tokens[:, config.prefix :].mean(1)], -1)
        if self.head is not None:
            features = self.head(features.astype(dtype)).astype(jnp.float32)
        if config.unit_length:
            features /= jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        return features

    def tokens(self, images: Float[Array, "B I I c"], dtype: DTypeLike) -> Float[Array, "B T d"]:
        """Normalised tokens of the last layer."""
        x = self._embed(images, dtype)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        graph, parameters = nnx.split(self.layers)

        def apply(x: Array, layer: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, layer)(x, dtype), None

        x, _ = jax.lax.scan(apply, x, parameters)
        return self.norm(x)

    def _embed(self, images: Array, dtype: DTypeLike) -> Float[Array, "B T d"]:
        config, batch = self.config, len(images)
        side, patch, width = config.side, config.patch, config.width
        pixels = images.reshape(batch, side, patch, side, patch, -1).swapaxes(2, 3).reshape(batch, side * side, -1)
        x = self.patch(pixels.astype(dtype)).astype(jnp.float32)
        prefix = self.class_token[...][None]
        if self.registers is not None:
            prefix = jnp.concatenate([prefix, self.registers[...]])
        if self.positions is not None:
            table, given = fitted(self.positions[...], config), config.prefix_positions
            x = x + table[None, given:]
            prefix = prefix.at[:given].add(table[:given])
        return jnp.concatenate([jnp.broadcast_to(prefix, (batch, config.prefix, width)), x], axis=1)


def _head(config: VisionConfig) -> Dense | MLPHead | None:
    if config.head == "linear":
        return Dense(config.width, config.head_width, bias=False)
    return MLPHead(config.width, config.head_width) if config.head == "mlp" else None
