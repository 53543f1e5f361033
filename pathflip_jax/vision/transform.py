"""Transform of uint8 patches to a network's input, on the device: resized, cropped, normalised."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pathflip_jax.vision.config import Transform
from pathflip_jax.vision.resampling import antialiased

_WEIGHT_BITS = 22  # of a weight in Pillow, whose sums are of whole numbers
_PART_BITS = 11  # products of pixels with half a weight, and their sums, are exact in float32


def transformed(patches: UInt8[Array, "B P P 3"], transform: Transform) -> Float[Array, "B I I 3"]:
    """Input of the network, float32, as torchvision makes it of the same patches with Pillow.

    Pillow resamples rows, then columns, and rounds to whole grey levels after each; the levels are exactly its own.
    """
    size = patches.shape[1]
    pixels = patches.astype(jnp.float32)
    keep = slice(transform.margin, transform.margin + transform.crop)
    if size == transform.resize:
        pixels = pixels[:, keep, keep]
    else:
        matrix = antialiased(size, transform.resize, transform.kind)[keep]
        pixels = _resampled("bijc,xj->bixc", pixels, matrix)
        pixels = _resampled("bijc,xi->bxjc", pixels, matrix)
    mean, std = (jnp.asarray([[[values]]], jnp.float32) for values in (transform.mean, transform.std))
    return (pixels / 255 - mean) / std


def _resampled(spec: str, pixels: Array, matrix: np.ndarray) -> Array:
    """Whole grey levels resampled to whole grey levels.

    In float32 alone, levels halfway between two would fall to either side: 3 in 100 from 256 to 224 pixels.
    """
    weights = np.rint(matrix * 2**_WEIGHT_BITS).astype(np.int32)
    coarse, fine = (
        jnp.einsum(spec, pixels, part.astype(np.float32), precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
        for part in np.divmod(weights, 2**_PART_BITS)
    )
    levels = (coarse * 2**_PART_BITS + fine + 2 ** (_WEIGHT_BITS - 1)) >> _WEIGHT_BITS
    return jnp.clip(levels, 0, 255).astype(jnp.float32)
