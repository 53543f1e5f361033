"""Cross-attention with absorbed projections against the plain one, and its gradient by hand against JAX's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.cross_attention import CrossAttention, pool_patches
from pathflip_jax.model.layers import dropout, softmax_where

D, HEADS = 24, 4


def plain_cross_attention(module: CrossAttention, x, patches, mask):
    """Keys and values of every patch projected, as BERT writes it; a bag without patches pools zero."""
    heads = module.heads

    def split(y):
        return y.reshape(*y.shape[:-1], heads, -1)

    query, key, value = split(module.query(x)), split(module.key(patches)), split(module.value(patches))
    scores = jnp.einsum("bqhd,bnhd->bhqn", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30)) * mask.any(-1)[:, None, None, None]
    pooled = jnp.einsum("bhqn,bnhd->bqhd", weights, value).reshape(x.shape)
    return module.norm(x + module.output(pooled)), weights


def test_absorbed_cross_attention_equals_the_plain_one():
    config = PathFLIPConfig(embed_dim=D, hidden=32, heads=HEADS)
    module = CrossAttention(config, nnx.Rngs(0))
    module = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), module)
    rng = np.random.default_rng(2)
    B, R, S, Q = 2, 3, 5, 4
    x = jnp.asarray(rng.normal(size=(B, 1 + R, Q, 32)), jnp.float32)
    patches = jnp.asarray(rng.normal(size=(B, R, S, D)), jnp.float32)
    mask = rng.random((B, R, S)) < 0.6
    mask[0, 1] = False
    mask[0, 0, 0] = mask[1, :, 2] = True
    target = jnp.asarray(rng.normal(size=(B, 1 + R, Q, 32)), jnp.float32)

    def absorbed(module, x, patches):
        y, slide, regions = module(x, patches, mask, None)
        return (y * target).sum(), (y, slide, regions)

    def plain(module, x, patches):
        slide = plain_cross_attention(module, x[:, 0], patches.reshape(B, R * S, D), mask.reshape(B, R * S))
        bags = x[:, 1:].reshape(B * R, Q, 32), patches.reshape(B * R, S, D), mask.reshape(B * R, S)
        regions = plain_cross_attention(module, *bags)
        y = jnp.concatenate([slide[0][:, None], regions[0].reshape(B, R, Q, 32)], axis=1)
        return (y * target).sum(), (y, slide[1], regions[1].reshape(B, R, HEADS, Q, S))

    results = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(module, x, patches) for f in (absorbed, plain)
    ]
    (ours, ours_gradient), (theirs, theirs_gradient) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), ours_gradient, theirs_gradient)
    assert np.all(np.asarray(ours_gradient[0].key.bias[...]) == 0)  # it cancels in the softmax


def plain_pool(query, key_kernel, patches, mask, rate, key):
    """The same pooling as it would be written without a thought for memory, differentiated by JAX."""
    B, R, S, _ = patches.shape
    query = jnp.broadcast_to(query, (B, 1 + R, *query.shape[2:]))
    rows = jnp.einsum("...qhd,Dhd->...hqD", query, key_kernel).reshape(B, 1 + R, -1, D)
    slide, regions = jnp.einsum("bcD,brsD->bcrs", rows[:, 0], patches), rows[:, 1:]
    regions = softmax_where(regions @ patches.mT, mask[:, :, None])
    slide = softmax_where(slide.reshape(B, -1, R * S), mask.reshape(B, 1, R * S)).reshape(slide.shape)
    weights = jnp.concatenate([slide.swapaxes(1, 2), regions], axis=2)  # what falls is drawn over [B, R, 2C, S]
    kept = dropout(weights, rate, key)
    C = regions.shape[2]
    both = (kept @ patches, kept.sum(-1, keepdims=True))
    return tuple(jnp.concatenate([x[:, :, :C].sum(1, keepdims=True), x[:, :, C:]], axis=1) for x in both)


@pytest.mark.parametrize(("rate", "shared"), [(0.0, False), (0.3, False), (0.0, True)])
def test_pooling_has_the_values_and_gradients_of_attention_as_written(rate, shared):
    rng = np.random.default_rng(3)
    B, R, S, Q, d = 2, 3, 5, 2, 6
    sets = (1, 1) if shared else (B, 1 + R)  # before the first patches are read all queries are one set
    query = jnp.asarray(rng.normal(size=(*sets, Q, HEADS, d)), jnp.float32)
    key_kernel = jnp.asarray(rng.normal(size=(D, HEADS, d)), jnp.float32)
    patches = jnp.asarray(rng.normal(size=(B, R, S, D)), jnp.float32)
    mask = rng.random((B, R, S)) < 0.6
    mask[0, 1], mask[0, 0, 0], mask[1, 1] = False, True, True
    targets = [jnp.asarray(rng.normal(size=(B, 1 + R, HEADS * Q, n)), jnp.float32) for n in (D, 1)]
    key = jax.random.key(1)

    def loss(pool, *arguments):
        found = pool(*arguments, mask, rate, key)
        return sum((x * target).sum() for x, target in zip(found, targets, strict=True)), found

    ours, plain = (
        jax.jit(jax.value_and_grad(lambda *x, pool=pool: loss(pool, *x), (0, 1, 2), has_aux=True))(
            query, key_kernel, patches
        )
        for pool in (pool_patches, plain_pool)
    )
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, float(np.abs(y).max())))
    pooled = np.asarray(ours[0][1][0])
    assert not pooled[0, 2].any()  # the region without a patch
    assert pooled[0, 0].any()


def test_pooling_in_bfloat16_keeps_its_dtypes():
    rng = np.random.default_rng(4)
    query, key_kernel, patches = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((1, 3, 2, HEADS, 6), (D, HEADS, 6), (1, 2, 5, D))
    )
    mask = np.ones((1, 2, 5), bool)
    loss = lambda *x: sum(part.astype(jnp.float32).sum() for part in pool_patches(*x, mask))  # noqa: E731
    assert [x.dtype for x in pool_patches(query, key_kernel, patches, mask)] == [jnp.bfloat16] * 2
    assert [x.dtype for x in jax.grad(loss, (0, 1, 2))(query, key_kernel, patches)] == [jnp.bfloat16] * 3
