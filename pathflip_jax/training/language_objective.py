"""Objective of the language stage: cross-entropy of the responses in sequences about slides.

Letters as in `llm/adapter.py`: B sequences, each about one slide of R regions; T tokens; D the aligner's width, W the
decoder's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Int, Int32

from pathflip_jax.llm.adapter import SlideLanguageModel, is_trained
from pathflip_jax.llm.config import DecoderConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import Key
from pathflip_jax.ops.dropout import split_key
from pathflip_jax.training.stage import Stage

LOSS_CHUNK = 128  # tokens whose logits are in memory simultaneously


class LanguageBatch(NamedTuple):
    """Input of a step of the language stage: sequences about slides, padded on the right.

    `mask` is True at real tokens, `response` at target tokens, each predicted from the preceding ones. If the features
    are on the devices, `patches` are their row numbers (`data.batches.pipeline.look_up`); with precomputed embeddings,
    they are the embeddings [slide; regions].
    """

    patches: Float16[Array, "B R S F"] | Int32[Array, "B R S"] | Float[Array, "B 1+R D"]
    patch_mask: Bool[Array, "B R S"] | Bool[Array, "B 1+R"]
    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    response: Bool[Array, "B T"]


def response_losses(
    decoder: Decoder, states: Float[Array, "B T W"], tokens: Int[Array, "B T"], response: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Sum of the cross-entropies of each sequence's response tokens, each predicted from the preceding state.

    Computed `LOSS_CHUNK` tokens at a time and rematerialised in the backward pass: the logits of all tokens, [B, T, V],
    are never in memory.
    """
    B, T, W = states.shape
    states, targets, learnt = states[:, :-1], tokens[:, 1:], response[:, 1:]
    short = -(T - 1) % LOSS_CHUNK
    pad = ((0, 0), (0, short))
    states, targets, learnt = jnp.pad(states, (*pad, (0, 0))), jnp.pad(targets, pad), jnp.pad(learnt, pad)

    @jax.checkpoint
    def chunk(decoder: Decoder, states: Array, targets: Array, learnt: Array) -> Array:
        logits = decoder.logits(states)  # [B, LOSS_CHUNK, V]
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(learnt, jax.nn.logsumexp(logits, axis=-1) - chosen, 0).sum(1)

    def chunks(x: Array) -> Array:
        return x.reshape(B, -1, LOSS_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    def add(total: Array, x: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + chunk(decoder, *x), None

    total, _ = jax.lax.scan(add, jnp.zeros(B), (chunks(states), chunks(targets), chunks(learnt)))
    return total


def language_stage(trains: tuple[str, ...]) -> Stage:
    """Language stage: mean cross-entropy over all response tokens of the batch (DESIGN section 7).

    `trains` names the trained `PARTS`. Frozen parts have no dropout. Raises ValueError for an unknown part.
    """
    trainable = is_trained(trains)

    def encode(model: SlideLanguageModel, batch: LanguageBatch, key: Key | None) -> dict[str, jax.Array]:
        slide_key, decoder_key = split_key(key, 2)
        with jax.named_scope("slides"):
            if batch.patches.ndim == 3:
                soft = model.project(batch.patches)
            else:
                slide_key = slide_key if "aligner" in trains else None
                soft = model.soft_tokens(batch.patches, batch.patch_mask, key=slide_key)
        with jax.named_scope("decoder"):
            embeds = model.embed(batch.tokens, soft)
            states, _ = model.decoder.states(
                inputs_embeds=embeds, mask=batch.mask, key=decoder_key if "lora" in trains else None
            )
        with jax.named_scope("response"):
            losses = response_losses(model.decoder, states, batch.tokens, batch.response)
        return {"loss": losses, "tokens": batch.response[:, 1:].sum(1).astype(jnp.float32)}

    def objective(model: SlideLanguageModel, embeddings: dict[str, jax.Array], batch: LanguageBatch, key: Key):
        tokens = embeddings["tokens"].sum()
        loss = embeddings["loss"].sum() / jnp.maximum(tokens, 1)
        return loss, {"loss": loss, "response_tokens": tokens}

    return Stage(encode, objective, trainable)


def language_flops(
    aligner: PathFLIPConfig, decoder: DecoderConfig, trains: tuple[str, ...]
) -> Callable[[Any], jax.Array]:
    """`model_flops(batch)` of the stage, on real tokens and valid patches; frozen parts have no weight gradients."""
    from pathflip_jax.model.flops import Work, parts

    inner, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    layer = decoder.width * (2 * inner + 2 * kv + 3 * decoder.intermediate)
    matrices = decoder.layers * layer
    passes = 3 if "decoder" in trains else 2  # forward, input gradients, and weight gradients

    def count(batch: LanguageBatch) -> jax.Array:
        tokens = batch.mask.sum(1).astype(jnp.float32)
        answered = batch.response.sum().astype(jnp.float32)
        products = matrices * tokens.sum() + decoder.width * decoder.vocab_size * answered
        attention = decoder.layers * inner * jnp.square(tokens).sum()  # causal: half of two products
        if batch.patches.ndim == 3:
            return 2 * passes * products + 2 * 3 * attention
        regions = batch.patch_mask.any(-1).sum().astype(jnp.float32)
        patches = batch.patch_mask.sum().astype(jnp.float32)
        slides = parts(aligner, Work(len(batch.tokens), regions, patches, 0, 0), 4, training=False)
        shown = sum(part.operations for part in slides) * (3 if "aligner" in trains else 1)
        return 2 * passes * products + 2 * 3 * attention + shown

    return count
