"""The Q-Former: a BERT whose learned queries read patches, and which reads text with the same weights.

Used for the slide, for its regions and for text (DESIGN section 3.2). Letters as in
`pathflip_jax.model.pathflip`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.attention import INITS, Embedding, LayerNorm, Linear, attend, dropout, softmax_where, split_key
from pathflip_jax.model.config import PathFLIPConfig

BERT_EPS = 1e-12


def pick(states: Float[Array, "P L H"], index: Int[Array, "G n"]) -> Float[Array, "G n H"]:
    """States by their flat position in the tokens of their group; the P rows are G groups of equally many."""
    return jnp.take_along_axis(states.reshape(len(index), -1, states.shape[-1]), index[..., None], axis=1)


class SelfAttention(nnx.Module):
    """BERT self-attention with its output Linear, residual and LayerNorm; queries and text share it."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.rate = config.heads, config.dropout
        self.query = Linear(config.hidden, config.hidden, config.init, rngs)
        self.key = Linear(config.hidden, config.hidden, config.init, rngs)
        self.value = Linear(config.hidden, config.hidden, config.init, rngs)
        self.output = Linear(config.hidden, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def __call__(
        self,
        x: Float[Array, "... T H"],
        mask: Bool[Array, "... T T"] | None,
        key: Array | None,
        kept: Int[Array, "G n"] | None = None,
    ) -> Float[Array, "... T H"]:
        """[..., T, H] -> [..., T, H]; row t sees column u where the mask says so, all of them without one.

        With `kept`, only those states come out, [G, n, H] (see `pick`).
        """
        keys = split_key(key, 2)
        pooled, _ = attend(self.query(x), self.key(x), self.value(x), mask, self.heads, self.rate, keys[0])
        if kept is not None:
            x, pooled = pick(x, kept), pick(pooled, kept)
        return self.norm(x + dropout(self.output(pooled), self.rate, keys[1]))


class CrossAttention(nnx.Module):
    """Queries of the slide and of each region pool the patches, in the order of operations that costs least.

    (W_k x)·q = x·(W_k^T q): absorbing the key projection into the queries turns them into Q*heads rows of width D
    over the patch embeddings themselves, which slide, regions and heads share; the value projection follows the
    pooling. Nothing of width H per patch is computed or kept. It is exact: the key bias adds the same to every
    score of a row and cancels in the softmax; the value bias comes once per row, times the sum of its probabilities
    (one, but for dropout, and zero where there is no patch).
    """

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.rate = config.heads, config.dropout
        self.query = Linear(config.hidden, config.hidden, config.init, rngs)
        self.key = Linear(config.embed_dim, config.hidden, config.init, rngs)
        self.value = Linear(config.embed_dim, config.hidden, config.init, rngs)
        self.output = Linear(config.hidden, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def __call__(
        self,
        x: Float[Array, "B 1+R Q H"],
        patches: Float[Array, "B R S D"],
        mask: Bool[Array, "B R S"],
        key: Array | None,
    ) -> tuple[Float[Array, "B 1+R Q H"], Float[Array, "B heads Q R*S"], Float[Array, "B R heads Q S"]]:
        """The queries after looking, and where the slide and each region looked (before dropout)."""
        keys = split_key(key, 3)
        B, R, S, D = patches.shape
        heads = (self.heads, -1)
        query = self.query(x)
        query = query.reshape(*query.shape[:-1], *heads) / math.sqrt(query.shape[-1] // self.heads)
        key_kernel = self.key.kernel[...].astype(x.dtype).reshape(D, *heads)
        rows = jnp.einsum("...qhd,Dhd->...hqD", query, key_kernel)  # [B, 1+R, heads, Q, D]
        rows = jnp.broadcast_to(rows, (B, 1 + R, *rows.shape[2:]))

        pooled, total, slide = self._pool(rows[:, 0], patches.reshape(B, R * S, D), mask.reshape(B, R * S), keys[0])
        region_pooled, region_total, regions = self._pool(rows[:, 1:], patches, mask, keys[1])
        pooled = jnp.concatenate([pooled[:, None], region_pooled], axis=1)  # [B, 1+R, heads, Q, D]
        total = jnp.concatenate([total[:, None], region_total], axis=1)  # [B, 1+R, heads, Q]

        value_kernel = self.value.kernel[...].astype(x.dtype).reshape(D, *heads)
        value_bias = self.value.bias[...].astype(x.dtype).reshape(heads)
        context = jnp.einsum("bghqD,Dhd->bgqhd", pooled, value_kernel)
        context += jnp.einsum("bghq,hd->bgqhd", total, value_bias)
        context = context.reshape(*context.shape[:3], -1)  # [B, 1+R, Q, H]
        return self.norm(x + dropout(self.output(context), self.rate, keys[2])), slide, regions

    def _pool(self, rows: Array, patches: Array, mask: Array, key: Array | None) -> tuple[Array, Array, Array]:
        """Softmax of all heads and queries over the patches: what they pool, total weight, probabilities."""
        scores = jnp.einsum("...hqD,...nD->...hqn", rows, patches, preferred_element_type=jnp.float32)
        weights = softmax_where(scores, mask[..., None, None, :])
        kept = dropout(weights.astype(patches.dtype), self.rate, key)
        return jnp.einsum("...hqn,...nD->...hqD", kept, patches), kept.sum(-1), weights


class FeedForward(nnx.Module):
    """Linear, exact GELU, Linear, residual, LayerNorm."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.intermediate = Linear(config.hidden, config.intermediate, config.init, rngs)
        self.output = Linear(config.intermediate, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def __call__(self, x: Float[Array, "... H"], key: Array | None) -> Float[Array, "... H"]:
        """[..., H] -> [..., H]."""
        inner = jax.nn.gelu(self.intermediate(x), approximate=False)
        return self.norm(x + dropout(self.output(inner), self.rate, key))


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
        x, maps = self.self_attention(x, None, keys[0]), None
        if hasattr(self, "cross_attention"):
            x, *looked = self.cross_attention(x, patches, mask, keys[1])
            maps = tuple(looked)
        return self.query_ffn(x, keys[2]), maps

    def read_text(self, x: Array, mask: Array, key: Array | None, kept: Array | None = None) -> Array:
        """Rows of tokens [P, L, H] through the layer; with `kept` only those states come out, [G, n, H]."""
        keys = split_key(key, 2)
        return self.ffn(self.self_attention(x, mask, keys[0], kept), keys[1])


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
        x = self.norm(self.query_tokens[...]).astype(patches.dtype)[None, None]
        if key is not None:
            # Without dropout all sets are equal until they see patches, and layer 0 broadcasts its rows itself.
            x = dropout(jnp.broadcast_to(x, (B, 1 + R, *x.shape[2:])), self.config.dropout, keys[-1])
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
        tokens: Int[Array, "G P L"],
        segments: Int[Array, "G P L"],
        positions: Int[Array, "G P L"],
        text_index: Int[Array, "G n"],
        key: Array | None = None,
    ) -> Float[Array, "G n H"]:
        """The final state of each text's [CLS]; rows hold several texts, each seeing only its own segment.

        Attention is bidirectional, although a BERT folder may say `is_decoder` (DESIGN section 3.2). All other
        tokens leave before the feed-forward of the last layer: nobody reads them.
        """
        tokens, segments, positions = (x.reshape(-1, x.shape[-1]) for x in (tokens, segments, positions))
        keys = split_key(key, len(self.layers) + 1)
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        x = self.norm(x).astype(self.config.compute_dtype)
        x = dropout(x, self.config.dropout, keys[-1])
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]  # [P, 1, L, L]
        for layer, layer_key in zip(self.layers[:-1], keys[:-2], strict=True):
            x = self._run(Layer.read_text, layer, x, mask, layer_key)
        return self._run(Layer.read_text, self.layers[-1], x, mask, keys[-2], text_index)

    def _run(self, method, *arguments):
        return (jax.checkpoint(method) if self.config.remat else method)(*arguments)
