"""Layers against those of PyTorch, and the effect of masks and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import INITS, LayerNorm, Linear, MultiheadAttention
from pathflip_jax.model.pathflip import RegionLayer

D, HEADS = 24, 4


def randomised(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The module with all parameters random, so that none is zero or one."""
    leaves, tree = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def torch_multihead(torch, ours: MultiheadAttention):
    """torch.nn.MultiheadAttention with our weights."""
    theirs = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.from_numpy(np.concatenate([np.array(p.kernel[...]).T for p in parts])))
        theirs.in_proj_bias.copy_(torch.from_numpy(np.concatenate([np.array(p.bias[...]) for p in parts])))
        copy_linear(torch, theirs.out_proj, ours.output)
    return theirs.eval()


def copy_linear(torch, theirs, ours: Linear) -> None:
    theirs.weight.copy_(torch.from_numpy(np.array(ours.kernel[...]).T))
    theirs.bias.copy_(torch.from_numpy(np.array(ours.bias[...])))


def copy_norm(torch, theirs, ours: LayerNorm) -> None:
    theirs.weight.copy_(torch.from_numpy(np.array(ours.scale[...])))
    theirs.bias.copy_(torch.from_numpy(np.array(ours.bias[...])))


def test_multihead_attention_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    ours = randomised(MultiheadAttention(D, HEADS, "torch", nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(3, n, D)).astype(np.float32) for n in (5, 7, 7))
    mask = rng.random((3, 7)) < 0.6
    mask[:, 0] = True
    pooled, weights = ours(query, key, value, mask)
    theirs = torch_multihead(torch, ours)(
        *map(torch.from_numpy, (query, key, value)),
        key_padding_mask=torch.from_numpy(~mask),
        average_attn_weights=False,
    )
    np.testing.assert_allclose(pooled, theirs[0].detach(), atol=2e-6)
    np.testing.assert_allclose(weights, theirs[1].detach(), atol=1e-6)


def test_region_layer_is_the_encoder_layer_of_pytorch():
    torch = pytest.importorskip("torch")
    config = PathFLIPConfig(embed_dim=D, region_heads=HEADS, text_region_heads=HEADS)
    ours = randomised(RegionLayer(config, "torch", nnx.Rngs(0)))
    theirs = torch.nn.TransformerEncoderLayer(D, HEADS, dim_feedforward=4 * D, batch_first=True).eval()
    theirs.self_attn = torch_multihead(torch, ours.attention)
    with torch.no_grad():
        copy_linear(torch, theirs.linear1, ours.intermediate)
        copy_linear(torch, theirs.linear2, ours.output)
        copy_norm(torch, theirs.norm1, ours.attention_norm)
        copy_norm(torch, theirs.norm2, ours.norm)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 6, D)).astype(np.float32)
    mask = np.arange(6) < np.array([[6], [4], [1]])
    expected = theirs(torch.from_numpy(x), src_key_padding_mask=torch.from_numpy(~mask)).detach().numpy()
    np.testing.assert_allclose(np.asarray(ours(x, mask, None))[mask], expected[mask], atol=3e-6)


def test_layer_norm_is_float32_for_any_activation():
    torch = pytest.importorskip("torch")
    norm = randomised(LayerNorm(64, 1e-12))
    x = (100 + np.random.default_rng(3).normal(size=(5, 64))).astype(np.float32)  # a large mean cancels
    weights = (torch.from_numpy(np.array(p[...])) for p in (norm.scale, norm.bias))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (64,), *weights, eps=1e-12)
    np.testing.assert_allclose(norm(x), expected, atol=2e-5)
    half = jnp.asarray(x, jnp.bfloat16)
    assert norm(half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(half), norm(half.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("init", "variance"),
    [("bert", 0.02**2), ("fan_in", 1 / 256), ("torch", 1 / (3 * 256)), ("torch_fused", 2 / (256 + 3 * 256))],
)
def test_kernels_start_with_the_documented_variance(init, variance):
    # torch_fused is one third of a [3 * 256, 256] matrix drawn by Xavier: variance 2 / (fan_in + fan_out).
    kernel = INITS[init](jax.random.key(0), (256, 256), jnp.float32)
    assert np.var(kernel) == pytest.approx(variance, rel=0.05)


def test_linear_starts_as_in_pytorch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    ours, theirs = Linear(256, 400, "torch", nnx.Rngs(0)), torch.nn.Linear(256, 400)
    for a, b in ((ours.kernel, theirs.weight), (ours.bias, theirs.bias)):
        assert float(a[...].std()) == pytest.approx(float(b.detach().std()), rel=0.1)
        assert float(abs(a[...]).max()) == pytest.approx(float(b.detach().abs().max()), rel=0.02)


def test_the_gradient_of_layer_normalisation_is_pytorchs():
    torch = pytest.importorskip("torch")
    norm, rng = randomised(LayerNorm(64, 1e-12)), np.random.default_rng(3)
    x, weights = rng.normal(size=(2, 5, 64)).astype(np.float32), rng.normal(size=(2, 5, 64)).astype(np.float32)
    ours = jax.grad(lambda norm, x: (norm(x) * weights).sum(), (0, 1))(norm, jnp.asarray(x))
    tensors = [torch.from_numpy(np.array(p)).requires_grad_() for p in (x, norm.scale[...], norm.bias[...])]
    expected = torch.nn.functional.layer_norm(tensors[0], (64,), *tensors[1:], eps=1e-12)
    (expected * torch.from_numpy(weights)).sum().backward()
    for found, tensor in zip((ours[1], ours[0].scale[...], ours[0].bias[...]), tensors, strict=True):
        np.testing.assert_allclose(found, tensor.grad, atol=2e-5)


@pytest.mark.parametrize("shape", [(7, D), (2, 40, D), (2, 3, 50, D)])
def test_gradients_of_a_bfloat16_layer_are_summed_in_float32(shape):
    linear = randomised(Linear(D, 5, "bert", nnx.Rngs(0)))
    x, weights = (
        jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate((shape, (*shape[:-1], 5)))
    )
    y, backward = jax.vjp(lambda x, linear: linear(x), x, linear)
    towards_x, found = backward(weights)
    assert y.dtype == towards_x.dtype == jnp.bfloat16
    rows, outer = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, weights))
    np.testing.assert_allclose(found.kernel[...], rows.T @ outer, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.bias[...], outer.sum(0), rtol=1e-5, atol=1e-5)
    kernel = np.asarray(linear.kernel[...].astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(
        np.asarray(towards_x, np.float64), weights.astype(float) @ kernel.T, rtol=1e-2, atol=1e-2
    )
