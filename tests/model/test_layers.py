"""The layers against PyTorch's, and what masks and dropout do."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import (
    INITS,
    LayerNorm,
    Linear,
    MultiheadAttention,
    attend,
    contract,
    dropout,
    gelu,
    pool,
    recompute,
    softmax_where,
    split_key,
)
from pathflip_jax.model.pathflip import RegionLayer

D, HEADS = 24, 4


def randomised(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The module with every parameter drawn anew, so that none stays at zero or one."""
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


@pytest.mark.parametrize("shape", [(400, 501), (3, 200_001), (20, 10, 1001)])
def test_dropout_keeps_the_mean_and_the_rate(shape):
    x = jnp.ones(shape)
    y = np.asarray(dropout(x, 0.1, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - round(0.1 * 2**32) / 2**32))}
    assert abs((y == 0).mean() - 0.1) < 5 * math.sqrt(0.09 / y.size)
    assert abs(y.mean() - 1) < 0.005
    # Neighbours in a row, in a column, and the same place under the next key fall independently.
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


def plain_pool(query, key, value, mask, rate, dropout_key):
    """Attention as it is written in books, differentiated by JAX."""
    weights = softmax_where(query @ key.mT, mask)
    kept = dropout(weights, rate, dropout_key)
    return kept @ value, kept.sum(-1, keepdims=True)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_pooling_has_the_values_and_gradients_of_attention_as_written(rate, masked):
    rng = np.random.default_rng(6)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), jnp.float32) for n in (5, 7, 7))
    mask = None
    if masked:
        mask = rng.random((2, 1, 5, 7)) < 0.6
        mask[0, 0, 1] = False  # a row that sees nothing
        mask = jnp.asarray(mask)
    weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 5, 8), (2, 3, 5, 1))]
    dropout_key = jax.random.key(9)

    def loss(function, *arguments):
        found = function(*arguments, mask, rate, dropout_key)
        return sum((x * w).sum() for x, w in zip(found, weights, strict=True)), found

    run = lambda f: jax.jit(jax.value_and_grad(partial(loss, f), (0, 1, 2), has_aux=True))(query, key, value)  # noqa: E731
    ((_, found), gradients), ((_, expected), wanted) = run(pool), run(plain_pool)
    for x, y in zip((*found, *gradients), (*expected, *wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, float(np.abs(y).max())))
    if masked:
        assert not np.asarray(found[0])[0, :, 1].any() and not np.asarray(gradients[0])[0, :, 1].any()


def test_pooling_in_bfloat16_keeps_its_dtypes():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 16)), jnp.bfloat16)
    loss = lambda x: sum(part.astype(jnp.float32).sum() for part in pool(x, x, x, None))  # noqa: E731
    assert [part.dtype for part in pool(x, x, x, None)] == [jnp.bfloat16] * 2
    assert jax.grad(loss)(x).dtype == jnp.bfloat16


def test_gelu_is_pytorchs():
    torch = pytest.importorskip("torch")
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    tensor = torch.from_numpy(x).requires_grad_()
    expected = torch.nn.functional.gelu(tensor)
    expected.sum().backward()
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected.detach(), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(jnp.asarray(x)), tensor.grad, atol=1e-6)


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


def test_what_is_recomputed_has_the_same_gradient():
    linear = Linear(6, 4, "fan_in", nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(7).normal(size=(3, 6)), jnp.float32)
    function = lambda x, linear: linear(jnp.sin(x))  # noqa: E731
    plain = jax.grad(lambda x, m: (function(x, m) ** 2).sum(), (0, 1))(x, linear)
    again = jax.grad(lambda x, m: (recompute(function, x, m) ** 2).sum(), (0, 1))(x, linear)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


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
