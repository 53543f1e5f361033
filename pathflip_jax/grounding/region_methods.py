"""Grounding methods that score regions and derive patch scores from them."""

import numpy as np

from pathflip_jax.grounding import maps
from pathflip_jax.grounding.method import ATTENTION, REGIONS, Method


class Region(Method):
    """Attention of the text over regions: the logarithm of its ratio to uniform attention, 0 where it is uniform."""

    name = "region"
    description = "the attention of the text to a region, assigned to all of its patches"
    rests_on = (REGIONS, ATTENTION)

    def score(self, encoder, prepared, text, region_scores):
        """Region scores copied to their patches."""
        return maps.copy_to_patches(region_scores, prepared.slots, len(prepared.coords))


class RefinedRegion(Region):
    """`Region`, refined by the patch cross-attention of the Region Q-Former."""

    name = "attention"
    description = "the same, refined within the region by the cross-attention of its queries to patches"
    attention = True
    splits_regions = True

    def prepare(self, encoder, view):
        """Share of each patch in the attention to its region [N]."""
        return maps.patch_shares(view.encoding.region_attention[0], view.slots, len(view.slide.features))

    def score(self, encoder, prepared, text, region_scores):
        """Sum of the region's score and the logarithm of the share."""
        return super().score(encoder, prepared, text, region_scores) + np.log(np.maximum(prepared.state, 1e-9))


METHODS = (Region(), RefinedRegion())
