"""The layers that every part of the model is made of.

Parameters are float32; the dtype of the activations decides in what precision a layer works, except for
softmax and layer normalisation, which always run in float32. Keys of dropout are raw JAX keys; None means
no dropout. Letters as in `pathflip_jax.model.pathflip`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int

BERT_EPS = 1e-12  # of every LayerNorm in a BERT
# How a kernel starts. "torch" is the default of torch.nn.Linear, bias included; "torch_fused" one third of the
# [3D, D] in-projection of torch.nn.MultiheadAttention, which PyTorch draws as one matrix.
INITS: dict[str, Initializer] = {
    "bert": initializers.normal(0.02),
    "fan_in": initializers.lecun_normal(),
    "torch": initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "torch_fused": initializers.variance_scaling(1 / 2, "fan_in", "uniform"),
}


class LowRank(nnx.Module):
    """What LoRA adds to a projection (arXiv 2106.09685); `b` starts at zero, so that at first it adds nothing."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, rate: float, rngs: nnx.Rngs) -> None:
        bound = 1 / math.sqrt(inputs)
        self.rate, self.scale = rate, alpha / rank
        self.a = nnx.Param(jax.random.uniform(rngs.params(), (inputs, rank), minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((rank, outputs)))

    def __call__(self, x: Float[Array, "... I"], key: Array | None = None) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]; `key` draws dropout of the inputs."""
        axes = _axes(x)
        inner = contract(f"{axes}i,ir->{axes}r", dropout(x, self.rate, key), self.a[...])
        return contract(f"{axes}r,ro->{axes}o", inner, self.b[...]) * self.scale


class Linear(nnx.Module):
    """x @ kernel + bias in the dtype of x; the kernel is [inputs, outputs] and starts as `INITS[init]` says.

    A `lora` that it is given later is added.
    """

    def __init__(self, inputs: int, outputs: int, init: str, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(INITS[init](rngs.params(), (inputs, outputs), jnp.float32))
        if init == "torch":
            bound = 1 / math.sqrt(inputs)
            self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))
        else:
            self.bias = nnx.Param(jnp.zeros(outputs))
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]."""
        axes = _axes(x)
        y = add_bias(contract(f"{axes}i,io->{axes}o", x, self.kernel[...]), self.bias[...])
        return y if self.lora is None else y + self.lora(x)


def _axes(x: Array) -> str:
    """A letter for each axis but the last."""
    return "abcdefgh"[: x.ndim - 1]


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
        y = layer_norm(x, self.scale[...], self.bias[...], self.eps)
        # Here fusion ends: XLA for CPU would compute the sum of residuals, and its gradient, again in every layer.
        return lax.optimization_barrier(y)


