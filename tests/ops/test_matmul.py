"""Contractions and their gradients against einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops.matmul import add_bias, contract


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("i,io->o", [(4,), (4, 5)]),
        ("ni,io->no", [(3, 4), (4, 5)]),
        ("abi,io->abo", [(2, 3, 4), (4, 5)]),
        ("btw,vw->btv", [(2, 3, 4), (5, 4)]),
        ("bghqD,Dhd->bgqhd", [(2, 3, 2, 4, 6), (6, 2, 5)]),
        ("bghq,hd->bgqhd", [(2, 3, 2, 4), (2, 5)]),
    ],
)
def test_gradients_of_a_contraction_are_those_of_einsum(spec, shapes):
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def loss(product):
        return lambda x, kernel: jnp.sum(jnp.sin(product(spec, x, kernel)))

    found = jax.grad(loss(contract), (0, 1))(x, kernel)
    for ours, theirs in zip(found, jax.grad(loss(jnp.einsum), (0, 1))(x, kernel), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    x, bias = jax.random.normal(jax.random.key(0), (3, 400, 5), jnp.bfloat16), jnp.ones(5)
    towards = jax.random.normal(jax.random.key(1), x.shape, jnp.bfloat16)
    found, backward = jax.vjp(add_bias, x, bias)
    np.testing.assert_array_equal(found, x + bias.astype(x.dtype)[None, None])
    towards_x, towards_bias = backward(towards)
    np.testing.assert_array_equal(towards_x, towards)
    np.testing.assert_allclose(towards_bias, np.asarray(towards, np.float64).sum((0, 1)), rtol=1e-5, atol=1e-4)
