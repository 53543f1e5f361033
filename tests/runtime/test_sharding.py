"""Placement by rules, and the point of it: loss and gradients on 8 devices are those on 1."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from pathflip_jax.losses.pathflip import Embeddings, LossConfig, draw_negatives, region_loss, unsharded
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import TextRegionAttention
from pathflip_jax.runtime import sharding

EIGHT_DEVICES = Path(__file__).with_name("eight_devices.py")


@pytest.mark.parametrize(
    "accumulate, loss, meshes",
    [
        (1, "released", ["4x2x1", "2x1x4"]),
        pytest.param(1, "per_slide", ["8x1x1", "2x4x1", "1x8x1", "2x2x2"], marks=pytest.mark.slow),
        pytest.param(2, "per_slide", ["4x2x1", "4x1x2"], marks=pytest.mark.slow),
        pytest.param(1, "pairs", ["4x2x1", "2x1x4"], marks=pytest.mark.slow),
        pytest.param(2, "flair", ["8x1x1", "2x2x2"], marks=pytest.mark.slow),
    ],
)
def test_loss_gradients_and_checkpoints_are_the_same_on_eight_devices(tmp_path, accumulate, loss, meshes):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(EIGHT_DEVICES), str(tmp_path), str(accumulate), loss, *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout.endswith("equal\n"), done.stdout + done.stderr


@pytest.mark.parametrize("negatives_at_once", [None, 3])
def test_a_loss_in_bfloat16_is_the_same_spread_over_slides(negatives_at_once):
    B, R, K, D = 8, 3, 2, 16
    config = PathFLIPConfig(embed_dim=D, text_region_heads=2, compute_dtype="bfloat16")
    attention = TextRegionAttention(config, "fan_in", nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 5))
    shapes = (B, D), (B, R, D), (B, D), (B, K, D)
    slide, regions, captions, subcaptions = (jax.random.normal(next(keys), shape) for shape in shapes)
    embeddings = Embeddings(slide, regions, jnp.ones((B, R), bool), captions, subcaptions)
    rest = draw_negatives(next(keys), B, K), jnp.arange(B), jnp.float32(2.0), None
    mesh = sharding.make_mesh()

    def gradient(shard_map):
        def loss(attention, embeddings):
            return region_loss(
                embeddings, attention, *rest, LossConfig(negatives_at_once=negatives_at_once), shard_map
            )[0]

        return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(attention, embeddings)

    expected, found = gradient(unsharded), gradient(sharding.shard_by_slide(mesh))
    for a, b in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(expected[1].subcaptions, found[1].subcaptions, rtol=1e-5, atol=1e-7)


def test_rules_place_by_name_and_spare_what_does_not_divide():
    mesh = jax.sharding.AbstractMesh((2, 4, 1), sharding.AXES)
    shapes = {
        "a/kernel": jnp.zeros((8, 3)),
        "a/bias": jnp.zeros(8),
        "odd/kernel": jnp.zeros((6, 8)),
        "logit_scale": jnp.zeros(()),
    }
    places = sharding.infer_shardings(mesh, {"mu": shapes, "count": jnp.zeros(())})
    found = {name: place.spec for name, place in places["mu"].items()}
    expected = {"a/kernel": P("fsdp", None), "a/bias": P(), "odd/kernel": P(None, None), "logit_scale": P()}
    assert found == expected and places["count"].spec == P()


def test_the_parts_of_a_batch_lie_end_to_end():
    assert sharding.ONE_PROCESS.rows(4).tolist() == [0, 1, 2, 3]
    assert sharding.Shards(3, (0, 2)).rows(6).tolist() == [0, 1, 4, 5]
    assert sharding.shards_of(sharding.make_mesh()).count == jax.device_count()


def test_mesh_that_does_not_fit_the_devices_is_refused():
    assert dict(sharding.make_mesh().shape) == {"data": jax.device_count(), "fsdp": 1, "region": 1}
    with pytest.raises(ValueError, match=r"mesh.fsdp=3, mesh.region=1: their product must be .* devices, \d+;"):
        sharding.make_mesh(-1, 3)
    with pytest.raises(ValueError, match="mesh.data=0"):
        sharding.make_mesh(0, 1)
