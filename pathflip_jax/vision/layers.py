"""Layers of the vision transformer; all parameters come from published files, so that none is initialised.

A layer computes in the dtype of its input, layer normalisation in float32. `stack` is the leading axis of parameters of
a stack of equal layers.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pathflip_jax.ops.matmul import add_bias, contract
from pathflip_jax.ops.norm import layer_norm
from pathflip_jax.ops.platform import fusion_barrier

Stack = tuple[int, ...]


class Dense(nnx.Module):
    """Affine layer x @ kernel + bias; `bias` is None in layers without one."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, stack: Stack = ()) -> None:
        self.kernel = nnx.Param(jnp.zeros((*stack, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((*stack, outputs))) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]."""
        axes = "abcdefgh"[: x.ndim - 1]
        y = contract(f"{axes}i,io->{axes}o", x, self.kernel[...])
        return y if self.bias is None else add_bias(y, self.bias[...].astype(x.dtype))


class Norm(nnx.Module):
    """Layer normalisation in float32, returned in `dtype`."""

    def __init__(self, width: int, eps: float, *, stack: Stack = ()) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros((*stack, width)))
        self.bias = nnx.Param(jnp.zeros((*stack, width)))

    def __call__(self, x: Float[Array, "... W"], dtype=jnp.float32) -> Float[Array, "... W"]:
        """[..., W] -> [..., W]."""
        return fusion_barrier(layer_norm(x, self.scale[...], self.bias[...], self.eps).astype(dtype))
