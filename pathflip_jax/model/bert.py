"""BERT over packed texts: the text encoder of PathFLIP2, and the text path of the Q-Former.

Letters as in `pathflip_jax.model.pathflip`. A row of tokens holds several texts, each attending only to its own
segment.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.layers import BERT_EPS, Embedding, LayerNorm, Linear, LowRank
from pathflip_jax.ops.activations import gelu
from pathflip_jax.ops.attention import attend
from pathflip_jax.ops.dropout import dropout, split_key
from pathflip_jax.ops.recompute import recompute

# Tokens, segments (0 is padding) and positions of all rows of one length.
Rows = tuple[Int[Array, "G _ _"], Int[Array, "G _ _"], Int[Array, "G _ _"]]
TOKEN_TYPES = 2  # BERT has two sentence types; all texts here are of type 0


def gather_states(states: Float[Array, "G T H"], index: Int[Array, "G n"]) -> Float[Array, "G n H"]:
    """States gathered by their index among the tokens of their group."""
    return jnp.take_along_axis(states, index[..., None], axis=1)


class SelfAttention(nnx.Module):
    """BERT self-attention with output Linear, residual and LayerNorm, shared by queries and text."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.heads, self.rate = config.heads, config.dropout
        self.query = Linear(config.hidden, config.hidden, config.init, rngs)
        self.key = Linear(config.hidden, config.hidden, config.init, rngs)
        self.value = Linear(config.hidden, config.hidden, config.init, rngs)
        self.output = Linear(config.hidden, config.hidden, config.init, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)

    def among_queries(self, x: Float[Array, "... Q H"], key: Array | None) -> Float[Array, "... Q H"]:
        """Self-attention within each set of queries."""
        keys = split_key(key, 2)
        pooled, _ = attend(self.query(x), self.key(x), self.value(x), None, self.heads, self.rate, keys[0])
        return self._finish(x, pooled, keys[1])

    def within_texts(
        self,
        x: Float[Array, "G T H"],
        masks: Sequence[Bool[Array, "G _ _ _"]],
        key: Array | None,
        kept: Int[Array, "G n"] | None = None,
    ) -> Float[Array, "G kept H"]:
        """Masked self-attention within each row; the T tokens are all rows of a group, concatenated.

        Token t of a row attends to token u of the row where the row's mask is True. With `kept`, only those states are
        returned, [G, n, H] (see `gather_states`).
        """
        keys = split_key(key, 1 + len(masks))
        projected = [_rows(project(x), masks) for project in (self.query, self.key, self.value)]
        pooled = [
            attend(*qkv, mask[:, :, None], self.heads, self.rate, row_key)[0]
            for *qkv, mask, row_key in zip(*projected, masks, keys[1:], strict=True)
        ]
        pooled = jnp.concatenate([part.reshape(len(x), -1, x.shape[-1]) for part in pooled], axis=1)
        if kept is not None:
            x, pooled = gather_states(x, kept), gather_states(pooled, kept)
        return self._finish(x, pooled, keys[0])

    def _finish(self, x: Array, pooled: Array, key: Array | None) -> Array:
        return self.norm(x + dropout(self.output(pooled), self.rate, key))


def _rows(x: Float[Array, "G T H"], masks: Sequence[Bool[Array, "G _ _ _"]]) -> list[Float[Array, "G _ _ H"]]:
    """Split the tokens of a group into the rows that each mask applies to."""
    sizes = [mask.shape[1] * mask.shape[2] for mask in masks]
    parts = jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=1)
    return [part.reshape(*mask.shape[:3], x.shape[-1]) for part, mask in zip(parts, masks, strict=True)]


class FeedForward(nnx.Module):
    """BERT feed-forward block: Linear, exact GELU, Linear, residual, LayerNorm."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
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


class BertLayer(nnx.Module):
    """BERT layer: self-attention, then a feed-forward network."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs) -> None:
        self.self_attention = SelfAttention(config, rngs)
        self.ffn = FeedForward(config, rngs)

    def read_text(self, x: Array, masks: Sequence[Array], key: Array | None, kept: Array | None = None) -> Array:
        """Updated tokens [G, T, H], or with `kept` only those states, [G, n, H]."""
        keys = split_key(key, 2)
        with jax.named_scope("text_attention"):
            x = self.self_attention.within_texts(x, masks, keys[0], kept)
        with jax.named_scope("text_feed_forward"):
            return self.ffn(x, keys[1])


