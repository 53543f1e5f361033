"""Contractions and their gradients against einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops.matmul import contract


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


@pytest.mark.parametrize(("platform", "axes"), [("cpu", "[0] x [0]"), ("tpu", "[0, 1] x [0, 1]")])
def test_only_a_cpu_joins_the_axes_that_a_kernels_gradient_sums_over(platform, axes):
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    gradient = jax.jit(jax.grad(lambda kernel: contract("abi,io->abo", x, kernel).sum()))
    program = gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
    assert f"contracting_dims = {axes}" in program
