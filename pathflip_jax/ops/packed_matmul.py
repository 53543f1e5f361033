"""Products of few rows with kernels stored in a layout other than [inputs, outputs], so that each weight is read once.

Decoding a token for few sequences is limited by reading the weights. XLA:CPU reads them at memory bandwidth in one
layout only (benchmarks/ROOFLINE.md, "Generation"): float32 kernels [outputs, inputs] on the left of a product. Other
platforms read plain kernels well. There is no gradient: these layouts are for generation.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pathflip_jax.ops.platform import target_platform

Layout = Literal["plain", "rows"]
MAX_ROWS = 16  # input rows up to which the kernel on the left is faster; prompts use plain products


def best_layout() -> Layout:
    """Fastest layout on the target platform of the trace."""
    return "rows" if target_platform() == "cpu" else "plain"


def store(kernel: Float[Array, "I O"], layout: Layout) -> Array:
    """Kernel in the given layout: "plain" is [I, O]; "rows" is [O, I] in float32, whatever the dtype of the kernel."""
    return kernel.T.astype(jnp.float32) if layout == "rows" else kernel


def packed_matmul(x: Float[Array, "n I"], stored: Array, layout: Layout) -> Float[Array, "n O"]:
    """x @ kernel for a kernel stored by `store`, accumulated in float32."""
    if layout == "plain":
        return packed_matmul_reference(x, stored)
    if len(x) > MAX_ROWS:
        return jnp.einsum("ni,oi->no", x.astype(jnp.float32), stored)
    # Without the barrier XLA swaps the operands to avoid the transpose, at half the speed.
    return lax.optimization_barrier(jnp.einsum("oi,ni->on", stored, x.astype(jnp.float32))).T


def packed_matmul_reference(x: Float[Array, "n I"], kernel: Float[Array, "I O"]) -> Float[Array, "n O"]:
    """Reference of `packed_matmul`, on the kernel before `store`."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
