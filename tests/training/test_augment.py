"""Augmentation of patch features: valid patches alone, the same features in all patches of a slide, unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.training.augment import NO_AUGMENTATION, Augmentation

PATCHES = jnp.asarray(np.random.default_rng(0).normal(1.0, 2.0, (3, 4, 50, 16)), jnp.float16)
MASK = jnp.ones((3, 4, 50), bool).at[0, 1:].set(False)


def test_without_a_key_nothing_changes():
    for augment in (Augmentation(0.5, 0.5), NO_AUGMENTATION):
        assert augment(PATCHES, MASK, None) is PATCHES
    assert NO_AUGMENTATION(PATCHES, MASK, jax.random.key(0)) is PATCHES


def test_dropped_features_are_those_of_a_slide_and_the_mean_stays():
    found = np.mean([Augmentation(dropout=0.25)(PATCHES, MASK, jax.random.key(i)) for i in range(400)], axis=0)
    np.testing.assert_allclose(found, PATCHES.astype(jnp.float32), atol=2.0)
    one = np.asarray(Augmentation(dropout=0.25)(PATCHES, MASK, jax.random.key(1)))
    dropped = (one == 0).all(axis=(1, 2))  # [slide, feature]
    assert ((one == 0).any(axis=(1, 2)) == dropped).all() and 0 < dropped.mean() < 0.6
    assert not (dropped[0] == dropped[1]).all()


def test_noise_shifts_a_slide_by_standard_deviations_of_each_feature_among_valid_patches():
    scale = jnp.asarray([0.1] * 8 + [10.0] * 8)
    patches = jnp.where(MASK[..., None], PATCHES * scale, 1e4)  # padding must not count
    valid = np.asarray(MASK)
    spread = np.asarray(patches)[valid].std(axis=0)
    shifts = []
    for seed in range(200):
        noise = np.asarray(Augmentation(noise=0.5)(patches, MASK, jax.random.key(seed)) - patches)
        for slide, own in zip(noise, valid, strict=True):
            np.testing.assert_allclose(slide[own], np.broadcast_to(slide[own][0], slide[own].shape), atol=1e-2)
            shifts.append(slide[own][0] / spread)
    shifts = np.array(shifts)
    assert shifts.std(axis=0) == pytest.approx(0.5, rel=0.2) and abs(shifts.mean(axis=0)).max() < 0.15
