"""Conversion of each model family: tensor names in PyTorch, sizes, and settings that no tensor determines."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pathflip_jax.convert.names import Name
from pathflip_jax.convert.pathflip import assumed_heads, infer_pathflip, pathflip_names, pathflip_unused
from pathflip_jax.convert.pathflip2 import (
    TOKENS,
    assumed_arguments,
    complete,
    infer_pathflip2,
    merge_text_lora,
    pathflip2_names,
    pathflip2_unused,
)
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig

State = Mapping[str, np.ndarray]


class Bert(NamedTuple):
    """BERT within a network: the location of its parameters.

    `whole`: unchanged BERT, token types included. Otherwise `[DEC]` is an additional word, token types are folded into
    the position embeddings, and queries have a copy of the feed-forward networks.
    """

    path: str
    whole: bool


def _unchanged(state: State, config: ModelConfig) -> State:
    return state


def _without_lora(state: State, config: ModelConfig) -> tuple[State, ModelConfig, list[str]]:
    return state, config, []


@dataclass(frozen=True)
class Conversion:
    """Conversion record of one family.

    `known_by` are the tensors that identify the family, the first of them decisive. `infer` makes a config from a
    `state_dict`, BERT's heads and the arguments of a run, and `assumed` lists what none of these determined. `unused`
    fills the entries of a `state_dict` that correspond to no parameter here, given the word table; `complete` adds what
    some checkpoints lack. `merge` merges LoRA into the weights and returns notes about it. `text_lengths` are the
    released code's limits on tokens of captions and subcaptions.
    """

    title: str
    known_by: tuple[str, ...]
    infer: Callable[[State, int | None, Mapping[str, Any] | None], ModelConfig]
    assumed: Callable[[ModelConfig, Mapping[str, Any]], list[str]]
    names: Callable[[ModelConfig], Iterable[Name]]
    unused: Callable[[ModelConfig, np.ndarray], dict[str, np.ndarray]]
    bert: Bert
    text_lengths: tuple[int, int]
    complete: Callable[[State, ModelConfig], State] = _unchanged
    merge: Callable[[State, ModelConfig], tuple[State, ModelConfig, list[str]]] = _without_lora


CONVERSIONS: dict[str, Conversion] = {
    PathFLIPConfig.family: Conversion(
        title="PathFLIP's alignment stage",
        known_by=("query_tokens", "path_proj.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
        infer=infer_pathflip,
        assumed=assumed_heads,
        names=pathflip_names,
        unused=pathflip_unused,
        bert=Bert("qformer", whole=False),
        text_lengths=(384, 192),
    ),
    PathFLIP2Config.family: Conversion(
        title="PathFLIP2",
        known_by=(TOKENS, "image_proj.0.weight"),
        infer=infer_pathflip2,
        assumed=assumed_arguments,
        names=pathflip2_names,
        unused=pathflip2_unused,
        bert=Bert("text_encoder", whole=True),
        text_lengths=(512, 512),
        complete=complete,
        merge=merge_text_lora,
    ),
}


def conversion_of(config: ModelConfig) -> Conversion:
    """Conversion record of a config's family."""
    return CONVERSIONS[config.family]


def names(config: ModelConfig) -> list[Name]:
    """All parameters of a model of this config, each once."""
    return list(conversion_of(config).names(config))
