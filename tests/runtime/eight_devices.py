"""Script of test_sharding.py for a separate process: FOLDER ACCUMULATE LOSS MESH... Prints "equal" last on success.

A LOSS is a normaliser of PathFLIP's region loss, or `pairs` or `flair` of PathFLIP2's. A MESH is "data fsdp region",
such as 4x2x1; all have the same number of devices, which divides 8.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from pathflip_jax.data.batches.packing import TextRows
from pathflip_jax.data.batches.pipeline import Batch, look_up
from pathflip_jax.losses.pathflip import LossConfig, draw_negatives
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig
from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.parameters import flatten, make_model, unflatten
from pathflip_jax.runs import checkpoints as checkpoint
from pathflip_jax.runtime import sharding
from pathflip_jax.training.objectives import alignment, sigmoid_alignment
from pathflip_jax.training.step import loss_and_gradients

B, R, S, F, K, G, L = 16, 4, 4, 16, 2, 16, 12
CONFIG = PathFLIPConfig(
    feature_dim=F, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=32, num_queries=2, vocab_size=32,
    max_positions=16, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in", dropout=0.1,
)  # fmt: skip


def make_batch():
    rng = np.random.default_rng(0)
    return Batch(
        patches=rng.normal(size=(B, R, S, F)).astype(np.float16),
        patch_mask=rng.random((B, R, S)) < 0.8,
        text_rows=(
            TextRows(
                tokens=rng.integers(1, 32, (G, 1, L), dtype=np.int32),
                segments=np.tile(np.repeat([1, 2, 3], 4), (G, 1, 1)).astype(np.int32),
                positions=np.tile(np.arange(4), (G, 1, 3)).astype(np.int32),
            ),
        ),
        text_index=np.tile(np.array([0, 4, 8], np.int32), (B, 1)),
        related=np.stack([np.arange(B) // 2 * 2, B + np.arange(B) % 7], 1).astype(np.int32),  # cases, and captions
        slide=np.arange(B, dtype=np.int32),
        wording=rng.integers(0, 3 * B, (B, K), dtype=np.int32),
    )


CONFIG2 = PathFLIP2Config(
    feature_dim=F, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=32, vocab_size=32, max_positions=16,
    tokens=4, token_heads=2, text_region_heads=2, top_k=5, init="fan_in", region_head="attention",
)  # fmt: skip


def family(loss):
    """The config of a loss, and a function (texts at a time, shard_map) -> its stage."""
    if loss in ("pairs", "flair"):
        config = SigmoidLossConfig(region=loss)
        return CONFIG2, lambda at_once, *shard_map: sigmoid_alignment(
            dataclasses.replace(config, slides_at_once=at_once), *shard_map
        )
    config = LossConfig(normaliser=loss)
    return CONFIG, lambda at_once, *shard_map: alignment(
        dataclasses.replace(config, negatives_at_once=at_once or None), *shard_map
    )


def compute(params, batch, stage, accumulate, config):
    key = jax.random.key(3)
    (loss, _), gradients = loss_and_gradients(stage, lambda p: unflatten(config, p), params, batch, key, accumulate)
    return gradients | {"loss": loss, "negatives": draw_negatives(key, B, K).astype(jnp.float32)}


def same_on_every_mesh(meshes, params, accumulate, loss):
    run = jax.jit(compute, static_argnums=(2, 3, 4))
    (config, make), batch = family(loss), make_batch()
    one = run(params, batch, make(0), accumulate, config)
    no_negatives = run(params, batch._replace(related=np.zeros(B, np.int32)), make(0), accumulate, config)
    assert abs(float(no_negatives["loss"] - one["loss"])) > 1e-3, "the negatives do not matter"
    for number, mesh in enumerate(meshes):
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharding.infer_shardings(mesh, params))
            stage = make(0 if number else 4, sharding.shard_by_slide(mesh))
            found = run(placed, sharding.place_batch(mesh, batch), stage, accumulate, config)
        compare(one, found, dict(mesh.shape))


def compare(one, many, mesh):
    assert one.keys() == many.keys()
    for name, expected in one.items():
        expected, found = np.asarray(expected), np.asarray(many[name])
        error = np.abs(found - expected).max()
        assert error <= max(1e-5 * np.abs(expected).max(), 1e-7), (mesh, name, error, np.abs(expected).max())


def batch_lies_on_all_devices(mesh):
    data, fsdp, region = (mesh.shape[axis] for axis in sharding.AXES)
    batch = sharding.place_batch(mesh, make_batch())
    slides = B // (data * fsdp)
    assert batch.patches.addressable_shards[0].data.shape == (slides, R // region, S, F)
    assert batch.text_rows[0].tokens.addressable_shards[0].data.shape == (G // (data * fsdp), 1, L)


def features_are_looked_up_wherever_they_lie(mesh):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(37, F)).astype(np.float16)  # no multiple of 8
    batch = make_batch()._replace(patches=rng.integers(0, 37, (B, R, S), dtype=np.int32))
    placed = sharding.place_rows(mesh, rows)
    each = -(-37 // mesh.size)
    assert placed.shape == (each * mesh.size, F) and placed.addressable_shards[0].data.shape == (each, F)
    found = jax.jit(look_up)(sharding.place_batch(mesh, batch), placed).patches
    np.testing.assert_array_equal(found, rows[batch.patches])


def checkpoint_goes_both_ways(workdir, params, places):
    def abstract(tree, places):
        return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, places)

    state, single = {"count": jnp.int32(1)}, SingleDeviceSharding(jax.devices()[0])
    ones = {name: single for name in params}
    for name, saved, read in (("to_one", places, ones), ("to_eight", ones, places)):
        with checkpoint.Checkpoints(workdir / name, 2, {}) as checkpoints:
            checkpoints.save(1, jax.device_put(params, saved), state, {"best": None})
        with checkpoint.Checkpoints(workdir / name, 2, {}) as checkpoints:
            step, found, count, _ = checkpoints.restore(abstract(params, read), abstract(state, {"count": single}))
        assert step == 1 and int(count["count"]) == 1
        for key in params:
            assert found[key].sharding.is_equivalent_to(read[key], params[key].ndim), key
            np.testing.assert_array_equal(found[key], params[key])


if __name__ == "__main__":
    meshes = [sharding.make_mesh(*map(int, shape.split("x"))) for shape in sys.argv[4:]]
    devices = meshes[0].size
    assert jax.device_count() == devices and 8 % devices == 0, devices
    config, _ = family(sys.argv[3])
    params = jax.jit(lambda key: flatten(make_model(config, nnx.Rngs(key))))(jax.random.key(0))
    same_on_every_mesh(meshes, params, int(sys.argv[2]), sys.argv[3])
    for mesh in meshes:
        batch_lies_on_all_devices(mesh)
    mesh = sharding.make_mesh(-1, 2)
    assert dict(mesh.shape) == {"data": devices // 2, "fsdp": 2, "region": 1}
    places = sharding.infer_shardings(mesh, params)
    reads_text = "qformer" if config is CONFIG else "text_encoder"
    assert not places[f"{reads_text}/layers/0/ffn/output/kernel"].is_fully_replicated
    features_are_looked_up_wherever_they_lie(mesh)
    checkpoint_goes_both_ways(Path(sys.argv[1]), params, places)
    print("equal")
