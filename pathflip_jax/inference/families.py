"""Inference settings of each model family: default grounding map and encoder capabilities."""

from collections.abc import Callable
from typing import NamedTuple

from pathflip_jax.grounding.methods import describe_methods
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


class Serving(NamedTuple):
    """Encoding of slides and texts of one family.

    `in_blocks`: slides too large for one call are encoded one block of regions at a time (`large_slides.py`).
    `own_projections`: whether slides and regions have projections of their own, which only their own loss trains.
    `shares_padding`: whether padding affects a text's embedding, so that all texts of a call are padded to one length.
    """

    default_method: str
    in_blocks: bool
    own_projections: bool
    shares_padding: Callable[[ModelConfig], bool]


SERVING: dict[str, Serving] = {
    PathFLIPConfig.family: Serving("slide", in_blocks=True, own_projections=False, shares_padding=lambda config: False),
    PathFLIP2Config.family: Serving(
        "cosine",
        in_blocks=False,
        own_projections=True,
        shares_padding=lambda config: config.text_pooling == "mean_padded",
    ),
}


def method_help() -> str:
    """Help text of --method: the families' defaults, and every method with its description."""
    defaults = ", ".join(f"{serving.default_method} for {family}" for family, serving in SERVING.items())
    refused = "A method whose weights the run never trained is refused"
    return f"how to map a text onto patches (default: {defaults}). {describe_methods()}. {refused}"
