"""Products of few rows with kernels stored in another form than [inputs, outputs], so that each weight is read once.

A token of few sequences is bound by the bytes of the weights. XLA for CPU reads them at the memory's speed in one form
only (benchmarks/ROOFLINE.md, "Generation"): float32 kernels [outputs, inputs] on the left of a product. Other platforms
read plain kernels well. There is no gradient: these forms are for generation.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pathflip_jax.ops.platform import traced_for

Layout = Literal["plain", "rows"]
FEW = 16  # rows of inputs up to which the kernel on the left is faster; those of a prompt make plain products


def best_layout() -> Layout:
    """The form that the platform traced for reads fastest."""
    return "rows" if traced_for() == "cpu" else "plain"


def store(kernel: Float[Array, "I O"], layout: Layout) -> Array:
    """plain: [I, O]; rows: [O, I] in float32, whatever the dtype of the kernel."""
    return kernel.T.astype(jnp.float32) if layout == "rows" else kernel


def packed_matmul(x: Float[Array, "n I"], stored: Array, layout: Layout) -> Float[Array, "n O"]:
    """x @ kernel of a kernel as `store` gives it, summed in float32."""
    if layout == "plain":
        return packed_matmul_reference(x, stored)
    if len(x) > FEW:
        return jnp.einsum("ni,oi->no", x.astype(jnp.float32), stored)
    # Without the barrier XLA would turn the product round, to spare the transpose, at half the speed.
    return lax.optimization_barrier(jnp.einsum("oi,ni->on", stored, x.astype(jnp.float32))).T


def packed_matmul_reference(x: Float[Array, "n I"], kernel: Float[Array, "I O"]) -> Float[Array, "n O"]:
    """`packed_matmul` of a kernel as it was before it was stored."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
