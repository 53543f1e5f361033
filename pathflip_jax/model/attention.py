"""The layers that every part of the model is made of.

Parameters are float32; the dtype of the activations decides in what precision a layer works, except for
softmax and layer normalisation, which always run in float32. Keys of dropout are raw JAX keys; None means
no dropout. Letters as in `pathflip_jax.model.pathflip`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int

# How a kernel starts. "torch" is the default of torch.nn.Linear, bias included; "torch_fused" one third of the
# [3D, D] in-projection of torch.nn.MultiheadAttention, which PyTorch draws as one matrix.
INITS: dict[str, Initializer] = {
    "bert": initializers.normal(0.02),
    "fan_in": initializers.lecun_normal(),
    "torch": initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "torch_fused": initializers.variance_scaling(1 / 2, "fan_in", "uniform"),
}


class Linear(nnx.Module):
    """x @ kernel + bias in the dtype of x; the kernel is [inputs, outputs] and starts as `INITS[init]` says."""

    def __init__(self, inputs: int, outputs: int, init: str, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(INITS[init](rngs.params(), (inputs, outputs), jnp.float32))
        if init == "torch":
            bound = 1 / math.sqrt(inputs)
            self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))
        else:
            self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]."""
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of rows, looked up by number; it starts as in BERT."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(INITS["bert"](rngs.params(), (rows, width), jnp.float32))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... W"]:
        """[...] -> [..., W]."""
        return self.embedding[...][ids]


class LayerNorm(nnx.Module):
    """Layer normalisation in float32, whatever the dtype of the activations."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        """[..., W] -> [..., W]."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def split_key(key: Array | None, n: int) -> list[Array | None]:
    """Split a key in n; without a key there is no dropout, in any of the parts either."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each entry with probability `rate` and scale the rest; the identity without a key.

    Each random word serves two entries with 16 bits: on a CPU drawing them is what dropout costs.
    """
    if key is None or rate == 0:
        return x
    *rest, n = x.shape
    words = jax.random.bits(key, (*rest, -(-n // 2)), jnp.uint32)
    draws = lax.bitcast_convert_type(words, jnp.uint16).reshape(*rest, -1)[..., :n]
    dropped = round(rate * 2**16)
    return jnp.where(draws >= dropped, x * (1 / (1 - dropped / 2**16)), 0)


def softmax_where(scores: Float[Array, "... N"], mask: Bool[Array, "... N"] | None) -> Float[Array, "... N"]:
    """Softmax in float32 over the unmasked entries; all zeros where everything is masked, never a mean of padding."""
    scores = scores.astype(jnp.float32)
    if mask is None:
        return jax.nn.softmax(scores)
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min)), 0)


def attend(
    query: Float[Array, "... C H"],
    key: Float[Array, "... T H"],
    value: Float[Array, "... T H"],
    mask: Bool[Array, "... T"] | None,
    heads: int,
    rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "... C H"], Float[Array, "... heads C T"]]:
    """Multi-head attention between projected rows: what it pools, and the probabilities before dropout.

    The mask broadcasts against [..., heads, C, T]. C may be 0: a batch of one slide has no negatives.
    """
    query, key, value = (x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads) for x in (query, key, value))
    scores = jnp.einsum(
        "...chd,...thd->...hct", query / math.sqrt(query.shape[-1]), key, preferred_element_type=jnp.float32
    )
    weights = softmax_where(scores, mask)
    kept = dropout(weights.astype(value.dtype), rate, dropout_key)
    pooled = jnp.einsum("...hct,...thd->...chd", kept, value)
    return pooled.reshape(*pooled.shape[:-2], pooled.shape[-2] * pooled.shape[-1]), weights


class MultiheadAttention(nnx.Module):
    """Attention with in- and out-projections, as torch.nn.MultiheadAttention has them."""

    def __init__(self, width: int, heads: int, init: str, rngs: nnx.Rngs) -> None:
        self.heads = heads
        inputs = "torch_fused" if init == "torch" else init
        self.query = Linear(width, width, inputs, rngs)
        self.key = Linear(width, width, inputs, rngs)
        self.value = Linear(width, width, inputs, rngs)
        self.output = Linear(width, width, init, rngs)
        self.output.bias[...] = jnp.zeros(width)

    def __call__(
        self,
        queries: Float[Array, "B C D"],
        keys: Float[Array, "B R D"],
        values: Float[Array, "B R D"],
        mask: Bool[Array, "B R"],
        rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B heads C R"]]:
        """What each query pools, and its weights; masked keys get none."""
        projected = self.query(queries), self.key(keys), self.value(values)
        pooled, weights = attend(*projected, mask[:, None, None], self.heads, rate, dropout_key)
        return self.output(pooled), weights
