"""Layers shared by all parts of the models.

Parameters are float32; a layer computes in the dtype of its activations, except for softmax and layer normalisation,
which always run in float32. Dropout keys are raw JAX keys; None means no dropout. Letters as in
`pathflip_jax.model.pathflip`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.ops.attention import attend
from pathflip_jax.ops.dropout import dropout
from pathflip_jax.ops.matmul import add_bias, contract
from pathflip_jax.ops.norm import layer_norm, rms_norm
from pathflip_jax.ops.platform import fusion_barrier

BERT_EPS = 1e-12  # of every LayerNorm in a BERT
# Kernel initialisers. "torch" is the default of torch.nn.Linear, bias included; "torch_fused" one third of the
# [3D, D] in-projection of torch.nn.MultiheadAttention, which PyTorch draws as one matrix.
INITS: dict[str, Initializer] = {
    "bert": initializers.normal(0.02),
    "fan_in": initializers.lecun_normal(),
    "torch": initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "torch_fused": initializers.variance_scaling(1 / 2, "fan_in", "uniform"),
}


def initial(init: Initializer, shape: tuple[int, ...], rngs: nnx.Rngs | None) -> Array:
    """Initial value of a parameter; without `rngs` zeros, for a model of which only the structure is wanted."""
    return jnp.zeros(shape) if rngs is None else init(rngs.params(), shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    """Initialiser that draws from -bound to bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class LowRank(nnx.Module):
    """LoRA adapter of a projection (arXiv 2106.09685); `b` is initialised to zero, so that it starts as a no-op."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, rate: float, rngs: nnx.Rngs) -> None:
        bound = 1 / math.sqrt(inputs)
        self.rate, self.scale = rate, alpha / rank
        self.a = nnx.Param(initial(uniform(bound), (inputs, rank), rngs))
        self.b = nnx.Param(jnp.zeros((rank, outputs)))

    def __call__(self, x: Float[Array, "... I"], key: Array | None = None) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]; `key` seeds dropout of the inputs."""
        axes = _axes(x)
        inner = contract(f"{axes}i,ir->{axes}r", dropout(x, self.rate, key), self.a[...])
        return contract(f"{axes}r,ro->{axes}o", inner, self.b[...]) * self.scale


class Linear(nnx.Module):
    """Affine layer x @ kernel + bias in the dtype of x; the kernel is [inputs, outputs], initialised by `INITS[init]`.

    The output of a `lora` attached later is added.
    """

    def __init__(self, inputs: int, outputs: int, init: str, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(initial(INITS[init], (inputs, outputs), rngs))
        if init == "torch":
            bound = 1 / math.sqrt(inputs)
            self.bias = nnx.Param(initial(uniform(bound), (outputs,), rngs))
        else:
            self.bias = nnx.Param(jnp.zeros(outputs))
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]."""
        axes = _axes(x)
        y = add_bias(contract(f"{axes}i,io->{axes}o", x, self.kernel[...]), self.bias[...])
        return y if self.lora is None else y + self.lora(x)


def _axes(x: Array) -> str:
    """Einsum letters for all axes but the last."""
    return "abcdefgh"[: x.ndim - 1]


class Embedding(nnx.Module):
    """Embedding table, initialised as in BERT."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(initial(INITS["bert"], (rows, width), rngs))

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
        # XLA:CPU otherwise recomputes the residual sum, and its gradient, in every later layer.
        return fusion_barrier(y)


class RMSNorm(nnx.Module):
    """RMS normalisation in float32, whatever the dtype of the activations."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        """[..., W] -> [..., W]."""
        return rms_norm(x, self.scale[...], self.eps)


class MultiheadAttention(nnx.Module):
    """Multi-head attention with the in- and out-projections of torch.nn.MultiheadAttention."""

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
        """Pooled values of each query, and its weights; masked keys have weight zero."""
        projected = self.query(queries), self.key(keys), self.value(values)
        pooled, weights = attend(*projected, mask[:, None, None], self.heads, rate, dropout_key)
        return self.output(pooled), weights
