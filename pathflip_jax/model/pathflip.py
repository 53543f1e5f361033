"""PathFLIP: slides and reports aligned as wholes, regions and sentences aligned in parts (DESIGN section 3).

    B slides in the batch      F width of a patch feature       K subcaptions of a slide
    R regions of a slide       D joint embedding width          Q query tokens
    S patch slots of a region  H BERT hidden width              T text tokens
    N patches of a slide, R*S with padding

Modules are pytrees: use them with `jax.jit` and `jax.value_and_grad` as they are. One key goes in for dropout, None
for none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.model.attention import Key, MultiheadAttention, dropout, layer_norm, linear, subkey
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.qformer import QFormer, projection_init

TORCH_EPSILON = 1e-5


class SlideEncoding(NamedTuple):
    """Embeddings of a batch of slides, before any normalisation; padded regions are zero.

    The attention maps, when asked for, are probabilities of the Q-Former's last cross-attention but one.
    """

    slide: Float[Array, "B D"]
    regions: Float[Array, "B R D"]
    region_mask: Bool[Array, "B R"]
    slide_attention: Float[Array, "B heads Q R S"] | None = None
    region_attention: Float[Array, "B heads Q R S"] | None = None


class PatchProjection(nnx.Module):
    """Patch features F -> D: one Linear, or the MLP variant with two LayerNorms (DESIGN section 3.1)."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs):
        init, dtype = projection_init(config), config.compute_dtype
        self.linear = linear(config.feature_dim, config.embed_dim, init, dtype, rngs)
        if config.patch_projection == "mlp":
            self.norm = layer_norm(config.embed_dim, TORCH_EPSILON, dtype, rngs)
            self.linear_out = linear(config.embed_dim, config.embed_dim, init, dtype, rngs)
            self.norm_out = layer_norm(config.embed_dim, TORCH_EPSILON, dtype, rngs)
        self.mlp = config.patch_projection == "mlp"

    def __call__(self, features: Float[Array, "*batch F"]) -> Float[Array, "*batch D"]:
        """[..., F] -> [..., D]."""
        x = self.linear(features)
        return self.norm_out(self.linear_out(jax.nn.relu(self.norm(x)))) if self.mlp else x


class RegionLayer(nnx.Module):
    """A post-LayerNorm encoder layer over [slide; regions], as torch.nn.TransformerEncoderLayer."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs):
        width, dtype = config.embed_dim, config.compute_dtype
        init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.rate = config.dropout
        self.attention = MultiheadAttention(width, config.region_heads, dtype, rngs)
        self.attention_norm = layer_norm(width, TORCH_EPSILON, dtype, rngs)
        self.intermediate = linear(width, 4 * width, init, dtype, rngs)
        self.output = linear(4 * width, width, init, dtype, rngs)
        self.norm = layer_norm(width, TORCH_EPSILON, dtype, rngs)

    def __call__(self, x: Float[Array, "B R D"], mask: Bool[Array, "B R"], key: Key | None) -> Float[Array, "B R D"]:
        """[B, 1+R, D] -> [B, 1+R, D]; masked rows are no keys."""
        pooled, _ = self.attention(x, x, x, mask, self.rate, subkey(key, 0))
        x = self.attention_norm(x + dropout(pooled, self.rate, subkey(key, 1)))
        hidden = dropout(jax.nn.relu(self.intermediate(x)), self.rate, subkey(key, 2))
        return self.norm(x + dropout(self.output(hidden), self.rate, subkey(key, 3)))


class TextRegionAttention(nnx.Module):
    """Pool the regions of a slide once per text: the text-conditioned region embedding (DESIGN section 3.6)."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs):
        width, dtype = config.embed_dim, config.compute_dtype
        init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.query = linear(width, width, init, dtype, rngs)
        self.key = linear(width, width, init, dtype, rngs)
        self.value = linear(width, width, init, dtype, rngs)
        self.attention = MultiheadAttention(width, config.text_region_heads, dtype, rngs)

    def __call__(self, texts: Float[Array, "B C D"], regions: Float[Array, "B R D"], region_mask: Bool[Array, "B R"]):
        """Text-conditioned region embeddings [B, C, D] and the weights [B, C, R], mean of the heads.

        Each text asks "where am I in this slide?"; regions that answer weigh most.
        """
        pooled, weights = self.attention(self.query(texts), self.key(regions), self.value(regions), region_mask)
        return pooled, jnp.mean(weights, axis=1)


