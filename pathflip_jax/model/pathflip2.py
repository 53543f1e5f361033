"""PathFLIP2, the authors' follow-up network: tokens attend to all patches of a slide, then patches to the tokens.

Letters as in `pathflip_jax.model.pathflip`. There are no regions: every patch has the role of a region in PathFLIP, so
R is N here. Coordinates are not used. Source: github.com/cyclexfy/PathFLIP2, with numerical parity for its checkpoints
(`tests/parity.py`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.bert import Rows, TextEncoder
from pathflip_jax.model.config import PathFLIP2Config
from pathflip_jax.model.layers import LayerNorm, Linear, MultiheadAttention, RMSNorm, initial
from pathflip_jax.model.pathflip import TORCH_EPS, SlideEncoding
from pathflip_jax.ops.activations import gelu
from pathflip_jax.ops.attention import softmax_where
from pathflip_jax.ops.dropout import dropout, split_key

RMS_EPS = float(np.finfo(np.float32).eps)  # the default of torch.nn.RMSNorm
PATCHES_AT_ONCE = 8192  # patches of a slide per chunk in the patch decoder: limits memory, does not change the result
RESIDUAL = "kept"  # checkpoint name of the residuals that a block saves; all else is rematerialised


class Projection(nnx.Module):
    """Projection head: Linear, RMSNorm, dropout."""

    def __init__(self, inputs: int, outputs: int, rate: float, rngs: nnx.Rngs) -> None:
        self.rate = rate
        self.linear = Linear(inputs, outputs, "torch", rngs)
        self.norm = RMSNorm(outputs, RMS_EPS)

    def __call__(self, x: Float[Array, "... I"], key: Array | None = None) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]."""
        return dropout(self.norm(self.linear(x)), self.rate, key)