class Bert(nnx.Module):
    """Word and position embeddings, and layers of the given class."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layer: type[BertLayer] = BertLayer) -> None:
        self.config = config
        self.word_embeddings = Embedding(config.vocab_size, config.hidden, rngs)
        self.position_embeddings = Embedding(config.max_positions, config.hidden, rngs)
        self.norm = LayerNorm(config.hidden, BERT_EPS)
        self.layers = nnx.List([layer(config, index, rngs) for index in range(config.layers)])

    def read_text(
        self,
        rows: Sequence[Rows],
        text_index: Int[Array, "G n"],
        key: Array | None = None,
        pooling: Literal["mean", "cls", "mean_padded"] = "cls",
    ) -> Float[Array, "G n H"]:
        """Final state of each text: that of its [CLS], or the mean of its tokens.

        Rows as in `PathFLIP.encode_texts`. Attention is bidirectional, even if the BERT folder sets `is_decoder`
        (DESIGN section 3.2). For "cls" all other tokens are dropped before the feed-forward of the last layer, as they
        are never used. For "mean_padded" a row holds one text, and its padding counts in the mean.
        """
        keys = split_key(key, len(self.layers) + 1)
        tokens, segments, positions = zip(*rows, strict=True)
        tokens, positions = (
            jnp.concatenate([x.reshape(len(x), -1) for x in parts], axis=1) for parts in (tokens, positions)
        )
        with jax.named_scope("text_embedding"):
            x = self.embed(tokens, positions)  # [G, T, H]
            x = self.norm(x).astype(self.config.compute_dtype)
            x = dropout(x, self.config.dropout, keys[-1])
        if pooling == "mean_padded":  # padding attends to the words too
            masks = [jnp.broadcast_to((part > 0)[..., None, :], (*part.shape, part.shape[-1])) for part in segments]
        else:
            masks = [part[..., :, None] == part[..., None, :] for part in segments]
        *inner, last = zip(self.layers, keys[:-1], strict=True)
        for layer, layer_key in inner:
            x = self.run(type(layer).read_text, layer, x, masks, layer_key)
        if pooling == "cls":
            return self.run(type(last[0]).read_text, last[0], x, masks, last[1], text_index)
        x = self.run(type(last[0]).read_text, last[0], x, masks, last[1])
        return _mean_of_texts(x, segments, positions, text_index, padded=pooling == "mean_padded")

    def embed(self, tokens: Int[Array, "G T"], positions: Int[Array, "G T"]) -> Float[Array, "G T H"]:
        """Sum of word and position embeddings, before normalisation."""
        return self.word_embeddings(tokens) + self.position_embeddings(positions)

    def run(self, method, *arguments):
        """method(*arguments), rematerialised in the backward pass if the config has `remat`."""
        return (jax.checkpoint(method) if self.config.remat else method)(*arguments)


def _mean_of_texts(
    states: Float[Array, "G T H"],
    segments: Sequence[Int[Array, "G _ _"]],
    positions: Int[Array, "G T"],
    text_index: Int[Array, "G n"],
    padded: bool,
) -> Float[Array, "G n H"]:
    """Mean over the tokens of each text; with `padded`, for one text per row, over the full length of the row."""
    starts = jnp.arange(states.shape[1])[None] - positions  # start of each token's text
    own = starts[:, None] == text_index[..., None]  # [G, n, T]
    if not padded:
        own &= jnp.concatenate([part.reshape(len(part), -1) for part in segments], axis=1)[:, None] > 0
    own = own.astype(states.dtype)
    count = jnp.maximum(own.astype(jnp.float32).sum(-1, keepdims=True), 1)
    return (jnp.einsum("gnt,gth->gnh", own, states, preferred_element_type=jnp.float32) / count).astype(states.dtype)


class TextEncoder(Bert):
    """Complete BERT as published, with token types, and with LoRA at every projection if the config has a rank."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.type_embeddings = Embedding(TOKEN_TYPES, config.hidden, rngs)
        if config.text_lora_rank:
            for layer in self.layers:
                attention = layer.self_attention
                for linear in (attention.query, attention.key, attention.value, attention.output):
                    linear.lora = _low_rank(config, linear, rngs)
                for linear in (layer.ffn.intermediate, layer.ffn.output):
                    linear.lora = _low_rank(config, linear, rngs)

    def embed(self, tokens: Int[Array, "G T"], positions: Int[Array, "G T"]) -> Float[Array, "G T H"]:
        """Sum of word, position and type-0 embeddings, before normalisation."""
        words = super().embed(tokens, positions)
        return words + lax.broadcast_to_rank(self.type_embeddings.embedding[0], words.ndim)


def _low_rank(config: ModelConfig, linear: Linear, rngs: nnx.Rngs) -> LowRank:
    return LowRank(*linear.kernel.shape, config.text_lora_rank, config.text_lora_alpha, 0.0, rngs)
