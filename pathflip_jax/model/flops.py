"""Model FLOPs of a training step, by formula, for valid patches and real tokens only.

Padding, recomputation and operations added by XLA do not count, so the ratio to the device's peak is the "model FLOPs
utilisation" of PaLM (arXiv 2204.02311). Two operations per multiply-add; bytes are the minimal memory traffic, each
tensor too large for a cache written once and read once per use. The numbers of `Work` may be arrays, so that a compiled
step can count its own batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.families import family_of
from pathflip_jax.model.parameters import abstract_params
from pathflip_jax.model.step_parts import Work


class Part(NamedTuple):
    """Operations and bytes of one part of a step, forward and backward together."""

    name: str
    operations: float
    bytes: float

    def floor(self, rate: float, bandwidth: float) -> float:
        """Roofline lower bound on the time of this part, in seconds."""
        return max(self.operations / rate, self.bytes / bandwidth)


def parts(config: ModelConfig, work: Work, width: int, training: bool) -> list[Part]:
    """Parts of a step; `width` is the size of an activation in bytes. Training counts as three forward passes."""
    passes = 3 if training else 1
    found = [
        Part(name, 2 * passes * multiply_adds, passes * moved)
        for name, multiply_adds, moved in family_of(config).parts(config, work, width)
    ]
    if training:
        # AdamW reads the weight, gradient and two moments and writes all but the gradient, in float32.
        found.append(Part("optimizer", 12.0 * parameters(config), 28.0 * parameters(config)))
    return found


@functools.cache
def parameters(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in abstract_params(config).values())


def model_flops(
    config: ModelConfig,
    patch_mask: Bool[jax.Array, "B R S"],
    text_rows: Sequence[tuple[Int[jax.Array, "G _ _"], ...]],
) -> Float[jax.Array, ""]:
    """Operations of the training step on this batch; `text_rows` as in `PathFLIP.encode_texts`.

    Meant to run inside a compiled step, where arrays, and hence the sum, span all devices and processes.
    """
    B = len(patch_mask)
    tokens = squares = jnp.float32(0)
    for _, segments, positions in text_rows:
        real = segments > 0
        tokens += jnp.sum(real, dtype=jnp.float32)
        squares += jnp.sum(jnp.where(real, 2 * positions + 1, 0), dtype=jnp.float32)  # 1 + 3 + 5 + ... = length squared
    regions = jnp.sum(jnp.any(patch_mask, axis=-1), dtype=jnp.float32)
    work = Work(B, regions, jnp.sum(patch_mask, dtype=jnp.float32), tokens, squares)
    return sum(part.operations for part in parts(config, work, 4, training=True))
