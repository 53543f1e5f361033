"""Normalisation and its hand-written gradients against the textbook form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops import platform
from pathflip_jax.ops.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ours", "plain"), [(layer_norm, layer_norm_reference), (rms_norm, rms_norm_reference)])
@pytest.mark.parametrize("target_platform", ["cpu", "tpu"])
def test_values_and_gradients_are_those_of_the_reference(ours, plain, dtype, target_platform, monkeypatch):
    monkeypatch.setattr(platform, "target_platform", lambda: target_platform)
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.normal(size=(2, 5, 24)), dtype)
    learnt = [jnp.asarray(rng.normal(size=24), jnp.float32) for _ in range(2 if ours is layer_norm else 1)]
    towards = jnp.asarray(rng.normal(size=x.shape), dtype)

    def run(function):
        found, backward = jax.vjp(lambda x, *learnt: function(x, *learnt, 1e-6), x, *learnt)
        return found, *backward(towards)

    for one, other in zip(run(ours), run(plain), strict=True):
        assert one.dtype == other.dtype
        bound = 2e-6 if dtype == "float32" else 2e-2
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=bound * max(1, np.abs(other).max()))
