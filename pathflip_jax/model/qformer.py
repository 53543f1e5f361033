"""The Q-Former: a BERT whose learned queries read patches, and which reads text with the same weights.

Used for the slide, for its regions and for text (DESIGN section 3.2). Letters as in
`pathflip_jax.model.pathflip`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.attention import (
    BERT_EPS,
    INITS,
    Embedding,
    LayerNorm,
    Linear,
    attend,
    dropout,
    gelu,
    recompute,
    split_key,
)
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.cross_attention import CrossAttention


def pick(states: Float[Array, "G T H"], index: Int[Array, "G n"]) -> Float[Array, "G n H"]:
    """States by their place among the tokens of their group."""
    return jnp.take_along_axis(states, index[..., None], axis=1)


class SelfAttention(nnx.Module):
    """BERT self-attention with its output Linear, residual and LayerNorm; queries and text share it."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.rate = config.heads, config.dropout
        self.query = Linear(config.hidden, config.hidden, config.init, rngs)
        self.key = Linear(config.hidden, config.hidden, config.init, rngs)
        self.value = Linear(config.hidden, config.hidden, config.init, rngs)
        self.output = Linear(config.hidden, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def among_queries(self, x: Float[Array, "... Q H"], key: Array | None) -> Float[Array, "... Q H"]:
        """Every query of a set sees all of its set."""
        keys = split_key(key, 2)
        pooled, _ = attend(self.query(x), self.key(x), self.value(x), None, self.heads, self.rate, keys[0])
        return self._finish(x, pooled, keys[1])

    def within_texts(
        self,
        x: Float[Array, "G T H"],
        masks: Sequence[Bool[Array, "G P L L"]],
        key: Array | None,
        kept: Int[Array, "G n"] | None = None,
    ) -> Float[Array, "G T H"]:
        """Token t of a row sees token u of it where the row's mask says so; the T tokens are all rows, end to end.

        With `kept`, only those states come out, [G, n, H] (see `pick`).
        """
        keys = split_key(key, 1 + len(masks))
        projected = [_rows(project(x), masks) for project in (self.query, self.key, self.value)]
        pooled = [
            attend(*qkv, mask[:, :, None], self.heads, self.rate, row_key)[0]
            for *qkv, mask, row_key in zip(*projected, masks, keys[1:], strict=True)
        ]
        pooled = jnp.concatenate([part.reshape(len(x), -1, x.shape[-1]) for part in pooled], axis=1)
        if kept is not None:
            x, pooled = pick(x, kept), pick(pooled, kept)
        return self._finish(x, pooled, keys[0])

    def _finish(self, x: Array, pooled: Array, key: Array | None) -> Array:
        return self.norm(x + dropout(self.output(pooled), self.rate, key))


def _rows(x: Float[Array, "G T H"], masks: Sequence[Bool[Array, "G P L L"]]) -> list[Float[Array, "G P L H"]]:
    """Cut the tokens of a group into the rows that each mask is for."""
    sizes = [mask.shape[1] * mask.shape[2] for mask in masks]
    parts = jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=1)
    return [part.reshape(*mask.shape[:3], x.shape[-1]) for part, mask in zip(parts, masks, strict=True)]


class FeedForward(nnx.Module):
    """Linear, exact GELU, Linear, residual, LayerNorm."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.intermediate = Linear(config.hidden, config.intermediate, config.init, rngs)
        self.output = Linear(config.intermediate, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def __call__(self, x: Float[Array, "... H"], key: Array | None) -> Float[Array, "... H"]:
        """[..., H] -> [..., H]."""
        outer = recompute(_contract, self.intermediate(x), self.output)
        return self.norm(x + dropout(outer, self.rate, key))


def _contract(inner: Array, output: Linear) -> Array:
    return output(gelu(inner))


class Layer(nnx.Module):
    """One BERT layer: self-attention for all, cross-attention for the queries, a feed-forward for each kind."""

    def __init__(self, config: PathFLIPConfig, index: int, rngs: nnx.Rngs) -> None:
        self.self_attention = SelfAttention(config, rngs)
        if index in config.cross_layers:
            self.cross_attention = CrossAttention(config, rngs)
        self.ffn = FeedForward(config, rngs)
        # A copy, as in the released code: queries start from what BERT does to words.
        self.query_ffn = jax.tree.map(jnp.copy, self.ffn)

    def read_patches(
        self, x: Array, patches: Array, mask: Array, key: Array | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Queries [B, 1+R, Q, H] through the layer, and what slide and regions attended to, if they did here."""
        keys = split_key(key, 3)
        maps = None
        with jax.named_scope("query_self_attention"):
            x = self.self_attention.among_queries(x, keys[0])
        if hasattr(self, "cross_attention"):
            with jax.named_scope("cross_attention"):
                x, *looked = self.cross_attention(x, patches, mask, keys[1])
                maps = tuple(looked)
        with jax.named_scope("query_feed_forward"):
            return self.query_ffn(x, keys[2]), maps

    def read_text(self, x: Array, masks: Sequence[Array], key: Array | None, kept: Array | None = None) -> Array:
        """Tokens [G, T, H] through the layer; with `kept` only those states come out, [G, n, H]."""
        keys = split_key(key, 2)
        with jax.named_scope("text_attention"):
            x = self.self_attention.within_texts(x, masks, keys[0], kept)
        with jax.named_scope("text_feed_forward"):
            return self.ffn(x, keys[1])


