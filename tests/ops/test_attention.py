"""Attention against the textbook form, and the effect of masks."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops import platform
from pathflip_jax.ops.attention import attend, pool, pool_reference, softmax_where


def test_a_masked_row_weighs_nothing_and_has_a_finite_gradient():
    scores = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    mask = jnp.asarray([[True, True, False], [False, False, False], [True, True, True]])
    weights = softmax_where(scores, mask)
    np.testing.assert_allclose(weights[0], [1 / (1 + math.e), math.e / (1 + math.e), 0], rtol=1e-6)
    np.testing.assert_array_equal(weights[1], 0)
    np.testing.assert_allclose(weights[2], 1 / 3, rtol=1e-6)
    gradient = jax.grad(lambda s: (softmax_where(s, mask) ** 2).sum())(scores)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[1] == 0) and gradient[0, 2] == 0


def test_attend_in_bfloat16_keeps_its_softmax_in_float32():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 16)), jnp.bfloat16)
    pooled, weights = attend(x, x, x, None, 2)
    assert pooled.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target_platform", ["cpu", "tpu"])
def test_pooling_has_the_values_and_gradients_of_attention_as_written(rate, masked, target_platform, monkeypatch):
    monkeypatch.setattr(platform, "target_platform", lambda: target_platform)
    rng = np.random.default_rng(6)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), jnp.float32) for n in (5, 7, 7))
    mask = None
    if masked:
        mask = rng.random((2, 1, 5, 7)) < 0.6
        mask[0, 0, 1] = False  # a fully masked row
        mask = jnp.asarray(mask)
    weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 5, 8), (2, 3, 5, 1))]
    dropout_key = jax.random.key(9)

    def loss(function, *arguments):
        found = function(*arguments, mask, rate, dropout_key)
        return sum((x * w).sum() for x, w in zip(found, weights, strict=True)), found

    run = lambda f: jax.jit(jax.value_and_grad(partial(loss, f), (0, 1, 2), has_aux=True))(query, key, value)  # noqa: E731
    ((_, found), gradients), ((_, expected), wanted) = run(pool), run(pool_reference)
    for x, y in zip((*found, *gradients), (*expected, *wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, float(np.abs(y).max())))
    if masked:
        assert not np.asarray(found[0])[0, :, 1].any() and not np.asarray(gradients[0])[0, :, 1].any()


def test_pooling_in_bfloat16_keeps_its_dtypes():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 16)), jnp.bfloat16)
    loss = lambda x: sum(part.astype(jnp.float32).sum() for part in pool(x, x, x, None))  # noqa: E731
    assert [part.dtype for part in pool(x, x, x, None)] == [jnp.bfloat16] * 2
    assert jax.grad(loss)(x).dtype == jnp.bfloat16
