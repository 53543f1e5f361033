"""Patch pooling against textbook cross-attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops import platform
from pathflip_jax.ops.patch_pooling import pool_patches, pool_patches_reference

D, HEADS = 24, 4


@pytest.mark.parametrize(("rate", "shared"), [(0.0, False), (0.3, False), (0.0, True)])
@pytest.mark.parametrize("target_platform", ["cpu", "tpu"])
def test_pooling_has_the_values_and_gradients_of_attention_as_written(rate, shared, target_platform, monkeypatch):
    monkeypatch.setattr(platform, "target_platform", lambda: target_platform)
    rng = np.random.default_rng(3)
    B, R, S, Q, d = 2, 3, 5, 2, 6
    sets = (1, 1) if shared else (B, 1 + R)  # until the first cross-attention all query sets are equal
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
        for pool in (pool_patches, pool_patches_reference)
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
