"""Lowering of the training step for TPUs that are not attached: devices of a topology, their memory, batch shapes."""

import json
import math
import re

import numpy as np
from roofline import LENGTHS
from sides import S

from pathflip_jax.model.config import ModelConfig

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
DATA_SIZES = (512, 30523)  # width of CONCH features and BERT's vocabulary, which training takes from its data
SIMULATED_GROUPS = 64


def open_topology(name: str) -> list:
    """The devices of a topology. Raises ModuleNotFoundError without libtpu, ValueError for an unknown name."""
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "libtpu, the compiler for TPUs, is not installed: pip install pathflip-jax[aot]"
        ) from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # its type differs between versions of the runtime
        raise ValueError(f"--topology {name}: {error}; expected a name such as v5e:2x4 or v6e:16x16") from None


def hbm_limit(device) -> float:
    """Memory of a chip that the compiler may use, in bytes: the error for a program that needs too much states it."""
    import jax
    from jax.sharding import SingleDeviceSharding

    huge = jax.ShapeDtypeStruct((2**36,), np.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return float(found[1]) * 2**30
        raise
    raise RuntimeError(f"{device.device_kind}: a program of 256 GiB was not refused, so the memory limit is unknown")


def make_mesh(devices: list, fsdp: int, region: int):
    """The mesh of `pathflip train` over a topology's devices. Raises ValueError if the axes do not divide them."""
    import jax
    from jax.sharding import AxisType

    from pathflip_jax.runtime.sharding import AXES

    if len(devices) % (fsdp * region):
        raise ValueError(f"--fsdp {fsdp} --region {region}: their product does not divide the {len(devices)} devices")
    shape, types = (len(devices) // (fsdp * region), fsdp, region), (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def with_layers(config, layers: int) -> ModelConfig:
    """Model config with that many layers."""
    from pathflip_jax.training.alignment import model_config

    return ModelConfig.from_dict(model_config(config, *DATA_SIZES).to_dict() | {"layers": layers})


def make_batch(config, slides: int, mesh):
    """Shapes and shardings of a batch with `slides` slides per data-parallel share of the mesh.

    It has as many text rows as groups of texts of real lengths need (`set_text_rows`).
    """
    import jax

    from pathflip_jax.data.batches.packing import TextRows, enough_rows, row_lengths
    from pathflip_jax.data.batches.pipeline import Batch
    from pathflip_jax.runtime.sharding import BATCH_RULES, batch_shards, infer_shardings
    from pathflip_jax.training.data import choose_groups

    data, shares = config.data, batch_shards(mesh)
    B = slides * shares
    groups = choose_groups(B, shares * config.train.accumulate)
    longest = [data.caption_length] + [data.subcaption_length] * data.subcaptions
    lengths = [np.minimum(own[: len(longest)], longest) for own in json.loads(LENGTHS.read_text())["slides"]]
    rng = np.random.default_rng(0)
    drawn = [
        np.concatenate([lengths[i] for i in rng.integers(len(lengths), size=B // groups)]).tolist()
        for _ in range(SIMULATED_GROUPS)
    ]
    widths = row_lengths(data.row_step, max(data.caption_length, data.subcaption_length))
    counts = zip(enough_rows(drawn, widths), widths, strict=True)
    R, slots = data.regions, data.patch_slots or S

    of = jax.ShapeDtypeStruct
    rows = tuple(TextRows(*[of((groups, n, width), np.int32)] * 3) for n, width in counts if n)
    patches, mask = of((B, R, slots, DATA_SIZES[0]), np.float16), of((B, R, slots), np.bool_)
    number = of((B,), np.int32)
    batch = Batch(patches, mask, rows, of((B, 1 + data.subcaptions), np.int32), number, number)
    return placed(batch, infer_shardings(mesh, batch, BATCH_RULES))


def placed(shapes, places):
    """A tree of shapes with the shardings of `places`."""
    import jax

    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def lower(config, layers: int, slides: int, mesh):
    """Lower the training step of a config with that many layers for a mesh; also the bytes of parameters per chip."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from pathflip_jax.model.parameters import abstract_params, unflatten
    from pathflip_jax.runtime import sharding
    from pathflip_jax.training.alignment import family_of
    from pathflip_jax.training.optim import learning_rate, make_optimizer
    from pathflip_jax.training.step import make_step

    model = with_layers(config, layers)
    schedule = learning_rate(config.optim, 1000, 1000)
    optimizer = make_optimizer(config.optim, schedule)
    stage = family_of(config).stage(config, model, sharding.shard_by_slide(mesh))
    step = make_step(
        stage, lambda p, _: unflatten(model, p), optimizer, schedule, config.train.accumulate, config.train.seed
    )

    params, opt_state = abstract_params(model), jax.eval_shape(optimizer.init, abstract_params(model))
    params, opt_state = (placed(tree, sharding.infer_shardings(mesh, tree)) for tree in (params, opt_state))
    whole = NamedSharding(mesh, P())
    batch = make_batch(config, slides, mesh)
    places = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in params.values())
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*places, whole))
        number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        return jitted.lower(params, {}, opt_state, batch, number), held
