"""Where arrays live: the mesh, the rules that place parameters, and the batch over all devices.

Rules are data: a regular expression over parameter names (`flatten` in `model/pathflip.py`) and a
PartitionSpec, the first match wins. A larger model or another mesh changes the table, not the code. Optimizer
state carries the names of the parameters it belongs to, so one table places both (DESIGN section 6).
"""

import re
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
BATCH = P(AXES)

Rules = Iterable[tuple[str, P]]

# A kernel [in, out] is cut along its inputs, an embedding table along its rows; the rest is small.
RULES: Rules = (
    (r"(^|/)(kernel|embedding)$", P("fsdp", None)),
    (r"", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """The mesh ("data", "fsdp") over all devices; -1 (for one of the two) takes what the other leaves.

    `fsdp` devices share one copy of the parameters. Raises ValueError when the product is not the device count.
    """
    count = jax.device_count()
    shape = [data, fsdp]
    if shape.count(-1) == 1:
        other = max(shape)
        shape[shape.index(-1)] = count // other if other > 0 else 0
    if min(shape) < 1 or shape[0] * shape[1] != count:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}: {count} devices are here, so the product must be {count}; "
            "leave mesh.data at -1 and choose an mesh.fsdp that divides the device count"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def placements(mesh: Mesh, tree, rules: Rules = RULES):
    """The NamedSharding of every array of `tree`, by its name.

    A dimension that its mesh axis does not divide stays whole: better a copy than a crash over an odd size.
    """
    rules = [(re.compile(pattern), spec) for pattern, spec in rules]

    def place(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in rules if pattern.search(name))
        axes = [
            axis if axis is not None and leaf.shape[i] % mesh.shape[axis] == 0 else None
            for i, axis in enumerate(tuple(spec)[: leaf.ndim])
        ]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(place, tree)


def place_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Put rows [N, F] on the devices, a share on each; rows of zeros fill up the last share.

    Raises ValueError with several processes: none of them has all rows.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "data.resident='device' is for one process, whose devices share the features; set data.resident='host'"
        )
    short = -len(rows) % mesh.size
    rows = np.pad(rows, ((0, short), (0, 0))) if short else rows
    return jax.device_put(rows, NamedSharding(mesh, BATCH))


def place_batch(mesh: Mesh, batch):
    """Put this process's share of a batch on its devices, leading axis over all of the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
