"""Q-Former: a BERT with learned queries that cross-attend to patches, and that encodes text with the same weights.

Used for the slide, for its regions and for text (DESIGN section 3.2). Letters as in
`pathflip_jax.model.pathflip`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pathflip_jax.model.bert import Bert, BertLayer, FeedForward, SelfAttention
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.cross_attention import CrossAttention
from pathflip_jax.model.layers import INITS, initial
from pathflip_jax.ops.dropout import dropout, split_key


class Layer(BertLayer):
    """Q-Former layer: shared self-attention, cross-attention for the queries, separate feed-forwards for both.

    `cross_attention` is None in layers outside of `PathFLIPConfig.cross_layers`.
    """

    cross_attention: CrossAttention | None

    def __init__(self, config: PathFLIPConfig, index: int, rngs: nnx.Rngs) -> None:
        self.self_attention = SelfAttention(config, rngs)
        self.cross_attention = CrossAttention(config, rngs) if index in config.cross_layers else None
        self.ffn = FeedForward(config, rngs)
        # A copy, as in the released code: the queries' feed-forward is initialised from the one for text.
        self.query_ffn = jax.tree.map(jnp.copy, self.ffn)

    def read_patches(
        self, x: Array, patches: Array, mask: Array, key: Array | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Updated queries [B, 1+R, Q, H], and the attention of slide and regions if the layer has cross-attention."""
        keys = split_key(key, 3)
        maps = None
        with jax.named_scope("query_self_attention"):
            x = self.self_attention.among_queries(x, keys[0])
        if self.cross_attention is not None:
            with jax.named_scope("cross_attention"):
                x, *weights = self.cross_attention(x, patches, mask, keys[1])
                maps = tuple(weights)
        with jax.named_scope("query_feed_forward"):
            return self.query_ffn(x, keys[2]), maps


class QueryStates(NamedTuple):
    """Final query states, and the cross-attention of `PathFLIPConfig.map_layer`, None unless requested."""

    slide: Float[Array, "B Q H"]
    regions: Float[Array, "B R Q H"]
    slide_attention: Float[Array, "B heads Q R S"] | None
    region_attention: Float[Array, "B heads Q R S"] | None


class QFormer(Bert):
    """Q-Former whose weights are shared by slide, regions and text."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.query_tokens = nnx.Param(initial(INITS["bert"], (config.num_queries, config.hidden), rngs))
        super().__init__(config, rngs, Layer)

    def read_patches(
        self,
        patches: Float[Array, "B R S D"],
        mask: Bool[Array, "B R S"],
        key: Array | None = None,
        attention: bool = False,
    ) -> QueryStates:
        """Encode each slide from all of its patches and each region from its own patches.

        Both passes share every weight, so they run as one: query set 0 is the slide's, sets 1..R are the regions'.
        """
        keys = split_key(key, len(self.layers) + 1)
        B, R, S, _ = patches.shape
        x = self.norm(self.query_tokens[...])[None, None]
        if key is not None:
            # Without dropout all query sets are equal until they attend to patches; layer 0 broadcasts its own rows.
            x = dropout(jnp.broadcast_to(x, (B, 1 + R, *x.shape[2:])), self.config.dropout, keys[-1])
        x = x.astype(patches.dtype)
        shown = None
        for index, layer in enumerate(self.layers):
            x, maps = self.run(Layer.read_patches, layer, x, patches, mask, keys[index])
            if attention and index == self.config.map_layer:
                shown = maps
        slide_map = region_map = None
        if shown is not None:
            slide_map = shown[0].reshape(*shown[0].shape[:-1], R, S)
            region_map = jnp.moveaxis(shown[1], 1, 3)
        return QueryStates(x[:, 0], x[:, 1:], slide_map, region_map)
