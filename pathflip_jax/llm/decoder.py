"""Decoder that takes soft tokens and generates text: Qwen3, Qwen2 and Llama 3 (DESIGN section 7).

    B  sequences of the batch     W  width of the decoder     N  heads of queries
    T  tokens                     V  vocabulary               M  heads of keys and values
    U  slots of the cache         d  width of a head

It is called with token ids or with embeddings, through which a slide enters. Padding may be on either side; its content
has no effect. Positions count real tokens.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.llm.config import TARGETS, DecoderConfig, LoRAConfig
from pathflip_jax.model.layers import INITS, Embedding, LowRank, RMSNorm
from pathflip_jax.ops.attention import pool
from pathflip_jax.ops.dropout import split_key
from pathflip_jax.ops.matmul import add_bias, contract


class Cache(NamedTuple):
    """Keys and values of past tokens in every layer; `mask` marks the filled slots.

    All sequences fill the same slots, `filled` of them: prompts of different lengths are left-padded.
    """

    keys: tuple[Float[Array, "B M U d"], ...]
    values: tuple[Float[Array, "B M U d"], ...]
    mask: Bool[Array, "B U"]
    filled: Int[Array, ""]


class Projection(nnx.Module):
    """x @ kernel (+ bias) (+ LoRA); the kernel is [inputs, outputs]."""

    def __init__(
        self, inputs: int, outputs: int, rngs: nnx.Rngs, *, bias: bool = False, lora: LoRAConfig | None = None
    ) -> None:
        self.kernel = nnx.Param(INITS["bert"](rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.lora = LowRank(inputs, outputs, lora.rank, lora.alpha, lora.dropout, rngs) if lora else None

    def __call__(self, x: Float[Array, "B T I"], key: Array | None = None) -> Float[Array, "B T O"]:
        """[B, T, I] -> [B, T, O]; `key` seeds LoRA's dropout."""
        y = contract("bti,io->bto", x, self.kernel[...])
        if self.bias is not None:
            y = add_bias(y, self.bias[...])
        return y if self.lora is None else y + self.lora(x, key)


