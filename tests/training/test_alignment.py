"""The start of an alignment run: its initial parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.parameters import flatten, make_model, unflatten
from pathflip_jax.training.alignment import standardise

SIZES = {"feature_dim": 6, "vocab_size": 40, "embed_dim": 16, "hidden": 16, "layers": 1, "heads": 2, "intermediate": 32}
CONFIGS = {
    "linear": PathFLIPConfig(**SIZES, num_queries=2, region_layers=1, region_heads=2, text_region_heads=2),
    "mlp": PathFLIPConfig(
        **SIZES, num_queries=2, region_layers=1, region_heads=2, text_region_heads=2, patch_projection="mlp"
    ),
    "pathflip2": PathFLIP2Config(**SIZES, tokens=4, token_heads=2, text_region_heads=2, top_k=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_standardising_start_projects_features_as_a_standardised_cohort(config):
    rng = np.random.default_rng(0)
    scale = np.array([1e-3, 0.1, 1, 10, 1e3, 0]).astype(np.float32)
    features = rng.normal(3, 1, (500, 6)).astype(np.float32) * scale + np.array([0, 0, 0, 0, 0, 7], np.float32)
    before = flatten(make_model(config, nnx.Rngs(0)))
    after = standardise(before, features)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"patch_projection/linear/kernel", "patch_projection/linear/bias"}
    assert all(after[name].sharding == before[name].sharding for name in changed)
    spread = np.where(features.std(0) > 0, features.std(0), 1)
    first, second = (unflatten(config, params).patch_projection.linear for params in (before, after))
    expected = np.asarray(first(jax.numpy.asarray((features - features.mean(0)) / spread)), np.float32)
    np.testing.assert_allclose(np.asarray(second(jax.numpy.asarray(features)), np.float32), expected, atol=2e-2)
