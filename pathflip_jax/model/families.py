"""Model families: one record for each network that this library trains, converts and serves.

Three other tables have the same keys: weight names in other formats (`convert/families.py`), slide encoding
(`inference/families.py`) and training objective (`training/alignment.py`).
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
    """A family of alignment models.

    `patchwise`: every patch has an embedding, with the role of a region in other families. `added_words`
    counts the tokens added to BERT's vocabulary: `[DEC]` or none. `parts` gives operations and bytes of a forward pass.
    The settings of its losses are in `settings/kinds.py`.
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
    """Family of a model's config."""
    return FAMILIES[config.family]
