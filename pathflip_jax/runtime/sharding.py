"""Sharding of arrays: the mesh, the rules for parameters, and the batch over all devices.

Rules are data: a regular expression over parameter names (`flatten` in `model/parameters.py`) and a PartitionSpec, the
first match wins. A larger model or another mesh changes the table, not the code. Optimizer state carries the names of
its parameters, so one table shards both (DESIGN section 6).
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "region")
BATCH = P(AXES[:2])

Rules = Iterable[tuple[str, P]]

# A kernel [in, out] is sharded along its inputs, an embedding table along its rows; the rest is small.
RULES: Rules = (
    (r"(^|/)(kernel|embedding)$", P("fsdp", None)),
    (r"", P()),
)
# Slides are sharded over two axes, and the regions of each over the third, along which texts are replicated.
BATCH_RULES: Rules = (
    (r"^patch", P(AXES[:2], "region")),
    (r"", BATCH),
)


def make_mesh(data: int = -1, fsdp: int = 1, region: int = 1) -> Mesh:
    """Mesh ("data", "fsdp", "region") over all devices; -1 for one of the three infers it from the others.

    `fsdp` devices share one copy of the parameters, `region` devices the regions of each slide: for slides so large,
    or batches so small, that there are fewer slides than devices. Raises ValueError when the product is not the device
    count.
    """
    count = jax.device_count()
    shape = [data, fsdp, region]
    if shape.count(-1) == 1:
        others = -math.prod(shape)
        shape[shape.index(-1)] = count // others if others > 0 else 0
    if min(shape) < 1 or math.prod(shape) != count:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.region={region}: their product must be the number of devices, "
            f"{count}; leave mesh.data at -1 and choose the other two so that their product divides {count}"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def infer_shardings(mesh: Mesh, tree, rules: Rules = RULES):
    """NamedSharding of every array of `tree`, by its name.

    A dimension that its mesh axis does not divide is replicated rather than refused.
    """
    rules = [(re.compile(pattern), spec) for pattern, spec in rules]

    def place(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in rules if pattern.search(name))
        axes = [
            axis if leaf.shape[i] % _size(mesh, axis) == 0 else None for i, axis in enumerate(tuple(spec)[: leaf.ndim])
        ]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(place, tree)


def _size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def place_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Shard rows [N, F] over all devices, padding the last shard with rows of zeros.

    Raises ValueError with several processes, none of which has all rows.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "data.resident='device' shards the features over the devices of a single process, but this run has "
            "several; set data.resident='host'"
        )
    short = -len(rows) % mesh.size
    rows = np.pad(rows, ((0, short), (0, 0))) if short else rows
    return jax.device_put(rows, NamedSharding(mesh, P(AXES)))


class Shards(NamedTuple):
    """Number of equal parts of whole slides in a batch, and the parts that this process makes; None: all."""

    count: int = 1
    own: tuple[int, ...] | None = None

    def rows(self, batch_size: int) -> np.ndarray:
        """Indices of the batch rows that this process makes, concatenated."""
        places = np.arange(batch_size).reshape(self.count, -1)
        return places[list(range(self.count) if self.own is None else self.own)].ravel()


ONE_PROCESS = Shards()  # a single process makes complete batches


def shards_of(mesh: Mesh) -> Shards:
    """Shards of a batch on the mesh, and those of this process."""
    return Shards(batch_shards(mesh), own_shards(mesh))


def batch_shards(mesh: Mesh) -> int:
    """Number of parts of whole slides into which the mesh divides a batch."""
    return _size(mesh, BATCH[0])


def own_shards(mesh: Mesh) -> tuple[int, ...]:
    """Parts of a batch needed by this process's devices, in order; devices along `region` need the same part."""
    places = np.argwhere(np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices))
    return tuple(sorted({int(data) * mesh.shape["fsdp"] + int(fsdp) for data, fsdp, _ in places}))


def place_batch(mesh: Mesh, batch):
    """Put a batch on the devices of the mesh; with several processes, each passes its `own_shards`, concatenated."""
    own, shards = own_shards(mesh), batch_shards(mesh)

    def whole(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(x) // len(own) * shards, *x.shape[1:]), x.dtype)

    shardings = infer_shardings(mesh, jax.tree.map(whole, batch), BATCH_RULES)
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)

    def place(x, sharding: NamedSharding):
        size = len(x) // len(own)

        def piece(index: tuple[slice, ...]):
            first = own.index(index[0].start // size if index[0].start else 0) * size
            return x[(slice(first, first + size), *index[1:])]

        return jax.make_array_from_callback(whole(x).shape, sharding, piece)

    return jax.tree.map(place, batch, shardings)


def shard_by_slide(mesh: Mesh) -> Callable:
    """A `losses.pathflip.ShardMap`: each device computes its own slides, with the inputs of all slides gathered once.

    Otherwise the compiler would gather them for every chunk, and reduce their gradients over devices as often. Batches
    that do not divide evenly are left to the compiler.
    """

    def shard_map(function: Callable, local: Any, gathered: Any, replicated: Any) -> Any:
        if len(jax.tree.leaves(local)[0]) % batch_shards(mesh):
            return function(local, gathered, replicated)

        def here(local, gathered, replicated):
            gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, BATCH[0], tiled=True), gathered)
            # Marked as varying once, so that their gradients are summed once.
            replicated = jax.tree.map(lambda x: jax.lax.pcast(x, BATCH[0], to="varying"), replicated)
            return function(local, gathered, replicated)

        sharded = jax.shard_map(here, mesh=mesh, in_specs=(BATCH, BATCH, P()), out_specs=BATCH)
        return sharded(local, gathered, replicated)

    return shard_map
