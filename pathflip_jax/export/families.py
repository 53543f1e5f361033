"""Export of each model family: its code in PyTorch, and the pages that go with it."""

from collections.abc import Callable
from typing import NamedTuple

from pathflip_jax.export.readmes import readme, readme2
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


class Exported(NamedTuple):
    """A family as PyTorch users get it.

    `code` is the module of `convert/` that travels along, whose class is `name` and whose classes for transformers are
    `name`Config and `name`Model. `readme` writes the page of a folder. `bert` is the class of transformers that the
    published code reads the BERT folder with.
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
    """The export of a config's family."""
    return EXPORTS[config.family]
