"""Run by test_two_processes.py, twice at a time: PORT PROCESS FOLDER. Ends with "equal" on stderr where all is."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from eight_devices import CONFIG, B, compute, make_batch
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pathflip_jax.losses.pathflip import LossConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs import checkpoints as checkpoint
from pathflip_jax.runtime import distributed, sharding
from pathflip_jax.training.objectives import alignment


def loss_and_gradients_are_those_of_one_device(mesh, params, places):
    stage, batch = alignment(LossConfig(normaliser="per_slide")), make_batch()
    one = jax.device_get(jax.jit(compute, static_argnums=(2, 3, 4))(params, batch, stage, 2, CONFIG))
    share = slice(jax.process_index() * B // 2, (jax.process_index() + 1) * B // 2)
    own = jax.tree.map(lambda x: x[share], batch)
    whole = jax.jit(compute, static_argnums=(2, 3, 4), out_shardings=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        found = jax.device_get(
            whole(params_on(mesh, params, places), sharding.place_batch(mesh, own), stage, 2, CONFIG)
        )
    assert one.keys() == found.keys()
    for name, expected in one.items():
        error = np.abs(found[name] - expected).max()
        assert error <= max(1e-5 * np.abs(expected).max(), 1e-7), (name, error, np.abs(expected).max())


def params_on(mesh, params, places):
    return {
        name: jax.make_array_from_callback(x.shape, places[name], lambda i, x=x: np.asarray(x)[i])
        for name, x in params.items()
    }


def what_one_process_finds_damaged_is_damaged_for_both(workdir, mesh, params, places):
    placed, state = params_on(mesh, params, places), {"count": jax.device_put(np.int32(1), NamedSharding(mesh, P()))}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (placed, state))
    with checkpoint.Checkpoints(workdir, 3, {}) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, placed, state, {"best": None})
    read = checkpoint._read

    def unlucky(folder, wanted):
        arrays, about = read(folder, wanted)
        if jax.process_index() == 1 and folder.name == "3":
            raise OSError("a file that this host cannot read")
        if jax.process_index() == 1 and folder.name == "2":
            about["checksums"]["params"]["logit_scale"] ^= 1
        return arrays, about

    checkpoint._read = unlucky
    with checkpoint.Checkpoints(workdir, 3, {}) as checkpoints:
        step, found, _, _ = checkpoints.restore(*like)
    checkpoint._read = read
    assert step == 1 and sorted(p.name for p in workdir.iterdir()) == ["best", "checkpoints", "damaged-2", "damaged-3"]
    for name, x in found.items():
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(params[name])[shard.index])


def each_process_keeps_its_share_on_its_own_disk(folder, mesh, params, places):
    placed, state = params_on(mesh, params, places), {"count": jax.device_put(np.int32(1), NamedSharding(mesh, P()))}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (placed, state))
    settings = {"keep": 3, "facts": {}, "local": str(folder / "local")}
    with checkpoint.Checkpoints(folder / "beside", **settings) as checkpoints:
        checkpoints.save(1, placed, state, {"best": None})
        for step in (2, 3):
            checkpoints.save_locally(step, placed, state, {"best": None})
    for lost, expected in ((None, 3), ("3", 2), ("", 1)):
        if lost is not None and jax.process_index() == 1:  # a step that this host had not written, then its whole disk
            (share,) = (folder / "local").glob("*/1-of-2")
            shutil.rmtree(share / lost)
        distributed.agree("lost")
        with checkpoint.Checkpoints(folder / "beside", **settings) as checkpoints:
            step, found, _, _ = checkpoints.restore(*like)
        assert step == expected, (lost, step)
        for name, x in found.items():
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(params[name])[shard.index])


if __name__ == "__main__":
    port, process, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.initialize(distributed.find_launch(f"localhost:{port}", 2, process))
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    assert distributed.gather({"process": process}) == [{"process": 0}, {"process": 1}]
    assert distributed.agree(process) == 0
    distributed.require_same(workdir="one")
    try:
        distributed.require_same(workdir=f"run{process}")
    except ValueError as error:
        assert json.dumps(str(error)).count("run") == 4 and "PATHFLIP_DISTRIBUTED=0" in str(error)
    else:
        raise AssertionError("two workdirs passed for one")
    mesh = sharding.make_mesh(-1, 2)
    params = jax.device_get(jax.jit(lambda key: flatten(PathFLIP(CONFIG, nnx.Rngs(key))))(jax.random.key(0)))
    places = sharding.infer_shardings(mesh, params)
    loss_and_gradients_are_those_of_one_device(mesh, params, places)
    what_one_process_finds_damaged_is_damaged_for_both(folder / "run", mesh, params, places)
    each_process_keeps_its_share_on_its_own_disk(folder, mesh, params, places)
    print("equal", file=sys.stderr)
