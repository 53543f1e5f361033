"""Dropout: its mean, its rate, its spread and its gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops.dropout import dropout, dropout_reference, split_key


@pytest.mark.parametrize("shape", [(400, 501), (3, 200_001), (20, 10, 1001)])
def test_dropout_keeps_the_mean_and_the_rate(shape):
    x = jnp.ones(shape)
    y = np.asarray(dropout(x, 0.1, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - round(0.1 * 2**32) / 2**32))}
    assert abs((y == 0).mean() - 0.1) < 5 * math.sqrt(0.09 / y.size)
    assert abs(y.mean() - 1) < 0.005
    # Neighbours in a row, in a column, and the same entry under the next key are dropped independently.
    zero, other = y == 0, np.asarray(dropout(x, 0.1, jax.random.key(1))) == 0
    pairs = [(zero[..., :-1], zero[..., 1:]), (zero[:-1], zero[1:]), (zero, other)]
    assert all(abs((one & two).mean() - 0.01) < 5 * math.sqrt(0.01 / one.size) for one, two in pairs)


def test_what_falls_is_spread_evenly_whatever_the_key():
    keys = jax.random.split(jax.random.key(5), 2000)
    fallen = np.asarray(jax.jit(jax.vmap(lambda key: dropout(jnp.ones((5, 8)), 0.3, key)))(keys)) == 0
    by_place = fallen.mean(0)
    assert np.abs(by_place - 0.3).max() < 5 * math.sqrt(0.21 / len(keys))
    joint = np.corrcoef(fallen.reshape(len(keys), -1).T) - np.eye(40)
    assert np.abs(joint).max() < 5 / math.sqrt(len(keys))


def test_the_gradient_of_dropout_falls_where_its_value_fell():
    x, key = jnp.arange(1.0, 1001.0), jax.random.key(3)
    gradient = jax.grad(lambda x: (dropout(x, 0.5, key) * x).sum())(x)
    np.testing.assert_allclose(gradient, 2 * np.asarray(dropout(x, 0.5, key)), rtol=1e-6)


def test_dropout_without_a_key_or_a_rate_is_the_identity():
    x = jnp.arange(4.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert split_key(None, 3) == [None] * 3


def test_what_is_kept_and_its_gradient_are_those_of_the_reference():
    """Different entries are dropped, but as many; where neither drops, values and gradients are equal."""
    x, key = jax.random.normal(jax.random.key(1), (300, 200)), jax.random.key(2)
    runs = [jax.vjp(lambda x, drop=drop: drop(x, 0.3, key), x) for drop in (dropout, dropout_reference)]
    (ours, plain), (towards, expected) = zip(*((found, back(x)[0]) for found, back in runs), strict=True)
    both = (ours != 0) & (plain != 0)
    np.testing.assert_allclose(ours[both], plain[both], rtol=1e-6)
    np.testing.assert_allclose(towards[both], expected[both], rtol=1e-6)
    assert abs(float((ours == 0).mean() - (plain == 0).mean())) < 5 * math.sqrt(2 * 0.21 / x.size)
    assert abs(float(both.mean()) - 0.49) < 5 * math.sqrt(0.25 / x.size)  # the two masks are independent
