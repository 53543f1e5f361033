"""Encoder's program compiled for a TPU that is not attached: memory, operations, memory traffic, predicted speed."""

import time
from dataclasses import replace
from typing import Any, NamedTuple

from accelerator_parts.device import BANDWIDTH
from aot import CHIPS, UTILISATION
from topology import hbm_limit, open_topology, placed
from traffic import read_traffic

from pathflip_jax.vision.recipes import Recipe

MEMORY = {"v5e": BANDWIDTH["TPU v5e"], "v6e": BANDWIDTH["TPU v6e"]}
BATCH, SMALL_BATCH = 256, 8  # patches per chip


class Compiled(NamedTuple):
    """Compiler's figures per chip for an encoder's program: bytes, operations, seconds to compile."""

    peak_bytes: float
    flops: float
    accessed_bytes: float
    wire_bytes: float
    seconds: float

    def with_layers(self, none: "Compiled", layers: int) -> "Compiled":
        """Figures with every layer counted: the compiler counts the loop over layers as one; `none` has no layer."""
        counted = {name: getattr(none, name) + layers * (getattr(self, name) - getattr(none, name))
                   for name in ("flops", "accessed_bytes", "wire_bytes")}  # fmt: skip
        return self._replace(seconds=self.seconds + none.seconds, **counted)


class Prediction(NamedTuple):
    """Patches per second of a chip: with compute at half of its peak, at most by its memory, and the smaller of them.

    `share` is the share of the peak that the smaller one takes.
    """

    compute: float
    memory: float
    both: float
    share: float


def predict(operations: float, accessed_bytes: float, batch: int, rate: float, bandwidth: float) -> Prediction:
    """Prediction for a batch per chip; `operations` are of one patch, `accessed_bytes` of the batch."""
    compute, memory = UTILISATION * rate / operations, batch * bandwidth / accessed_bytes
    both = min(compute, memory)
    return Prediction(compute, memory, both, both * operations / rate)


def run(recipe: Recipe, topology: str, small: bool = False) -> dict[str, Any]:
    """Figures and prediction of an encoder on all chips of a topology, the batch sharded over them.

    Raises ModuleNotFoundError without libtpu, ValueError for an unknown topology.
    """
    import jax
    from jax.sharding import AxisType

    chip = topology.partition(":")[0]
    if chip not in CHIPS:
        raise ValueError(f"--aot {topology}: expected a chip with known rates: {', '.join(CHIPS)}")
    devices = open_topology(topology)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    batch, layers = (SMALL_BATCH, 2) if small else (BATCH, recipe.network.depth)
    found = compile_encoder(recipe, batch, mesh, layers).with_layers(compile_encoder(recipe, batch, mesh, 0), layers)
    operations = replace(recipe.network, depth=layers).operations()
    prediction = predict(operations, found.accessed_bytes, batch, CHIPS[chip][0], MEMORY[chip])
    return {
        "devices": len(devices), "hbm_limit_bytes": hbm_limit(devices[0]), "batch": batch, "layers": layers,
        "operations": operations, "prediction": prediction._asdict(),
    } | found._asdict()  # fmt: skip


def compile_encoder(recipe: Recipe, batch: int, mesh, layers: int) -> Compiled:
    """Compile the program of `batch` patches per chip in bfloat16, for a mesh of abstract devices."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from data_prep.vision_encoders import lower
    from pathflip_jax.convert.vision import abstract_parameters
    from pathflip_jax.model.parameters import unflatten
    from pathflip_jax.vision.transformer import VisionTransformer

    config = replace(recipe.network, depth=layers)
    whole, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if name.endswith("/kernel") else x.dtype)
              for name, x in abstract_parameters(config).items()}  # fmt: skip
    network = unflatten(jax.eval_shape(lambda: VisionTransformer(config)), shapes)
    graph, state = nnx.split(network)
    state = placed(state, jax.tree.map(lambda _: whole, state))
    size = (batch * mesh.size, recipe.patch_size, recipe.patch_size, 3)
    patches = jax.ShapeDtypeStruct(size, jnp.uint8, sharding=sharded)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = lower(graph, recipe.transform, jnp.bfloat16, state, patches).compile()
    seconds = time.perf_counter() - start
    plan, cost = compiled.memory_analysis(), compiled.cost_analysis()
    own = plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.generated_code_size_in_bytes
    peak = plan.argument_size_in_bytes + own + plan.temp_size_in_bytes
    wire = read_traffic(compiled.as_text(), mesh.size).wire_bytes
    return Compiled(peak, cost["flops"], cost["bytes accessed"], wire, round(seconds, 1))
