"""Registered encoders on the local devices: batches, shards, memory, and the facts that records remember."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data

from data_prep.vision_encoders import VisionEncoder


@pytest.fixture
def patches():
    image = data.immunohistochemistry()
    return np.stack([image[i * 40 : i * 40 + 48, i * 30 : i * 30 + 48] for i in range(7)])


@pytest.fixture
def encoder(small_encoder):
    recipe, weights = small_encoder
    return VisionEncoder(recipe, weights, batch_size=3)


def test_features_do_not_depend_on_the_batch(encoder, patches):
    rows = encoder(patches)
    assert rows.shape == (7, encoder.dim) and rows.dtype == np.float32 and np.abs(rows).max() > 0.1
    np.testing.assert_array_equal(rows, encoder(patches))
    np.testing.assert_allclose(rows[::-1], encoder(patches[::-1]), atol=1e-5)
    np.testing.assert_allclose(rows, np.concatenate([encoder(patches[i : i + 1]) for i in range(7)]), atol=1e-5)
    assert encoder(patches[:0]).shape == (0, encoder.dim)


def test_a_batch_is_dispatched_and_sharded_over_all_devices(encoder, small_encoder, patches):
    batch = np.concatenate([patches, patches])[: 2 * jax.device_count()]
    whole = VisionEncoder(*small_encoder, batch_size=len(batch))
    assert encoder.batch_size % jax.local_device_count() == 0
    found = whole.dispatch(batch)
    assert isinstance(found, jax.Array) and len(found.sharding.device_set) == jax.local_device_count()
    np.testing.assert_allclose(np.asarray(found), encoder(batch), atol=1e-5)


def test_half_precision_is_bfloat16_with_float32_features(small_encoder, patches):
    full, half = (VisionEncoder(*small_encoder, half=half, batch_size=7) for half in (False, True))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(half._state)}
    assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    one, other = full(patches), half(patches)
    assert other.dtype == np.float32 and not np.array_equal(one, other)
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosines.min() > 0.999


def test_halving_ends_at_one_patch_for_each_device(encoder, patches):
    rows, count = encoder(patches), jax.local_device_count()
    encoder.batch_size = 4 * count
    assert encoder.halve() and encoder.batch_size == 2 * count
    assert encoder.halve() and encoder.batch_size == count and not encoder.halve()
    np.testing.assert_allclose(encoder(patches), rows, atol=1e-5)


def test_facts_tell_weights_transform_and_precision(encoder, small_encoder):
    recipe, weights = small_encoder
    facts = encoder.recipe_facts()
    assert facts["encoder"] == recipe.name and len(facts["weights"]) == 64 and facts["precision"] == "float32"
    assert facts["transform"]["resize"] == recipe.transform.resize and facts["pooling"] == "class"
    assert VisionEncoder(recipe, weights, half=True).recipe_facts() == facts | {"precision": "bfloat16"}
