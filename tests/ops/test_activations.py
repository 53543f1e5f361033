"""Activation functions against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops.activations import gelu, quick_gelu


def test_gelu_is_pytorchs():
    torch = pytest.importorskip("torch")
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    tensor = torch.from_numpy(x).requires_grad_()
    expected = torch.nn.functional.gelu(tensor)
    expected.sum().backward()
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected.detach(), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(jnp.asarray(x)), tensor.grad, atol=1e-6)


def test_approximations_are_told_apart():
    x = np.linspace(-4, 4, 1001, dtype=np.float32)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    for other in (quick_gelu, jax.nn.gelu):  # by a sigmoid, by tanh
        assert np.abs(other(jnp.asarray(x)) - gelu(jnp.asarray(x))).max() > 1e-4
