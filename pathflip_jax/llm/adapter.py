"""Slide-conditioned language model: [slide; regions] as soft tokens in a prompt, and the parts that a stage trains.

Letters as in `model/pathflip.py` and `llm/decoder.py`: B sequences, each about one slide of R regions; T tokens; D the
aligner's width, W the decoder's. In `tokens` an id below zero is a soft token: -1 the slide, -2 its first region, ...
(`llm/prompts.py` puts them there).
"""

import re
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import Linear
from pathflip_jax.model.pathflip import PathFLIP

# Parts that a stage may train, with their parameters. Of the aligner only the slide branch: the rest
# receives no gradient, and weight decay alone would shrink it.
PARTS = {
    "projector": r"^projector/",
    "lora": r"^decoder/.*/lora/",
    "decoder": r"^decoder/(?!.*/lora/)",
    "aligner": r"^aligner/(patch_projection|slide_projection|region_layers|qformer/(query_tokens|norm)"
    r"|qformer/layers/\d+/(self_attention|cross_attention|query_ffn))(/|$)",
}


class SlideLanguageModel(nnx.Module):
    """Aligner, projector and decoder: one pytree of parameters, part of which a stage trains."""

    def __init__(
        self, aligner: PathFLIPConfig, decoder: DecoderConfig, lora: LoRAConfig | None, rngs: nnx.Rngs
    ) -> None:
        self.aligner = PathFLIP(aligner, rngs)
        self.projector = Linear(aligner.embed_dim, decoder.width, "torch", rngs)
        self.decoder = Decoder(decoder, rngs, lora)

    def soft_tokens(
        self, patches: Float[Array, "B R S F"], patch_mask: Bool[Array, "B R S"], *, key: Array | None = None
    ) -> Float[Array, "B 1+R W"]:
        """Embed the slide and its regions as rows of the decoder's width; `key` seeds the aligner's dropout."""
        found = self.aligner.encode_slides(patches, patch_mask, key=key)
        return self.project(jnp.concatenate([found.slide[:, None], found.regions], axis=1))

    def project(self, rows: Float[Array, "B n D"]) -> Float[Array, "B n W"]:
        """Project embeddings of slides and regions to soft tokens."""
        return self.projector(rows.astype(self.decoder.config.compute_dtype))

    def embed(self, tokens: Int[Array, "B T"], soft: Float[Array, "B n W"]) -> Float[Array, "B T W"]:
        """Embed a sequence: words by the decoder's table, soft tokens by their rows."""
        words = self.decoder.embed(jnp.maximum(tokens, 0))
        rows = jnp.take_along_axis(soft, jnp.clip(-1 - tokens, 0, soft.shape[1] - 1)[..., None], axis=1)
        return jnp.where((tokens < 0)[..., None], rows.astype(words.dtype), words)


def split_names(text: str) -> tuple[str, ...]:
    """Names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def is_trained(trains: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether the parameter of this name is trained, where `trains` names the trained `PARTS`.

    Raises ValueError for an unknown part.
    """
    unknown = [name for name in trains if name not in PARTS]
    if unknown or not trains:
        raise ValueError(f"lm.trains {', '.join(unknown) or '(nothing)'}: expected some of {', '.join(PARTS)}")
    trained = re.compile("|".join(f"(?:{PARTS[name]})" for name in trains))
    return lambda name: trained.search(name) is not None
