"""Training stages, by kind of settings."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from pathflip_jax.settings.kinds import AlignmentSettings, Kind, LanguageSettings, PathFLIP2Settings, RunSettings
from pathflip_jax.training.alignment import alignment_training
from pathflip_jax.training.stage import Training


def _language(settings: LanguageSettings, mesh: Mesh, begun: Mapping[str, Any]) -> Training:
    from pathflip_jax.training.language import language_training  # deferred: alignment does not need its dependencies

    return language_training(settings, mesh, begun)


STAGES: dict[Kind, Callable[[Any, Mesh, Mapping], Training]] = {
    AlignmentSettings: alignment_training,
    PathFLIP2Settings: alignment_training,
    LanguageSettings: _language,
}


def open_training(settings: RunSettings, mesh: Mesh, begun: Mapping[str, Any]) -> Training:
    """Training for these settings; `begun` is config.json of the run that resumes, at least its section `data`."""
    return STAGES[type(settings)](settings, mesh, begun)
