"""PathFLIP: a joint embedding space of slides and reports, at slide and region level (DESIGN section 3).

    B  slides in the batch            F  width of a patch feature
    R  regions of a slide             D  joint embedding width
    S  patch slots of a region        H  BERT hidden width
    N  patches of a slide (R*S)       Q  query tokens
    K  subcaptions of a slide         T  text tokens
    C  texts shown to one slide       G  text groups: P rows of L tokens for each of some L, n texts in each group

Padding is masked everywhere: a padded slide gives the same outputs and gradients as the unpadded one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.bert import Rows
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import LayerNorm, Linear, MultiheadAttention
from pathflip_jax.model.qformer import QFormer
from pathflip_jax.ops.dropout import dropout, split_key
from pathflip_jax.ops.platform import fusion_barrier
from pathflip_jax.ops.recompute import recompute

TORCH_EPS = 1e-5


class SlideEncoding(NamedTuple):
    """A batch of slides in the joint space; attention maps are None unless requested.

    Padded regions are zero rows, False in `region_mask`.
    """

    slide: Float[Array, "B D"]
    regions: Float[Array, "B R D"]
    region_mask: Bool[Array, "B R"]
    slide_attention: Float[Array, "B heads Q R S"] | None
    region_attention: Float[Array, "B heads Q R S"] | None


class PatchProjection(nnx.Module):
    """Projection of patch features F -> D: one Linear, or the MLP variant with two LayerNorms (DESIGN section 3.1)."""

    def __init__(self, config: PathFLIPConfig, init: str, rngs: nnx.Rngs) -> None:
        F, D = config.feature_dim, config.embed_dim
        self.mlp = config.patch_projection == "mlp"
        if self.mlp:
            inner = config.patch_hidden or D
            self.linear = Linear(F, inner, init, rngs)
            self.norm = LayerNorm(inner, TORCH_EPS)
            self.linear_out = Linear(inner, D, init, rngs)
            self.norm_out = LayerNorm(D, TORCH_EPS)
        else:
            self.linear = Linear(F, D, init, rngs)

    def __call__(self, features: Float[Array, "... F"]) -> Float[Array, "... D"]:
        """[..., F] -> [..., D]."""
        x = self.linear(features)
        return self.norm_out(self.linear_out(jax.nn.relu(self.norm(x)))) if self.mlp else x


def _project(dtype: jnp.dtype, features: Array, projection: PatchProjection) -> Array:
    return projection(features.astype(dtype))


class RegionLayer(nnx.Module):
    """Post-LayerNorm encoder layer over [slide; regions], equivalent to torch.nn.TransformerEncoderLayer."""

    def __init__(self, config: PathFLIPConfig, init: str, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.rate = config.dropout
        self.attention = MultiheadAttention(D, config.region_heads, init, rngs)
        self.attention_norm = LayerNorm(D, TORCH_EPS)
        self.intermediate = Linear(D, 4 * D, init, rngs)
        self.output = Linear(4 * D, D, init, rngs)
        self.norm = LayerNorm(D, TORCH_EPS)

    def __call__(
        self,
        x: Float[Array, "B C D"],
        mask: Bool[Array, "B P"],
        key: Array | None,
        among: Float[Array, "B P D"] | None = None,
    ) -> Float[Array, "B C D"]:
        """Rows x after attention to each other, or to the rows `among`; masked rows are excluded as keys."""
        keys = split_key(key, 4)
        among = x if among is None else among
        pooled, _ = self.attention(x, among, among, mask, self.rate, keys[0])
        x = self.attention_norm(x + dropout(pooled, self.rate, keys[1]))
        inner = dropout(jax.nn.relu(self.intermediate(x)), self.rate, keys[2])
        return self.norm(x + dropout(self.output(inner), self.rate, keys[3]))


class TextRegionAttention(nnx.Module):
    """Text-conditioned region embedding: attention pooling of each slide's regions, once per text.

    The text is the query, so the regions that match it best have the highest weights (DESIGN section 3.6).
    """

    def __init__(self, config: PathFLIPConfig, init: str, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.dtype = config.compute_dtype
        self.query = Linear(D, D, init, rngs)
        self.key = Linear(D, D, init, rngs)
        self.value = Linear(D, D, init, rngs)
        self.attention = MultiheadAttention(D, config.text_region_heads, init, rngs)

    def __call__(
        self, texts: Float[Array, "B C D"], regions: Float[Array, "B R D"], mask: Bool[Array, "B R"]
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C R"]]:
        """Text-conditioned region embedding of every text, and its weights over the regions, averaged over heads."""
        texts, regions = texts.astype(self.dtype), regions.astype(self.dtype)
        pooled, weights = self.attention(self.query(texts), self.key(regions), self.value(regions), mask)
        return pooled.astype(jnp.float32), weights.mean(1)


class PathFLIP(nnx.Module):
    """PathFLIP alignment model: a pytree of float32 parameters, for use with plain JAX transforms.

    The Q-Former is a single attribute: a second reference to it would be untied by `jax.grad`.
    """

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        # Layers outside BERT have PyTorch's default initialisation in the released code.
        init = "torch" if config.init == "bert" else config.init
        self.patch_projection = PatchProjection(config, init, rngs)
        self.qformer = QFormer(config, rngs)
        self.slide_projection = Linear(config.hidden, config.embed_dim, init, rngs)
        self.text_projection = Linear(config.hidden, config.embed_dim, init, rngs)
        self.region_layers = nnx.List([RegionLayer(config, init, rngs) for _ in range(config.region_layers)])
        self.text_region = TextRegionAttention(config, init, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init, jnp.float32))
        if config.logit_bias_init is None:
            self.logit_bias = None
        else:
            self.logit_bias = nnx.Param(jnp.asarray(config.logit_bias_init, jnp.float32))

    def encode_slides(
        self,
        patches: Float[Array, "B R S F"],
        patch_mask: Bool[Array, "B R S"],
        *,
        key: Array | None = None,
        attention: bool = False,
    ) -> SlideEncoding:
        """Embed slides and their regions; a region without a valid patch counts as padding.

        Patches may have any float dtype. The content of masked slots has no effect, NaN included.
        """
        query_key, *layer_keys = split_key(key, 1 + len(self.region_layers))
        patches = self.project_patches(patches, patch_mask)
        states = self.qformer.read_patches(patches, patch_mask, query_key, attention)
        pooled = jnp.concatenate([states.slide[:, None], states.regions], axis=1).mean(2)  # [B, 1+R, H]
        x = self.slide_projection(pooled)  # [B, 1+R, D]
        region_mask = patch_mask.any(-1)
        mask = jnp.pad(region_mask, ((0, 0), (1, 0)), constant_values=True)
        with jax.named_scope("region_layers"):
            for layer, layer_key in zip(self.region_layers, layer_keys, strict=True):
                x = layer(x, mask, layer_key)
        x = jnp.where(mask[..., None], x, 0).astype(jnp.float32)
        return SlideEncoding(x[:, 0], x[:, 1:], region_mask, states.slide_attention, states.region_attention)

    def project_patches(
        self, patches: Float[Array, "B R S F"], patch_mask: Bool[Array, "B R S"]
    ) -> Float[Array, "B R S D"]:
        """Projected patch features for the queries; masked slots are zeroed first."""
        patches = jnp.where(patch_mask[..., None], patches, 0)
        with jax.named_scope("patch_projection"):
            project = partial(_project, self.config.compute_dtype)
            # XLA:CPU otherwise transposes the gradients of all layers, each before they are summed.
            return fusion_barrier(recompute(project, patches, self.patch_projection))

    def read_texts(
        self, rows: Sequence[Rows], text_index: Int[Array, "G n"], *, key: Array | None = None
    ) -> Float[Array, "G n H"]:
        """[CLS] state of each text; `text_index` is the index of that [CLS] among the T tokens of the text's group.

        `rows` holds a triple (tokens, segments, positions) for each row length; the concatenated rows are the group's
        tokens. A row holds several texts, distinguished by their segments (0 is padding); positions restart with each
        text.
        """
        return self.qformer.read_text(rows, text_index, key)

    def project_texts(
        self, states: Float[Array, "... H"], level: Literal["slide", "region"] = "slide", *, key: Array | None = None
    ) -> Float[Array, "... D"]:
        """Text states projected into the joint space, the same for slides and regions: the level has no effect."""
        return self.text_projection(states).astype(jnp.float32)

    def encode_texts(
        self,
        rows: Sequence[Rows],
        text_index: Int[Array, "G n"],
        *,
        level: Literal["slide", "region"] = "slide",
        key: Array | None = None,
    ) -> Float[Array, "G n D"]:
        """Embed packed texts: `rows` and `text_index` as in `read_texts`."""
        return self.project_texts(self.read_texts(rows, text_index, key=key), level)
