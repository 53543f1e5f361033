"""Placement by rules, and the point of it: loss and gradients on 8 devices are those on 1."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pathflip_jax import sharding

EIGHT_DEVICES = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from pathflip_jax import checkpoint, sharding
from pathflip_jax.data.pipeline import Batch
from pathflip_jax.losses import LossConfig, draw_negatives
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP, flatten, unflatten
from pathflip_jax.stage import alignment, loss_and_gradients

assert jax.device_count() == 8
B, R, S, F, K, G, L = 16, 3, 4, 16, 2, 16, 12
config = PathFLIPConfig(feature_dim=F, embed_dim=16, hidden=16, layers=2, heads=2, intermediate=32, num_queries=2,
                        vocab_size=32, max_positions=16, region_layers=1, region_heads=2, text_region_heads=2,
                        init="fan_in", dropout=0.1)
rng = np.random.default_rng(0)
batch = Batch(
    rng.normal(size=(B, R, S, F)).astype(np.float16), rng.random((B, R, S)) < 0.8,
    rng.integers(1, 32, (G, 1, L), dtype=np.int32), np.repeat([1, 2, 3], 4)[None, None].repeat(G, 0).astype(np.int32),
    np.tile(np.arange(4), 3)[None, None].repeat(G, 0).astype(np.int32),
    np.tile(np.array([0, 4, 8], np.int32), (B, 1)), (np.arange(B) // 2 * 2).astype(np.int32), np.arange(B, dtype=np.int32))
params = flatten(PathFLIP(config, nnx.Rngs(0)))
key = jax.random.key(3)

def compute(stage, params, batch, accumulate):
    value = loss_and_gradients(stage, lambda p: unflatten(config, p), params, batch, key, accumulate)
    return value, draw_negatives(key, B, K)

mesh = sharding.make_mesh(-1, 2)
assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
places = sharding.placements(mesh, params)
assert not places["qformer/layers/0/ffn/output/kernel"].is_fully_replicated
accumulate, normaliser = int(sys.argv[2]), sys.argv[3]
for loss in (LossConfig(normaliser=normaliser),):
    run = jax.jit(compute, static_argnums=(0, 3))
    stage = alignment(loss)
    (one, negatives_one) = run(stage, params, batch, accumulate)
    with jax.set_mesh(mesh):
        (eight, negatives_eight) = run(stage, jax.device_put(params, places), sharding.place_batch(mesh, batch), accumulate)
    np.testing.assert_array_equal(negatives_one, negatives_eight)
    for name, expected in {**one[1], "loss": one[0][0]}.items():
        expected, found = np.asarray(expected), np.asarray({**eight[1], "loss": eight[0][0]}[name])
        error = np.abs(found - expected).max()
        assert error <= max(1e-5 * np.abs(expected).max(), 1e-7), (accumulate, name, error, np.abs(expected).max())
    (other, _) = run(stage, params, batch._replace(case=np.zeros(B, np.int32)), accumulate)
    assert abs(float(other[0][0]) - float(one[0][0])) > 1e-3  # the negatives matter

# A checkpoint of 8 devices is whole on 1, and the other way round.
workdir = pathlib.Path(sys.argv[1])
saver = checkpoint.Checkpoints(workdir, 2, {})
saver.save(1, jax.device_put(params, places), {"count": jnp.int32(1)}, {"best": None})
saver.close()
single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
abstract = lambda tree, place: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place)
reader = checkpoint.Checkpoints(workdir, 2, {})
for place in ({name: single for name in params}, places):
    step, found, state, facts = reader.restore(abstract(params, place), abstract({"count": jnp.int32(1)}, {"count": single}))
    assert step == 1 and int(state["count"]) == 1
    for name in params:
        assert found[name].sharding.is_equivalent_to(place[name], params[name].ndim), name
        np.testing.assert_array_equal(found[name], params[name])
reader.close()
print("equal")
"""


@pytest.mark.parametrize(
    "accumulate, normaliser", [(1, "released"), pytest.param(2, "per_slide", marks=pytest.mark.slow)]
)
def test_loss_gradients_and_checkpoints_are_the_same_on_eight_devices(tmp_path, accumulate, normaliser):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, str(tmp_path), str(accumulate), normaliser]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout.endswith("equal\n"), done.stdout + done.stderr


def test_rules_place_by_name_and_spare_what_does_not_divide():
    mesh = jax.sharding.AbstractMesh((2, 4), sharding.AXES)
    shapes = {
        "a/kernel": jnp.zeros((8, 3)),
        "a/bias": jnp.zeros(8),
        "odd/kernel": jnp.zeros((6, 8)),
        "logit_scale": jnp.zeros(()),
    }
    places = sharding.placements(mesh, {"mu": shapes, "count": jnp.zeros(())})
    found = {name: place.spec for name, place in places["mu"].items()}
    expected = {"a/kernel": P("fsdp", None), "a/bias": P(), "odd/kernel": P(None, None), "logit_scale": P()}
    assert found == expected and places["count"].spec == P()


def test_mesh_that_does_not_fit_the_devices_is_refused():
    assert dict(sharding.make_mesh().shape) == {"data": jax.device_count(), "fsdp": 1}
    with pytest.raises(ValueError, match=r"mesh.fsdp=3: \d+ devices are here"):
        sharding.make_mesh(-1, 3)
    with pytest.raises(ValueError, match="mesh.data=0"):
        sharding.make_mesh(0, 1)


def test_a_part_of_the_distributed_settings_is_refused():
    with pytest.raises(ValueError, match="give all three or none"):
        sharding.initialize_distributed("host:1", 2, None)
