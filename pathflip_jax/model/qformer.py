"""The Q-Former: a BERT whose learned queries look at patches in every `freq`-th layer.

Queries and texts share embedding LayerNorm and self-attention, have feed-forward networks of their own, go through
separate calls and never attend to each other (DESIGN section 3.2). Post-LayerNorm, exact GELU, as in BERT.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.attention import (
    Initializer,
    Key,
    PatchAttention,
    SelfAttention,
    dropout,
    layer_norm,
    linear,
    subkey,
)
from pathflip_jax.model.config import PathFLIPConfig

BERT_EPSILON = 1e-12


def projection_init(config: PathFLIPConfig) -> Initializer:
    """How projections start: BERT's 0.02, or by fan-in, which lets small models learn at all."""
    return initializers.normal(0.02) if config.init == "bert" else initializers.lecun_normal()


class FeedForward(nnx.Module):
    """Linear, exact GELU, Linear, residual, LayerNorm."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs):
        init, dtype = projection_init(config), config.compute_dtype
        self.rate = config.dropout
        self.intermediate = linear(config.hidden, config.intermediate, init, dtype, rngs)
        self.output = linear(config.intermediate, config.hidden, init, dtype, rngs)
        self.norm = layer_norm(config.hidden, BERT_EPSILON, dtype, rngs)

    def __call__(self, x: Float[Array, "*batch H"], key: Key | None) -> Float[Array, "*batch H"]:
        """[..., H] -> [..., H]."""
        hidden = jax.nn.gelu(self.intermediate(x), approximate=False)
        return self.norm(x + dropout(self.output(hidden), self.rate, key))


class QFormerLayer(nnx.Module):
    """One layer: self-attention for both, then patches and `query_ffn` for queries, `ffn` for texts."""

    def __init__(self, config: PathFLIPConfig, cross: bool, rngs: nnx.Rngs):
        init, dtype = projection_init(config), config.compute_dtype
        block = (config.heads, config.dropout, BERT_EPSILON, init, dtype, rngs)
        self.self_attention = SelfAttention(config.hidden, *block)
        self.cross_attention = PatchAttention(config.hidden, config.embed_dim, *block) if cross else None
        self.ffn = FeedForward(config, rngs)
        # The queries' network starts as a copy of the texts' (in a pretrained BERT there is only one).
        self.query_ffn = jax.tree.map(jnp.copy, self.ffn)

    def queries(
        self, x: Float[Array, "n Q H"], patches: Float[Array, "n N D"], mask: Bool[Array, "n N"], key: Key | None
    ):
        """Queries one layer on [n, Q, H], and their attention to patches [n, heads, Q, N] (None without one)."""
        x = self.self_attention(x, None, subkey(key, 0))
        weights = None
        if self.cross_attention is not None:
            x, weights = self.cross_attention(x, patches, mask, subkey(key, 1))
        return self.query_ffn(x, subkey(key, 2)), weights

    def texts(self, x: Float[Array, "n T H"], mask: Bool[Array, "n T T"], key: Key | None) -> Float[Array, "n T H"]:
        """Texts one layer on; `mask` keeps packed texts apart."""
        return self.ffn(self.self_attention(x, mask, subkey(key, 0)), subkey(key, 1))


class QFormer(nnx.Module):
    """The one network behind slide embeddings, region embeddings and text embeddings."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs):
        self.config = config
        dtype, normal = config.compute_dtype, initializers.normal(0.02)
        embed = {"embedding_init": normal, "dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        self.query_tokens = nnx.Param(normal(rngs.params(), (config.num_queries, config.hidden), jnp.float32))
        self.word_embeddings = nnx.Embed(config.vocab_size, config.hidden, **embed)
        self.position_embeddings = nnx.Embed(config.max_positions, config.hidden, **embed)
        self.norm = layer_norm(config.hidden, BERT_EPSILON, dtype, rngs)
        self.layers = nnx.List(
            [QFormerLayer(config, layer in config.cross_layers, rngs) for layer in range(config.layers)]
        )

    def encode_patches(
        self,
        patches: Float[Array, "n N D"],
        mask: Bool[Array, "n N"],
        *,
        key: Key | None = None,
        attention: bool = False,
    ) -> tuple[Float[Array, "n Q H"], Float[Array, "n heads Q N"] | None]:
        """Queries after all layers over each bag of patches, and (when asked) the attention map.

        The map is the cross-attention of `config.map_layer`, before dropout.
        """
        start = jnp.broadcast_to(self.query_tokens[...], (patches.shape[0], *self.query_tokens.shape))
        x = dropout(self.norm(start.astype(patches.dtype)), self.config.dropout, subkey(key, self.config.layers))
        kept = None

        def step(layer, x, patches, mask, key):
            return layer.queries(x, patches, mask, key)

        step = jax.checkpoint(step) if self.config.remat else step
        for number, layer in enumerate(self.layers):
            x, weights = step(layer, x, patches, mask, subkey(key, number))
            if attention and number == self.config.map_layer:
                kept = weights
        return x, kept

    def encode_tokens(
        self,
        tokens: Int[Array, "P L"],
        segments: Int[Array, "P L"],
        positions: Int[Array, "P L"],
        *,
        key: Key | None = None,
    ) -> Float[Array, "P L H"]:
        """Last hidden states of packed texts: each token sees the tokens of its own segment; segment 0 is padding."""
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        x = dropout(self.norm(x), self.config.dropout, subkey(key, self.config.layers))
        mask = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)

        def step(layer, x, mask, key):
            return layer.texts(x, mask, key)

        step = jax.checkpoint(step) if self.config.remat else step
        for number, layer in enumerate(self.layers):
            x = step(layer, x, mask, subkey(key, number))
        return x
