"""Registered patch encoders (`pathflip_jax/vision/recipes.py`) on all local devices, without PyTorch.

One process owns the devices: a batch is sharded over them, the weights are on each. Resizing, cropping and normalising
run on the devices, in one program for each patch size, so that only uint8 pixels are transferred.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from data_prep.hub import from_hub
from pathflip_jax.convert.vision import LoadedEncoder, load_vision
from pathflip_jax.vision.config import Transform
from pathflip_jax.vision.recipes import Recipe
from pathflip_jax.vision.transform import transformed
from pathflip_jax.vision.transformer import VisionTransformer

# Patches per batch and device: as many as keep the matrix units of an accelerator busy, and the caches of a CPU warm.
BATCHES = {"cpu": 16, "gpu": 256, "tpu": 256}


class VisionEncoder:
    """Registered encoder with its weights, a `DeviceEncoder`.

    `weights` is a file or folder of the published weights; None takes them from the Hugging Face cache, or downloads
    them. `half` computes in bfloat16, with normalisation, softmax and the residual stream in float32. `batch_size` is
    over all devices (default by platform), rounded up to their number. Raises as `load_vision`.
    """

    def __init__(
        self, recipe: Recipe, weights: Path | None = None, half: bool = False, batch_size: int | None = None
    ) -> None:
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("data",))
        self._replicated, self._sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self._dtype = jnp.bfloat16 if half else jnp.float32
        self.recipe, self.name, self.dim = recipe, recipe.name, recipe.width
        self.weights = weights or from_hub(recipe)
        self.loaded: LoadedEncoder = load_vision(recipe, self.weights, self._dtype, self._replicated)
        self._graph, self._state = nnx.split(self.loaded.network)
        self._devices = devices
        self.batch_size = self._rounded(batch_size or BATCHES[devices[0].platform] * len(devices))
        self._programs: dict[tuple[int, ...], Any] = {}

    def _rounded(self, batch_size: int) -> int:
        return -(-batch_size // len(self._devices)) * len(self._devices)

    def dispatch(self, patches: UInt8[np.ndarray, "B P P 3"]) -> Float[Array, "B F"]:
        """Start encoding a batch of `batch_size` patches; returns at once, before the devices have computed it."""
        if patches.shape not in self._programs:
            self._programs[patches.shape] = self._compiled(patches.shape)
        return self._programs[patches.shape](self._state, jax.device_put(patches, self._sharded))

    def __call__(self, patches: UInt8[np.ndarray, "n P P 3"]) -> Float[np.ndarray, "n F"]:
        """Encode any number of patches, in batches of `batch_size`."""
        rows = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(patches), self.batch_size):
            part = patches[start : start + self.batch_size]
            padded = np.zeros((self.batch_size, *part.shape[1:]), np.uint8)
            padded[: len(part)] = part
            rows.append(np.asarray(self.dispatch(padded))[: len(part)])
        return np.concatenate(rows)

    def halve(self) -> bool:
        """Halve the batch, for devices whose memory it exceeds; False where it is one patch per device."""
        if self.batch_size <= len(self._devices):
            return False
        self.batch_size = self._rounded(self.batch_size // 2)
        return True

    def recipe_facts(self) -> dict[str, Any]:
        """Facts that determine the features besides the patches themselves."""
        transform = self.recipe.transform
        return {
            "encoder": self.name,
            "weights": self.loaded.sha256,
            "transform": {
                "resize": transform.resize, "crop": transform.crop, "filter": transform.kind,
                "mean": list(transform.mean), "std": list(transform.std),
            },
            "pooling": self.recipe.network.pooling,
            "precision": jnp.dtype(self._dtype).name,
        }  # fmt: skip

    def _compiled(self, shape: tuple[int, ...]):
        patches = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=self._sharded)
        return lower(self._graph, self.recipe.transform, self._dtype, self._state, patches).compile()


def lower(graph: nnx.GraphDef, transform: Transform, dtype: DTypeLike, state: nnx.State, patches: Array):
    """Program of one batch, lowered; `state` and `patches` may be shapes, of devices that are not there.

    Features have the sharding of `patches`.
    """
    encode = functools.partial(_encode, graph, transform, dtype)
    return jax.jit(encode, out_shardings=patches.sharding).lower(state, patches)


def _encode(graph, transform, dtype, state: nnx.State, patches: Array) -> Float[Array, "B F"]:
    network: VisionTransformer = nnx.merge(graph, state)
    precision = "highest" if dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return network(transformed(patches, transform), dtype)
