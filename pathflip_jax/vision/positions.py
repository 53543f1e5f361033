"""Positions of patches: learned tables, resampled as each original does, and rotary angles."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.resampling import antialiased, plain_bicubic

_OFFSET = 0.1  # Meta's DINOv2 adds it to the size against rounding, and so changes the scale
_PERIOD = 100.0  # longest period of rotary angles in DINOv3


def fitted(table: Float[Array, "N d"], config: VisionConfig) -> Float[Array, "M d"]:
    """Position table of the image's grid, from that of the file; rows of prefix tokens are kept.

    Three ways are in use (`VisionConfig.resize`): "antialias" (timm), "bicubic" without it (transformers), and
    "offset", bicubic with Meta's offset of 0.1 in the scale.
    """
    before, after = config.table_side, config.side
    if before == after:
        return table
    if config.resize == "antialias":
        matrix = antialiased(before, after, "bicubic")
    else:
        scale = before / (after + _OFFSET) if config.resize == "offset" else before / after
        matrix = plain_bicubic(before, after, scale)
    matrix = jnp.asarray(matrix, jnp.float32)
    prefix, patches = table[: config.prefix_positions], table[config.prefix_positions :]
    patches = patches.reshape(before, before, -1)
    patches = jnp.einsum("ijd,yi,xj->yxd", patches, matrix, matrix, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([prefix, patches.reshape(after * after, -1)])


def rotary_angles(config: VisionConfig) -> Float[np.ndarray, "N h"]:
    """Rotary angles of all patches, for half of the channels of a head: by row of the grid, then by column.

    Patch centres are scaled to -1 to 1 on each axis (DINOv3, arXiv 2508.10104).
    """
    quarter = config.width // config.heads // 4
    periods = _PERIOD ** (np.arange(quarter) / quarter)
    centres = 2 * (np.arange(config.side) + 0.5) / config.side - 1
    angles = 2 * np.pi * centres[:, None] / periods
    rows, columns = np.repeat(angles, config.side, axis=0), np.tile(angles, (config.side, 1))
    return np.concatenate([rows, columns], axis=1).astype(np.float32)


def rotated(x: Float[Array, "B T heads d"], angles: Float[np.ndarray, "N h"], prefix: int) -> Array:
    """Queries or keys with their patches rotated by their angles; `prefix` tokens stay as they are."""
    cos, sin = (jnp.asarray(f(np.tile(angles, 2)))[None, :, None].astype(x.dtype) for f in (np.cos, np.sin))
    patches = x[:, prefix:]
    first, second = jnp.split(patches, 2, axis=-1)
    turned = patches * cos + jnp.concatenate([-second, first], -1) * sin
    return jnp.concatenate([x[:, :prefix], turned], axis=1)
