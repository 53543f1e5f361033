"""Rematerialisation leaves the gradient unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pathflip_jax.model.layers import Linear
from pathflip_jax.ops.recompute import recompute


def test_what_is_recomputed_has_the_same_gradient():
    linear = Linear(6, 4, "fan_in", nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(7).normal(size=(3, 6)), jnp.float32)
    function = lambda x, linear: linear(jnp.sin(x))  # noqa: E731
    plain = jax.grad(lambda x, m: (function(x, m) ** 2).sum(), (0, 1))(x, linear)
    again = jax.grad(lambda x, m: (recompute(function, x, m) ** 2).sum(), (0, 1))(x, linear)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
