"""Cross-attention with absorbed projections, and its hand-written gradient, against the plain form and JAX's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.cross_attention import CrossAttention

D, HEADS = 24, 4


def plain_cross_attention(module: CrossAttention, x, patches, mask):
    """Plain BERT cross-attention with keys and values projected per patch; a bag without patches pools to zero."""
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