class RMSNorm(nnx.Module):
    """Root mean square normalisation in float32, whatever the dtype of the activations."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        """[..., W] -> [..., W]."""
        return rms_norm(x, self.scale[...], self.eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... W"], scale: Float[Array, "W"], eps: float) -> Float[Array, "... W"]:
    """Root mean square normalisation in float32, in the dtype of x."""
    return scale.astype(x.dtype) * _unit_rms(x, eps)[0].astype(x.dtype)


def _unit_rms(x: Array, eps: float) -> tuple[Array, Array]:
    """x with root mean square 1, in float32, and what it was multiplied with."""
    x = x.astype(jnp.float32)
    factor = lax.rsqrt(row_sums(x * x) / x.shape[-1] + eps)
    return x * factor, factor


def _rms_norm_backward(eps: float, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # By hand, as of `layer_norm` below.
    x, scale = kept
    W, dtype = x.shape[-1], x.dtype
    x, gradient = wait(x, gradient.astype(jnp.float32))
    x, factor = _unit_rms(x, eps)
    inner = gradient * scale
    outer = factor * (inner - x * (row_sums(inner * x) / W))
    return outer.astype(dtype), column_sums(gradient * x).astype(scale.dtype)  # a decoder's scale may be bfloat16


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... W"], scale: Float[Array, "W"], bias: Float[Array, "W"], eps: float
) -> Float[Array, "... W"]:
    """Layer normalisation in float32, in the dtype of x."""
    return (_standardise(x, eps)[0] * scale + bias).astype(x.dtype)


def _standardise(x: Array, eps: float) -> tuple[Array, Array]:
    """x with mean 0 and variance 1, in float32, and what it was multiplied with."""
    x = x.astype(jnp.float32)
    return _unit_rms(x - x.mean(-1, keepdims=True), eps)


def _layer_norm_backward(eps: float, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    # By hand: of the derivative that JAX finds, XLA for CPU runs the sums over rows and columns one entry at a time,
    # ten times as slow.
    x, scale = kept
    W, dtype = x.shape[-1], x.dtype
    x, gradient = wait(x, gradient.astype(jnp.float32))
    x, factor = _standardise(x, eps)
    inner = gradient * scale
    outer = factor * (inner - row_sums(inner) / W - x * (row_sums(inner * x) / W))
    return outer.astype(dtype), column_sums(gradient * x), column_sums(gradient)


layer_norm.defvjp(lambda x, scale, bias, eps: (layer_norm(x, scale, bias, eps), (x, scale)), _layer_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, x: Array, kernel: Array) -> Array:
    """einsum of activations with a kernel, in the dtype of x; `spec` names every axis, without dots.

    In bfloat16 too the gradient of a float32 kernel is summed in float32 and leaves so: devices add up their shares of
    it, and each addition in bfloat16 would round to three digits.
    """
    return jnp.einsum(spec, x, kernel.astype(x.dtype))


def _contract_backward(spec: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    left, right, output = spec.replace("->", ",").split(",")
    towards_x = jnp.einsum(f"{output},{right}->{left}", gradient, kernel.astype(x.dtype))
    return towards_x, lax.platform_dependent(
        x, gradient, cpu=partial(_sum_over_rows, left, output, right), default=partial(_sum, left, output, right)
    ).astype(kernel.dtype)


def _sum(left: str, output: str, right: str, x: Array, gradient: Array) -> Array:
    return jnp.einsum(f"{left},{output}->{right}", x, gradient, preferred_element_type=jnp.float32)


def _sum_over_rows(left: str, output: str, right: str, x: Array, gradient: Array) -> Array:
    # Summed over several axes, XLA for CPU turns x or the gradient first, and computes it anew to do so, one entry at
    # a time; over one axis it does not. Elsewhere turning is free, and one axis of two may be hard to share out.
    rows = len(left) - len(set(left) & set(right))
    if rows > 1 and left[:rows] == output[:rows]:
        x, gradient = (array.reshape(-1, *array.shape[rows:]) for array in (x, gradient))
        left, output = left[rows - 1 :], output[rows - 1 :]
    return _sum(left, output, right, x, gradient)


contract.defvjp(lambda spec, x, kernel: (contract(spec, x, kernel), (x, kernel)), _contract_backward)


def add_bias(x: Float[Array, "... W"], bias: Float[Array, "W"]) -> Float[Array, "... W"]:
    """x + bias in the dtype of x; as in `contract`, the gradient of the bias is summed in float32."""
    return x + bias if x.dtype == bias.dtype else _add_bias(x, bias)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.astype(x.dtype)


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, gradient.astype(jnp.float32).sum(tuple(range(gradient.ndim - 1)))


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


def row_sums(x: Float[Array, "... W"]) -> Float[Array, "... 1"]:
    """Sums over the last axis, as a matrix product: XLA for CPU vectorises no sum of what it computes on the way."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")


def column_sums(x: Float[Array, "... W"]) -> Float[Array, "W"]:
    """Sums over all axes but the last, as a matrix product: see `row_sums`."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(jnp.ones((1, len(rows)), x.dtype), rows, precision="highest")[0]


def split_key(key: Array | None, n: int) -> list[Array | None]:
    """Split a key in n; without a key there is no dropout, in any of the parts either."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def gelu(x: Array) -> Array:
    """Exact GELU, as PyTorch computes it; by erf, where `jax.nn.gelu` takes the costlier erfc."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def wait(x: Array, gradient: Array) -> tuple[Array, Array]:
    """Both, but x only when `gradient` is there: what is computed of it once more is not computed ahead and kept."""
    return lax.optimization_barrier((x, gradient))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recompute(function: Callable[[Array, Any], Array], x: Array, module: Any) -> Array:
    """function(x, module), whose inner values are computed again for the gradient: memory for a little time."""
    return function(x, module)


def _recompute_backward(function: Callable[[Array, Any], Array], kept: tuple[Array, Any], gradient: Array):
    x, gradient = wait(kept[0], gradient)
    return jax.vjp(function, x, kept[1])[1](gradient)


recompute.defvjp(lambda function, x, module: (function(x, module), (x, module)), _recompute_backward)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each entry with probability `rate` and scale the rest; the identity without a key.

    What falls is a function of the key and the place of the entry, whatever the devices. It is drawn again for the
    gradient, so that nothing is kept for it.
    """
    if key is None or rate == 0:
        return x
    return drop(x, rate, jax.random.key_data(key))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def drop(x: Array, rate: float, seed: Array) -> Array:
    """`dropout` by the two words of a key: uint32 [2]."""
    dropped = round(rate * 2**32)
    return jnp.where(_hash(x.shape, seed) >= np.uint32(dropped), x * (1 / (1 - dropped / 2**32)), 0)