def rotary_frequencies(config: DecoderConfig) -> Float[np.ndarray, "d/2"]:
    """Rotation angle per position of each pair of components of a head, in radians."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)  # relative to the original training length
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotate(x: Float[Array, "B T N d"], angles: Float[Array, "B T d/2"]) -> Float[Array, "B T N d"]:
    """Rotate each pair (i, i + d/2) of a head by its angle (RoFormer, arXiv 2104.09864)."""
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        def project(name: str, inputs: int, outputs: int, bias: bool) -> Projection:
            return Projection(inputs, outputs, rngs, bias=bias, lora=_adapted(f"attention/{name}", lora))

        self.shape = config.heads, config.kv_heads, config.head_dim
        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = project("query", config.width, inner, config.attention_bias)
        self.key = project("key", config.width, kv, config.attention_bias)
        self.value = project("value", config.width, kv, config.attention_bias)
        self.output = project("output", inner, config.width, config.output_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.query_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.query_norm else None

    def __call__(
        self,
        x: Float[Array, "B T W"],
        angles: Float[Array, "B T d/2"],
        mask: Bool[Array, "B 1 T U"],
        cached: tuple[Float[Array, "B M U d"], Float[Array, "B M U d"], Int[Array, ""]] | None,
        key: Array | None,
    ) -> tuple[Float[Array, "B T W"], tuple[Float[Array, "B M U d"], Float[Array, "B M U d"]] | None]:
        """[B, T, W] -> [B, T, W], and with a cache the keys and values of its slots, including the new ones."""
        heads, kv_heads, d = self.shape
        keys = split_key(key, 4)
        q, k, v = self.project(x, keys)
        q = q.reshape(*x.shape[:2], heads, d)
        k, v = (y.reshape(*x.shape[:2], kv_heads, d) for y in (k, v))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        if cached is None:
            pooled, held = jax.nn.dot_product_attention(q, k, v, mask=mask), None  # [B, T, N, d]
        else:
            held_k, held_v, filled = cached
            at = (0, 0, filled, 0)
            held_k = jax.lax.dynamic_update_slice(held_k, k.swapaxes(1, 2).astype(held_k.dtype), at)
            held_v = jax.lax.dynamic_update_slice(held_v, v.swapaxes(1, 2).astype(held_v.dtype), at)
            pooled, held = _attend_cached(q, held_k, held_v, mask), (held_k, held_v)
        return self.output(pooled.reshape(*x.shape[:2], heads * d), keys[3]), held

    def project(self, x: Float[Array, "B T W"], keys) -> tuple[Array, Array, Array]:
        """Queries, keys and values of all heads."""
        return self.query(x, keys[0]), self.key(x, keys[1]), self.value(x, keys[2])


def _attend_cached(
    q: Float[Array, "B T N d"], k: Float[Array, "B M U d"], v: Float[Array, "B M U d"], mask: Bool[Array, "B 1 T U"]
) -> Float[Array, "B T N d"]:
    """Attention as one product per key head over all queries that share it: the cache is read in its stored layout."""
    B, T, N, d = q.shape
    shared = N // k.shape[1]
    rows = (q / math.sqrt(d)).reshape(B, T, -1, shared, d).swapaxes(1, 2).reshape(B, -1, T * shared, d)
    pooled, _ = pool(rows, k.astype(q.dtype), v.astype(q.dtype), jnp.repeat(mask, shared, axis=2))
    return pooled.reshape(B, -1, T, shared, d).swapaxes(1, 2).reshape(q.shape)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        def project(name: str, inputs: int, outputs: int) -> Projection:
            return Projection(inputs, outputs, rngs, lora=_adapted(f"feed_forward/{name}", lora))

        self.gate = project("gate", config.width, config.intermediate)
        self.up = project("up", config.width, config.intermediate)
        self.down = project("down", config.intermediate, config.width)

    def __call__(self, x: Float[Array, "B T W"], key: Array | None) -> Float[Array, "B T W"]:
        """[B, T, W] -> [B, T, W]."""
        keys = split_key(key, 3)
        gate, up = self.project(x, keys)
        return self.down(jax.nn.silu(gate) * up, keys[2])

    def project(self, x: Float[Array, "B T W"], keys) -> tuple[Array, Array]:
        """Gate and up."""
        return self.gate(x, keys[0]), self.up(x, keys[1])


def _adapted(name: str, lora: LoRAConfig | None) -> LoRAConfig | None:
    return lora if lora and name in [TARGETS[target] for target in lora.targets] else None


class DecoderLayer(nnx.Module):
    """Attention, then the feed-forward network, each pre-normalised with a residual connection."""

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, feed_forward_norm: RMSNorm, feed_forward: FeedForward
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward

    def __call__(self, x, angles, mask, cached, key):
        """Same arguments and results as `Attention`."""
        keys = split_key(key, 2)
        with jax.named_scope("decoder_attention"):
            pooled, held = self.attention(self.attention_norm(x), angles, mask, cached, keys[0])
            x = x + pooled
        with jax.named_scope("decoder_feed_forward"):
            return x + self.feed_forward(self.feed_forward_norm(x), keys[1]), held


class CausalDecoder(nnx.Module):
    """Stack of layers over token embeddings, shared by decoders for training and for generation."""

    config: DecoderConfig
    embedding: Embedding
    layers: nnx.List
    norm: RMSNorm

    def __call__(
        self,
        tokens: Int[Array, "B T"] | None = None,
        *,
        inputs_embeds: Float[Array, "B T W"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Logits after every token, in float32, and the cache with the tokens added (None without one).

        Takes token ids or `inputs_embeds`. `mask` is False at padding. `key` seeds LoRA's dropout; None: no dropout.
        """
        states, cache = self.states(tokens, inputs_embeds=inputs_embeds, mask=mask, cache=cache, key=key)
        return self.logits(states), cache

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Embeddings of tokens, in the dtype of computation."""
        return self.embedding(tokens).astype(self.config.compute_dtype)

    def states(
        self,
        tokens: Int[Array, "B T"] | None = None,
        *,
        inputs_embeds: Float[Array, "B T W"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
        key: Array | None = None,
        positions: Int[Array, "B T"] | None = None,
        visible: Bool[Array, "B T U"] | None = None,
    ) -> tuple[Float[Array, "B T W"], Cache | None]:
        """Final hidden states, the input of `logits`, so that a loss need not hold the logits of all tokens together.

        `positions` and `visible`, the slots that each token attends to, are given where tokens are not consecutive:
        beams and alternatives that share a prompt are side by side in the cache.
        """
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("expected either token ids or inputs_embeds; pass exactly one of the two")
        x = self.embed(tokens) if inputs_embeds is None else inputs_embeds.astype(self.config.compute_dtype)
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        # Attention gives padding zero weight, but zero times NaN is NaN.
        x = jnp.where(mask[..., None], x, 0)
        if cache is None:
            held, filled, before = mask, 0, 0
        else:
            held, filled = jax.lax.dynamic_update_slice(cache.mask, mask, (0, cache.filled)), cache.filled
            before = cache.mask.sum(1, keepdims=True)
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + before
        if visible is None:
            causal = jnp.arange(held.shape[1]) <= filled + jnp.arange(x.shape[1])[:, None]  # [T, U]
            visible = causal & held[:, None]
        angles = positions[..., None] * rotary_frequencies(self.config)  # [B, T, d/2]
        layer = jax.checkpoint(_apply) if self.config.remat and cache is None else _apply
        found = []
        for number, (module, layer_key) in enumerate(zip(self.layers, split_key(key, len(self.layers)), strict=True)):
            cached = None if cache is None else (cache.keys[number], cache.values[number], filled)
            x, kept = layer(module, x, angles, visible[:, None], cached, layer_key)
            found.append(kept)
        x = self.norm(x)
        if cache is None:
            return x, None
        keys, values = zip(*found, strict=True)
        return x, Cache(keys, values, held, filled + x.shape[1])

    def logits(self, states: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """The logits of states, in float32."""
        raise NotImplementedError

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Empty cache for the given numbers of sequences and tokens."""
        config = self.config
        shape = (batch, config.kv_heads, slots, config.head_dim)

        def zeros() -> tuple[Array, ...]:
            return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.layers))

        return Cache(zeros(), zeros(), jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def _apply(module: DecoderLayer, *arguments):
    return module(*arguments)


class Decoder(CausalDecoder):
    """Causal language model, a pytree of parameters for use with plain JAX transforms."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, lora: LoRAConfig | None = None) -> None:
        self.config, self.lora = config, lora
        self.embedding = Embedding(config.vocab_size, config.width, rngs)
        self.layers = nnx.List([_new_layer(config, lora, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else Projection(config.width, config.vocab_size, rngs)

    def logits(self, states: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """The logits of states, in float32."""
        with jax.named_scope("logits"):
            if self.head is None:
                table = self.embedding.embedding[...]
                return contract("btw,vw->btv", states, table).astype(jnp.float32)
            return self.head(states).astype(jnp.float32)


def _new_layer(config: DecoderConfig, lora: LoRAConfig | None, rngs: nnx.Rngs) -> DecoderLayer:
    norms = (RMSNorm(config.width, config.norm_eps) for _ in range(2))
    attention = Attention(config, lora, rngs)
    return DecoderLayer(next(norms), attention, next(norms), FeedForward(config, lora, rngs))
