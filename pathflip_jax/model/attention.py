"""Attention as this model uses it: over packed texts, over patches, and as PyTorch's MultiheadAttention.

Logits and softmax are float32 whatever the compute dtype. A row that may look at nothing gets zero weights.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array as Key
from jax.nn import initializers
from jaxtyping import Array, Bool, Float

Initializer = Callable[..., Array]


def dropout(x: Array, rate: float, key: Key | None) -> Array:
    """Inverted dropout; the identity where `key` is None (evaluation)."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def subkey(key: Key | None, index: int) -> Key | None:
    """The `index`-th key below `key`; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)


def masked_softmax(logits: Float[Array, "*batch N"], mask: Bool[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """Softmax over the last axis where `mask` holds, in float32; all zeros where it holds nowhere.

    A plain softmax of a fully masked row gives the mean of the values: the mean of padding.
    """
    logits = logits.astype(jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    peak = jax.lax.stop_gradient(jnp.max(jnp.where(mask, logits, lowest), axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - peak, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def linear(inputs: int, outputs: int, kernel_init: Initializer, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear with float32 parameters, a zero bias, and the compute dtype of its products."""
    return nnx.Linear(inputs, outputs, kernel_init=kernel_init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def layer_norm(width: int, epsilon: float, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm over the last axis; statistics in float32, output in the compute dtype."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def split_heads(x: Float[Array, "*batch N W"], heads: int) -> Float[Array, "*batch N heads d"]:
    """Cut the last axis into heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class SelfAttention(nnx.Module):
    """BERT's self-attention with its residual and LayerNorm, for queries and texts alike."""

    def __init__(self, width: int, heads: int, rate: float, epsilon: float, init: Initializer, dtype, rngs: nnx.Rngs):
        self.heads, self.rate = heads, rate
        self.query = linear(width, width, init, dtype, rngs)
        self.key = linear(width, width, init, dtype, rngs)
        self.value = linear(width, width, init, dtype, rngs)
        self.output = linear(width, width, init, dtype, rngs)
        self.norm = layer_norm(width, epsilon, dtype, rngs)

    def __call__(self, x: Float[Array, "n T H"], mask: Bool[Array, "n T T"] | None, key: Key | None):
        """[n, T, H] -> [n, T, H]; row t attends to column u where `mask[n, t, u]`, to all where `mask` is None."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        logits = jnp.einsum("nthd,nuhd->nhtu", q, k) / math.sqrt(q.shape[-1])
        mask = jnp.ones((), bool) if mask is None else mask[:, None]
        weights = masked_softmax(logits, jnp.broadcast_to(mask, logits.shape)).astype(v.dtype)
        pooled = jnp.einsum("nhtu,nuhd->nthd", dropout(weights, self.rate, subkey(key, 0)), v)
        output = dropout(self.output(pooled.reshape(x.shape)), self.rate, subkey(key, 1))
        return self.norm(x + output)


class PatchAttention(nnx.Module):
    """The queries' cross-attention to patches, with residual and LayerNorm.

    The key and value projections are absorbed into the queries: (W_k x) . q = x . (W_k^T q), so the heads share one
    stream of keys and values, the patch embeddings themselves, and no [N, H] tensor is ever made. Exact: the key
    bias cancels in the softmax, the value projection commutes with the pooling, and the value bias counts once,
    where there is a patch at all.
    """

    def __init__(
        self,
        width: int,
        patch_width: int,
        heads: int,
        rate: float,
        epsilon: float,
        init: Initializer,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.heads, self.rate, self.dtype = heads, rate, dtype
        self.query = linear(width, width, init, dtype, rngs)
        self.key = linear(patch_width, width, init, dtype, rngs)
        self.value = linear(patch_width, width, init, dtype, rngs)
        self.output = linear(width, width, init, dtype, rngs)
        self.norm = layer_norm(width, epsilon, dtype, rngs)

    def __call__(
        self, x: Float[Array, "n Q H"], patches: Float[Array, "n N D"], mask: Bool[Array, "n N"], key: Key | None
    ):
        """Queries after looking at the patches [n, Q, H], and where they looked [n, heads, Q, N].

        A slide or region with no valid patch pools zero, value bias included.
        """
        q = split_heads(self.query(x), self.heads)  # [n, Q, heads, d]
        key_kernel = split_heads(self.key.kernel[...].astype(q.dtype), self.heads)  # [D, heads, d]
        value_kernel = split_heads(self.value.kernel[...].astype(q.dtype), self.heads)
        rows = jnp.einsum("nqhd,chd->nhqc", q, key_kernel) / math.sqrt(q.shape[-1])
        n, heads, queries, width = rows.shape
        logits = jnp.einsum("nrc,npc->nrp", rows.reshape(n, heads * queries, width), patches)
        weights = masked_softmax(logits, jnp.broadcast_to(mask[:, None], logits.shape))  # [n, heads*Q, N]
        kept = dropout(weights, self.rate, subkey(key, 0)).astype(q.dtype)
        pooled = jnp.einsum("nrp,npc->nrc", kept, patches).reshape(n, heads, queries, width)
        # The bias rides on the weights: once after a full softmax, less what dropout took, not at all with no patch.
        share = jnp.sum(kept, axis=-1).reshape(n, heads, queries)
        bias = split_heads(self.value.bias[...].astype(q.dtype), self.heads)  # [heads, d]
        pooled = jnp.einsum("nhqc,chd->nqhd", pooled, value_kernel) + jnp.einsum("nhq,hd->nqhd", share, bias)
        output = dropout(self.output(pooled.reshape(x.shape)), self.rate, subkey(key, 1))
        return self.norm(x + output), weights.reshape(n, heads, queries, -1)


class MultiheadAttention(nnx.Module):
    """Attention with in- and out-projections as torch.nn.MultiheadAttention has them."""

    def __init__(self, width: int, heads: int, dtype, rngs: nnx.Rngs):
        self.heads = heads
        # torch draws the three input projections as one [3W, W] matrix.
        fused = initializers.variance_scaling(0.5, "fan_in", "uniform")
        self.query = linear(width, width, fused, dtype, rngs)
        self.key = linear(width, width, fused, dtype, rngs)
        self.value = linear(width, width, fused, dtype, rngs)
        self.output = linear(width, width, initializers.variance_scaling(1 / 3, "fan_in", "uniform"), dtype, rngs)

    def __call__(
        self,
        queries: Float[Array, "B C D"],
        keys: Float[Array, "B R D"],
        values: Float[Array, "B R D"],
        mask: Bool[Array, "B R"],
        rate: float = 0.0,
        key: Key | None = None,
    ):
        """Pooled values [B, C, D] and their weights [B, heads, C, R]; masked keys get no weight."""
        q, k = split_heads(self.query(queries), self.heads), split_heads(self.key(keys), self.heads)
        v = split_heads(self.value(values), self.heads)
        logits = jnp.einsum("bchd,brhd->bhcr", q, k) / math.sqrt(q.shape[-1])
        weights = masked_softmax(logits, jnp.broadcast_to(mask[:, None, None], logits.shape))
        kept = dropout(weights, rate, key).astype(v.dtype)
        pooled = jnp.einsum("bhcr,brhd->bchd", kept, v).reshape(queries.shape)
        return self.output(pooled), weights
