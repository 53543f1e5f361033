"""Transform of uint8 patches to a network's input, on the device: resized, cropped, normalised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pathflip_jax.vision.config import Transform
from pathflip_jax.vision.resampling import antialiased


def transformed(patches: UInt8[Array, "B P P 3"], transform: Transform) -> Float[Array, "B I I 3"]:
    """Input of the network, float32, as torchvision makes it of the same patches with Pillow.

    Pillow resamples rows, then columns, and rounds to whole grey levels after each.
    """
    size = patches.shape[1]
    pixels = patches.astype(jnp.float32)
    keep = slice(transform.margin, transform.margin + transform.crop)
    if size == transform.resize:
        pixels = pixels[:, keep, keep]
    else:
        matrix = jnp.asarray(antialiased(size, transform.resize, transform.kind)[keep], jnp.float32)
        pixels = _rounded(jnp.einsum("bijc,xj->bixc", pixels, matrix, precision=jax.lax.Precision.HIGHEST))
        pixels = _rounded(jnp.einsum("bijc,xi->bxjc", pixels, matrix, precision=jax.lax.Precision.HIGHEST))
    mean, std = (jnp.asarray(values, jnp.float32) for values in (transform.mean, transform.std))
    return (pixels / 255 - mean) / std


def _rounded(pixels: Array) -> Array:
    return jnp.clip(jnp.floor(pixels + 0.5), 0, 255)