class QueryStates(NamedTuple):
    """Final query states, and the cross-attention of `PathFLIPConfig.map_layer`, None unless asked for."""

    slide: Float[Array, "B Q H"]
    regions: Float[Array, "B R Q H"]
    slide_attention: Float[Array, "B heads Q R S"] | None
    region_attention: Float[Array, "B heads Q R S"] | None


class QFormer(nnx.Module):
    """One set of weights for slide, regions and text."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.query_tokens = nnx.Param(INITS["bert"](rngs.params(), (config.num_queries, config.hidden), jnp.float32))
        self.word_embeddings = Embedding(config.vocab_size, config.hidden, rngs)
        self.position_embeddings = Embedding(config.max_positions, config.hidden, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)
        self.layers = nnx.List([Layer(config, index, rngs) for index in range(config.layers)])

    def read_patches(
        self,
        patches: Float[Array, "B R S D"],
        mask: Bool[Array, "B R S"],
        key: Array | None = None,
        attention: bool = False,
    ) -> QueryStates:
        """Let the queries read all patches of each slide and, beside that, the patches of each of its regions.

        Both passes share every weight, so they run as one: set 0 of the queries is the slide's, sets 1..R are the
        regions'.
        """
        keys = split_key(key, len(self.layers) + 1)
        B, R, S, _ = patches.shape
        x = self.norm(self.query_tokens[...])[None, None]
        if key is not None:
            # Without dropout all sets are equal until they see patches, and layer 0 broadcasts its rows itself.
            x = dropout(jnp.broadcast_to(x, (B, 1 + R, *x.shape[2:])), self.config.dropout, keys[-1])
        x = x.astype(patches.dtype)
        shown = None
        for index, layer in enumerate(self.layers):
            x, maps = self._run(Layer.read_patches, layer, x, patches, mask, keys[index])
            if attention and index == self.config.map_layer:
                shown = maps
        slide_map = region_map = None
        if shown is not None:
            slide_map = shown[0].reshape(*shown[0].shape[:-1], R, S)
            region_map = jnp.moveaxis(shown[1], 1, 3)
        return QueryStates(x[:, 0], x[:, 1:], slide_map, region_map)

    def read_text(
        self,
        rows: Sequence[tuple[Int[Array, "G P L"], Int[Array, "G P L"], Int[Array, "G P L"]]],
        text_index: Int[Array, "G n"],
        key: Array | None = None,
    ) -> Float[Array, "G n H"]:
        """The final state of each text's [CLS]; rows hold several texts, each seeing only its own segment.

        Rows as in `PathFLIP.encode_texts`. Attention is bidirectional, although a BERT folder may say `is_decoder`
        (DESIGN section 3.2). All other tokens leave before the feed-forward of the last layer: nobody reads them.
        """
        keys = split_key(key, len(self.layers) + 1)
        tokens, segments, positions = zip(*rows, strict=True)
        tokens, positions = (
            jnp.concatenate([x.reshape(len(x), -1) for x in parts], axis=1) for parts in (tokens, positions)
        )
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)  # [G, T, H]
        x = self.norm(x).astype(self.config.compute_dtype)
        x = dropout(x, self.config.dropout, keys[-1])
        masks = [part[..., :, None] == part[..., None, :] for part in segments]
        for layer, layer_key in zip(self.layers[:-1], keys[:-2], strict=True):
            x = self._run(Layer.read_text, layer, x, masks, layer_key)
        return self._run(Layer.read_text, self.layers[-1], x, masks, keys[-2], text_index)

    def _run(self, method, *arguments):
        return (jax.checkpoint(method) if self.config.remat else method)(*arguments)