class PathFLIP(nnx.Module):
    """Slide encoder, text encoder and text-region attention around one Q-Former."""

    def __init__(self, config: PathFLIPConfig, rngs: nnx.Rngs):
        self.config = config
        init, dtype = projection_init(config), config.compute_dtype
        self.patch_projection = PatchProjection(config, rngs)
        # ONE Q-Former for slides, regions and texts: a second attribute would come untied under jax.grad.
        self.qformer = QFormer(config, rngs)
        self.slide_projection = linear(config.hidden, config.embed_dim, init, dtype, rngs)
        self.text_projection = linear(config.hidden, config.embed_dim, init, dtype, rngs)
        self.region_layers = nnx.List([RegionLayer(config, rngs) for _ in range(config.region_layers)])
        self.text_region = TextRegionAttention(config, rngs)
        self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init))
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nnx.Param(jnp.float32(bias))

    def encode_slides(
        self,
        patches: Float[Array, "B R S F"],
        patch_mask: Bool[Array, "B R S"],
        *,
        key: Key | None = None,
        attention: bool = False,
    ) -> SlideEncoding:
        """Embed slides and their regions; `attention=True` adds the attention maps.

        Padding (patch slots, regions) changes nothing, whatever it holds: it is set to zero before it enters.
        """
        B, R, S, F = patches.shape
        patches = jnp.where(patch_mask[..., None], patches, 0).astype(self.config.compute_dtype)
        embedded = self.patch_projection(patches)  # [B, R, S, D]
        D = embedded.shape[-1]

        def queries(bags, mask, number):
            x, weights = self.qformer.encode_patches(bags, mask, key=subkey(key, number), attention=attention)
            return self.slide_projection(jnp.mean(x, axis=1)), weights

        slide, slide_weights = queries(embedded.reshape(B, R * S, D), patch_mask.reshape(B, R * S), 0)
        regions, region_weights = queries(embedded.reshape(B * R, S, D), patch_mask.reshape(B * R, S), 1)

        region_mask = jnp.any(patch_mask, axis=-1)
        x = jnp.concatenate([slide[:, None], regions.reshape(B, R, D)], axis=1)  # [B, 1+R, D]
        keys = jnp.concatenate([jnp.ones((B, 1), bool), region_mask], axis=1)
        for number, layer in enumerate(self.region_layers):
            x = layer(x, keys, subkey(key, 2 + number))
        x = x.astype(jnp.float32)
        encoding = SlideEncoding(x[:, 0], jnp.where(region_mask[..., None], x[:, 1:], 0.0), region_mask)
        if not attention:
            return encoding
        heads, Q = slide_weights.shape[1:3]
        return encoding._replace(
            slide_attention=slide_weights.reshape(B, heads, Q, R, S),
            region_attention=region_weights.reshape(B, R, heads, Q, S).transpose(0, 2, 3, 1, 4),
        )

    def encode_texts(
        self,
        tokens: Int[Array, "G P L"],
        segments: Int[Array, "G P L"],
        positions: Int[Array, "G P L"],
        text_index: Int[Array, "G n"],
        *,
        key: Key | None = None,
    ) -> Float[Array, "G n D"]:
        """Embed packed texts: the projected last hidden state of each text's [CLS].

        `text_index` [g, i] is the flat position, in the P*L tokens of group g, of the [CLS] of text i.
        """
        G, P, L = tokens.shape
        rows = [x.reshape(G * P, L) for x in (tokens, segments, positions)]
        hidden = self.qformer.encode_tokens(*rows, key=key).reshape(G, P * L, -1)
        first = jnp.take_along_axis(hidden, text_index[..., None], axis=1)  # [G, n, H]
        return self.text_projection(first).astype(jnp.float32)

    def text_region_attention(
        self, texts: Float[Array, "B C D"], regions: Float[Array, "B R D"], region_mask: Bool[Array, "B R"]
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C R"]]:
        """Text-conditioned region embeddings [B, C, D], and the share of each region in them [B, C, R]."""
        pooled, weights = self.text_region(texts, regions, region_mask)
        return pooled.astype(jnp.float32), weights


def flatten(model: nnx.Module) -> dict[str, Array]:
    """Every parameter by its name, such as "qformer/layers/0/self_attention/query/kernel".

    The same names serve checkpoints, sharding rules, decay and freeze masks, and conversion.
    """
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def unflatten(config: PathFLIPConfig, flat: dict[str, Array]) -> PathFLIP:
    """The model that has these parameters; names or shapes of another config raise ValueError, listing them all."""
    abstract = nnx.eval_shape(lambda: PathFLIP(config, nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    expected = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    faults = [f"missing {name}" for name in sorted(expected.keys() - flat.keys())]
    faults += [f"unexpected {name}" for name in sorted(flat.keys() - expected.keys())]
    for name in sorted(expected.keys() & flat.keys()):
        if tuple(flat[name].shape) != tuple(expected[name].shape):
            faults.append(f"{name} has shape {tuple(flat[name].shape)}, expected {tuple(expected[name].shape)}")
    if faults:
        raise ValueError("these parameters are not of this model config:\n  " + "\n  ".join(faults))
    leaves = {path: leaf.replace(flat["/".join(map(str, path))]) for path, leaf in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(leaves))
