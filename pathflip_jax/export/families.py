"""Export of each model family: its PyTorch code and the README of a folder."""

from collections.abc import Callable
from typing import NamedTuple

from pathflip_jax.export.readmes import readme, readme2
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


class Exported(NamedTuple):
    """Export record of a family for PyTorch users.

    `code` is the module of `convert/` that is copied into the export, whose class is `name` and whose transformers
    classes are `name`Config and `name`Model. `readme` writes the README of a folder. `bert` is the class of
    transformers that the published code reads the BERT folder with.
    """

    code: str
    name: str
    readme: Callable[[ModelConfig, dict], str]
    bert: str


EXPORTS: dict[str, Exported] = {
    PathFLIPConfig.family: Exported("torch_model", "PathFLIP", readme, "BertLMHeadModel"),
    PathFLIP2Config.family: Exported("torch_pathflip2", "PathFLIP2", readme2, "BertModel"),
}


def export_of(config: ModelConfig) -> Exported:
    """Export record of a config's family."""
    return EXPORTS[config.family]