drop.defvjp(lambda x, rate, seed: (drop(x, rate, seed), seed), lambda rate, seed, g: (drop(g, rate, seed), None))


def _hash(shape: tuple[int, ...], seed: Array) -> Array:
    """A random word for each place, of its number and the seed's two words; it repeats after 2**32 places.

    The mixing is the finalizer of MurmurHash3, whose every output bit depends on every input bit. Threefry, which
    `jax.random` would draw with, costs a CPU more than the attention whose weights it drops.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = place * np.uint32(0x9E3779B9) + seed[0]
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B) + seed[1]
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def softmax_where(scores: Float[Array, "... N"], mask: Bool[Array, "... N"] | None) -> Float[Array, "... N"]:
    """Softmax in float32 over the unmasked entries; all zeros where everything is masked, never a mean of padding."""
    scores = scores.astype(jnp.float32)
    if mask is None:
        return jax.nn.softmax(scores)
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min)), 0)


def pool(
    query: Float[Array, "... C d"],
    key: Float[Array, "... T d"],
    value: Float[Array, "... T e"],
    mask: Bool[Array, "... C T"] | None,
    rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "... C e"], Float[Array, "... C 1"]]:
    """Softmax attention of rows of queries over rows of keys: what each pools, and the sum of its weights.

    That sum is one, but for dropout, and zero where everything is masked. The softmax is in float32. Weights are
    computed again for the gradient, as in FlashAttention (arXiv 2205.14135): nothing of size C x T is kept.
    """
    seed = None if dropout_key is None or rate == 0 else jax.random.key_data(dropout_key)
    return _pool(query, key, value, mask, seed, rate)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _pool(query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, rate: float):
    return _pool_forward(query, key, value, mask, seed, rate)[0]


def _pool_forward(query: Array, key: Array, value: Array, mask: Array | None, seed: Array | None, rate: float):
    scores = _scores(query, key, mask)
    # The barrier keeps it small: XLA for CPU would spread it over all keys, and keep that for the gradient.
    largest = lax.optimization_barrier(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    total = row_sums(weights)
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)  # [..., C, 1]
    kept = weights if seed is None else drop(weights, rate, seed)
    pooled = (matmul(kept.astype(value.dtype), value) * share).astype(value.dtype)
    sums = (share * (total if seed is None else row_sums(kept))).astype(value.dtype)
    return (pooled, sums), (query, key, value, mask, seed, largest, share)


def _pool_backward(rate: float, residuals: tuple, gradients: tuple[Array, Array]):
    query, key, value, mask, seed, largest, share = residuals
    gradient, sums_gradient = gradients
    query, gradient = wait(query, gradient)
    weights = jnp.exp(_scores(query, key, mask) - largest) * share
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    kept = weights if seed is None else drop(weights, rate, seed)
    inner = matmul(gradient, value.mT) + sums_gradient.astype(jnp.float32)  # towards `kept`
    inner = inner if seed is None else drop(inner, rate, seed)
    inner = weights * inner
    inner = (inner - weights * row_sums(inner)).astype(query.dtype)
    gradients = matmul(inner, key), matmul(inner.mT, query), matmul(kept.astype(value.dtype).mT, gradient)
    shapes = query, key, value
    gradients = [g.astype(x.dtype) for g, x in zip(gradients, shapes, strict=True)]
    return *gradients, None, None


_pool.defvjp(_pool_forward, _pool_backward)


def _scores(query: Array, key: Array, mask: Array | None) -> Float[Array, "... C T"]:
    scores = matmul(query, key.mT)
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def matmul(x: Float[Array, "... C d"], y: Float[Array, "... d T"]) -> Float[Array, "... C T"]:
    """x @ y, summed in float32 and left so."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def attention_weights(
    query: Float[Array, "... C d"], key: Float[Array, "... T d"], mask: Bool[Array, "... C T"] | None
) -> Float[Array, "... C T"]:
    """The weights that `pool` pools with, before dropout: for maps, since whoever does not ask does not pay."""
    return softmax_where(matmul(query, key.mT), mask)


def split_heads(x: Float[Array, "... T H"], heads: int) -> Float[Array, "... heads T d"]:
    """[..., T, H] -> [..., heads, T, H / heads]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


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
    query, key, value = (split_heads(x, heads) for x in (query, key, value))
    query /= math.sqrt(query.shape[-1])
    pooled, _ = pool(query, key, value, mask, rate, dropout_key)
    pooled = pooled.swapaxes(-2, -3)
    pooled = pooled.reshape(*pooled.shape[:-2], pooled.shape[-2] * pooled.shape[-1])
    return pooled, attention_weights(query, key, mask)


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
