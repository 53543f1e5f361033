"""Matrix products, biases and sums with float32 gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pathflip_jax.ops.platform import by_platform


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, x: Array, kernel: Array) -> Array:
    """Einsum of activations with a kernel, in the dtype of x; `spec` names every axis, without an ellipsis.

    Even for bfloat16 activations the gradient of a float32 kernel is accumulated and returned in float32: it is
    all-reduced over devices, and each addition in bfloat16 would round to three digits.
    """
    return jnp.einsum(spec, x, kernel.astype(x.dtype))


def _contract_backward(spec: str, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    left, right, output = spec.replace("->", ",").split(",")
    towards_x = jnp.einsum(f"{output},{right}->{left}", gradient, kernel.astype(x.dtype))
    return towards_x, kernel_gradient(left, output, right, x, gradient).astype(kernel.dtype)


def contract_rows(left: str, output: str, right: str, x: Array, gradient: Array) -> Array:
    """Gradient of a kernel in float32, summed over all leading axes."""
    return jnp.einsum(f"{left},{output}->{right}", x, gradient, preferred_element_type=jnp.float32)


def contract_joined_rows(left: str, output: str, right: str, x: Array, gradient: Array) -> Array:
    """`contract_rows` with its leading axes flattened into one.

    To sum over several axes, XLA:CPU first transposes x or the gradient, recomputing it one entry at a time; over a
    single axis it does not. Other platforms transpose for free, and a flattened axis may be hard to shard.
    """
    rows = len(left) - len(set(left) & set(right))
    if rows > 1 and left[:rows] == output[:rows]:
        x, gradient = (array.reshape(-1, *array.shape[rows:]) for array in (x, gradient))
        left, output = left[rows - 1 :], output[rows - 1 :]
    return contract_rows(left, output, right, x, gradient)


kernel_gradient = by_platform(cpu=contract_joined_rows, default=contract_rows)

contract.defvjp(lambda spec, x, kernel: (contract(spec, x, kernel), (x, kernel)), _contract_backward)


def add_bias(x: Float[Array, "... W"], bias: Float[Array, "W"]) -> Float[Array, "... W"]:
    """x + bias in the dtype of x; as in `contract`, the gradient of the bias is accumulated in float32."""
    return x + jax.lax.broadcast_to_rank(bias, x.ndim) if x.dtype == bias.dtype else _add_bias(x, bias)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + jax.lax.broadcast_to_rank(bias.astype(x.dtype), x.ndim)


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, gradient.astype(jnp.float32).sum(tuple(range(gradient.ndim - 1)))


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


def plain_row_sums(x: Float[Array, "... W"]) -> Float[Array, "... 1"]:
    """Sums over the last axis."""
    return jnp.sum(x, axis=-1, keepdims=True)


def row_products(x: Float[Array, "... W"]) -> Float[Array, "... 1"]:
    """Sums over the last axis as a matrix product: XLA:CPU does not vectorise a sum fused with its producer."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")


def plain_column_sums(x: Float[Array, "... W"]) -> Float[Array, "W"]:
    """Sums over all axes but the last."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


def column_products(x: Float[Array, "... W"]) -> Float[Array, "W"]:
    """Sums over all axes but the last as a matrix product; see `row_products`."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(jnp.ones((1, len(rows)), x.dtype), rows, precision="highest")[0]


row_sums = by_platform(cpu=row_products, default=plain_row_sums)
column_sums = by_platform(cpu=column_products, default=plain_column_sums)


def matmul(x: Float[Array, "... C d"], y: Float[Array, "... d T"]) -> Float[Array, "... C T"]:
    """x @ y, accumulated and returned in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
