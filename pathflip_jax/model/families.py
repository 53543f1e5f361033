"""Model families: one record for each network that this library trains, converts and serves.

`convert/families.py`, `inference/families.py` and `training/alignment.py` hold one table each by the same names: how a
family's weights are named elsewhere, how its slides are encoded, and what it learns by.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.model.pathflip2 import PathFLIP2
from pathflip_jax.model.step_parts import Step, Work, pathflip2_parts, pathflip_parts

AlignmentModel = PathFLIP | PathFLIP2


@dataclass(frozen=True)
class Family:
    """One family of alignment models.

    `patchwise`: every patch is embedded for itself and stands where other families have a region. `added_words` counts
    the words beside those of BERT's own vocabulary, which is `[DEC]` or none. `parts` gives operations and bytes of a
    forward pass. The settings of its losses are in `settings/kinds.py`.
    """

    network: type[AlignmentModel]
    config: type[ModelConfig]
    patchwise: bool
    added_words: int
    parts: Callable[[ModelConfig, Work, int], list[Step]]


FAMILIES: dict[str, Family] = {
    PathFLIPConfig.family: Family(
        network=PathFLIP,
        config=PathFLIPConfig,
        patchwise=False,
        added_words=1,
        parts=pathflip_parts,
    ),
    PathFLIP2Config.family: Family(
        network=PathFLIP2,
        config=PathFLIP2Config,
        patchwise=True,
        added_words=0,
        parts=pathflip2_parts,
    ),
}


def family_of(config: ModelConfig) -> Family:
    """The family of a model's config."""
    return FAMILIES[config.family]