class Block(nnx.Module):
    """Pre-norm attention of x over y, then a feed-forward network; self-attention has one norm for all three inputs."""

    def __init__(self, config: PathFLIP2Config, rngs: nnx.Rngs, *, itself: bool = False) -> None:
        D = config.embed_dim
        self.rate = config.token_dropout
        self.attention = MultiheadAttention(D, config.token_heads, "torch", rngs)
        self.query_norm = RMSNorm(D, RMS_EPS)
        self.key_norm = None if itself else RMSNorm(D, RMS_EPS)
        self.norm = RMSNorm(D, RMS_EPS)
        self.intermediate = Linear(D, 4 * D, "torch", rngs)
        self.output = Linear(4 * D, D, "torch", rngs)

    def __call__(
        self,
        x: Float[Array, "B C D"],
        y: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        key: Array | None,
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B heads C T"]]:
        """Updated x, and its attention weights; masked rows of y are excluded as keys."""
        keys = split_key(key, 3)
        read = (self.query_norm if self.key_norm is None else self.key_norm)(y)
        pooled, weights = self.attention(self.query_norm(x), read, read, mask, self.rate, keys[0])
        x = checkpoint_name(x + pooled, RESIDUAL)
        inner = checkpoint_name(self.intermediate(self.norm(x)), RESIDUAL)
        outer = self.output(dropout(gelu(inner), self.rate, keys[1]))
        return x + dropout(outer, self.rate, keys[2]), weights


class TokenLayer(nnx.Module):
    """Cross-attention of the tokens to the patches, then self-attention among the tokens."""

    def __init__(self, config: PathFLIP2Config, rngs: nnx.Rngs) -> None:
        self.cross = Block(config, rngs)
        self.among = Block(config, rngs, itself=True)

    def __call__(
        self, tokens: Float[Array, "B Q D"], patches: Float[Array, "B N D"], mask: Bool[Array, "B N"], key: Array | None
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B heads Q N"]]:
        """Updated tokens, and their attention over the patches."""
        keys = split_key(key, 2)
        tokens, weights = self.cross(tokens, patches, mask, keys[0])
        tokens, _ = self.among(tokens, tokens, jnp.ones(tokens.shape[:2], bool), keys[1])
        return tokens, weights


class SoftTopK(nnx.Module):
    """Softmax pooling of each slide's k patches of highest cosine to a text, without parameters.

    All patches tied with the k-th are included, whereas torch.topk picks among them.
    """

    def __init__(self, config: PathFLIP2Config) -> None:
        self.k, self.temperature = config.top_k, config.topk_temperature

    def __call__(
        self, texts: Float[Array, "B C D"], patches: Float[Array, "B N D"], mask: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C N"]]:
        """Text-conditioned embedding of every text, and its softmax over all patches of the slide."""
        cosines = jnp.einsum("bcd,bnd->bcn", _unit(texts), _unit(patches), precision="highest")
        scores, mask = cosines / self.temperature, mask[:, None]
        ranked = lax.stop_gradient(jnp.where(mask, scores, -jnp.inf))
        least = lax.top_k(ranked, min(self.k, ranked.shape[-1]))[0][..., -1:]
        pooled = jnp.einsum("bcn,bnd->bcd", softmax_where(scores, mask & (ranked >= least)), patches)
        return pooled, softmax_where(scores, mask)


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class AttentionPooling(nnx.Module):
    """Text-conditioned attention pooling of each slide's patches, as in FLAIR (arXiv 2412.03561)."""

    def __init__(self, config: PathFLIP2Config, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.query_norm, self.key_norm, self.value_norm = (LayerNorm(D, TORCH_EPS) for _ in range(3))
        self.attention = MultiheadAttention(D, config.text_region_heads, "torch", rngs)

    def __call__(
        self, texts: Float[Array, "B C D"], patches: Float[Array, "B N D"], mask: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C N"]]:
        """Text-conditioned embedding of every text, and its weights over the patches, averaged over heads."""
        read = self.query_norm(texts), self.key_norm(patches), self.value_norm(patches)
        pooled, weights = self.attention(*read, mask)
        return pooled, weights.mean(1)


class PatchStates(NamedTuple):
    """Tokens and patches of a slide before projection, and the attention of the last token layer."""

    tokens: Float[Array, "B Q D"]
    patches: Float[Array, "B N D"]
    attention: Float[Array, "B heads Q N"]


class PathFLIP2(nnx.Module):
    """PathFLIP2 alignment model: a pytree of float32 parameters, for use with plain JAX transforms.

    Slides and captions share one space, patches and subcaptions another, each with separate projections.
    """

    def __init__(self, config: PathFLIP2Config, rngs: nnx.Rngs) -> None:
        self.config = config
        D, H = config.embed_dim, config.hidden
        self.patch_projection = Projection(config.feature_dim, D, config.dropout, rngs)
        self.tokens = nnx.Param(initial(jax.random.normal, (1 + config.tokens, D), rngs))
        self.layers = nnx.List([TokenLayer(config, rngs) for _ in range(config.token_layers)])
        self.patch_decoder = Block(config, rngs)
        self.slide_projection = Projection(D, D, config.dropout, rngs)
        self.region_projection = Projection(D, D, config.dropout, rngs)
        self.text_encoder = TextEncoder(config, rngs)
        self.text_projection = Projection(H, D, config.dropout, rngs)
        self.region_text_projection = Projection(H, D, config.dropout, rngs)
        head = config.region_head
        self.text_region = SoftTopK(config) if head == "soft_topk" else AttentionPooling(config, rngs)
        self.slide_scale, self.region_scale = (nnx.Param(jnp.float32(config.scale_init)) for _ in range(2))
        self.slide_bias, self.region_bias = (nnx.Param(jnp.float32(config.bias_init)) for _ in range(2))

    def encode_slides(
        self,
        patches: Float[Array, "B R S F"],
        patch_mask: Bool[Array, "B R S"],
        *,
        key: Array | None = None,
        attention: bool = False,
    ) -> SlideEncoding:
        """Embed slides and, as their regions, their R*S patches, in the order given.

        Patches may have any float dtype. The content of masked slots has no effect, NaN included.
        """
        B, R, S, F = patches.shape
        slide_key, region_key, key = split_key(key, 3)
        states = self.read_patches(patches.reshape(B, R * S, F), patch_mask.reshape(B, R * S), key=key)
        mask = patch_mask.reshape(B, R * S)
        slide = self.slide_projection(states.tokens[:, 0], slide_key).astype(jnp.float32)
        regions = self.region_projection(states.patches, region_key).astype(jnp.float32)
        regions = jnp.where(mask[..., None], regions, 0)
        slide_map = states.attention.reshape(*states.attention.shape[:-1], R, S) if attention else None
        return SlideEncoding(slide, regions, mask, slide_map, None)

    def read_patches(
        self, patches: Float[Array, "B N F"], mask: Bool[Array, "B N"], *, key: Array | None = None
    ) -> PatchStates:
        """Tokens and patches after attention to each other, before projection into the spaces shared with texts."""
        keys = split_key(key, 2 + len(self.layers))
        x = jnp.where(mask[..., None], patches, 0).astype(self.config.compute_dtype)
        with jax.named_scope("patch_projection"):
            x = self.patch_projection(x, keys[0])
        tokens = jnp.broadcast_to(self.tokens[...].astype(x.dtype), (len(x), *self.tokens.shape))
        weights = None
        with jax.named_scope("cross_attention"):
            for layer, layer_key in zip(self.layers, keys[2:], strict=True):
                tokens, weights = self._run(TokenLayer.__call__, layer, tokens, x, mask, layer_key)
        with jax.named_scope("patch_decoder"):
            return PatchStates(tokens, self._read_tokens(x, tokens, keys[1]) + x, weights)

    def _read_tokens(
        self, x: Float[Array, "B N D"], tokens: Float[Array, "B Q D"], key: Array | None
    ) -> Float[Array, "B N D"]:
        """Patches after attention to the tokens; each patch is independent, so large slides are processed in chunks."""
        token_mask = jnp.ones(tokens.shape[:2], bool)

        def read(x: Array, key: Array | None) -> Array:
            return self.patch_decoder(x, tokens, token_mask, key)[0]

        B, N, D = x.shape
        if N <= PATCHES_AT_ONCE:
            return self._run(read, x, key)
        parts = -(-N // PATCHES_AT_ONCE)
        size = -(-N // parts)
        cut = jnp.pad(x, ((0, 0), (0, parts * size - N), (0, 0))).reshape(B, parts, size, D).swapaxes(0, 1)
        keys = None if key is None else jax.random.split(key, parts)
        checkpointed = jax.checkpoint(read, policy=jax.checkpoint_policies.save_only_these_names(RESIDUAL))
        found = lax.map(lambda part: checkpointed(*part), (cut, keys))
        return found.swapaxes(0, 1).reshape(B, parts * size, D)[:, :N]

    def read_texts(
        self, rows: Sequence[Rows], text_index: Int[Array, "G n"], *, key: Array | None = None
    ) -> Float[Array, "G n H"]:
        """Pooled state of each text, as in `PathFLIP.read_texts`."""
        return self.text_encoder.read_text(rows, text_index, key, self.config.text_pooling)

    def project_texts(
        self, states: Float[Array, "... H"], level: Literal["slide", "region"], *, key: Array | None = None
    ) -> Float[Array, "... D"]:
        """Text states projected into the space of slides or of regions (patches)."""
        projection = self.text_projection if level == "slide" else self.region_text_projection
        return projection(states, key).astype(jnp.float32)

    def encode_texts(
        self,
        rows: Sequence[Rows],
        text_index: Int[Array, "G n"],
        *,
        level: Literal["slide", "region"] = "slide",
        key: Array | None = None,
    ) -> Float[Array, "G n D"]:
        """Embed packed texts in the space of slides or of regions, as `PathFLIP.encode_texts`."""
        keys = split_key(key, 2)
        return self.project_texts(self.read_texts(rows, text_index, key=keys[0]), level, key=keys[1])

    def _run(self, method, *arguments):
        return (jax.checkpoint(method) if self.config.remat else method)(*arguments)
