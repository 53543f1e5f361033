"""Augmentation of patch features in a training step, on the devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pathflip_jax.model.parameters import Key


class Augmentation(NamedTuple):
    """Share of features that are dropped in all patches of a slide, and the shift of all patches of a slide.

    The shift, in standard deviations of a feature, is drawn per slide, as another stain or scanner would shift them.
    """

    dropout: float = 0.0
    noise: float = 0.0

    def __call__(
        self, patches: Float[Array, "B R S F"], mask: Bool[Array, "B R S"], key: Key | None
    ) -> Float[Array, "B R S F"]:
        """Augmented patches; the same without a key. Standard deviations are those of the batch's valid patches."""
        if key is None or not (self.dropout or self.noise):
            return patches
        noise_key, drop_key = jax.random.split(key)
        patches = patches.astype(jnp.float32)
        if self.noise:
            spread = jnp.std(patches, axis=(0, 1, 2), where=mask[..., None])
            patches += self.noise * spread * jax.random.normal(noise_key, (len(patches), 1, 1, patches.shape[-1]))
        if self.dropout:
            kept = jax.random.bernoulli(drop_key, 1 - self.dropout, (len(patches), 1, 1, patches.shape[-1]))
            patches = jnp.where(kept, patches / (1 - self.dropout), 0)
        return patches


NO_AUGMENTATION = Augmentation()
