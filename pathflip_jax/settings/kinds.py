"""Kinds of runs with their sections of settings, and lookups over the fields of all sections."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pathflip_jax.settings.fields import Setting, plain_values, settings_of
from pathflip_jax.settings.networks import (
    LanguageDataSettings,
    LanguageModelSettings,
    LossConfig,
    PathFLIP2ModelSettings,
    PathFLIPModelSettings,
    SigmoidLossConfig,
)
from pathflip_jax.settings.sections import (
    AlignmentDataSettings,
    DataSettings,
    MeshSettings,
    OptimConfig,
    TrainSettings,
)


@dataclass(frozen=True)
class RunSettings(abc.ABC):
    """Complete settings of a run. Raises ValueError that names every setting that contradicts another."""

    data: DataSettings = DataSettings()
    optim: OptimConfig = OptimConfig()
    mesh: MeshSettings = MeshSettings()
    train: TrainSettings = TrainSettings()

    def __post_init__(self):
        if faults := list(_contradictions(type(self), flat(self))):
            raise ValueError("; ".join(faults))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and name."""
        return dataclasses.asdict(self)

    @classmethod
    @abc.abstractmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a run with these settings, as nested mappings, is of this kind."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> "RunSettings":
        """Inverse of `to_dict`; missing settings take their defaults.

        Raises ValueError for unknown settings, and for all values out of bounds.
        """
        if unknown := [key for key in flatten(values) if key not in fields(cls)]:
            raise ValueError(f"{', '.join(unknown)}: no such setting; known settings are {', '.join(fields(cls))}")
        sections, given = {field.name: type(field.default) for field in dataclasses.fields(cls)}, {}
        for name, section in sections.items():
            all_of_it = dataclasses.asdict(getattr(cls, name)) | dict(values.get(name, {}))
            given[name] = plain_values(section, all_of_it)
        if faults := list(_objections(cls, given)):
            raise ValueError("; ".join(faults))
        return cls(**{name: section(**given[name]) for name, section in sections.items()})

    def with_changes(self, changes: Mapping[str, Any]) -> "RunSettings":
        """Copy with some settings replaced, by "section.name"."""
        values = self.to_dict()
        for key, value in changes.items():
            section, _, name = key.partition(".")
            values[section][name] = value
        return self.from_dict(values)


@dataclass(frozen=True)
class AlignmentSettings(RunSettings):
    """Settings of slide-text alignment; the defaults are the released code's, for the network of the paper."""

    data: AlignmentDataSettings = AlignmentDataSettings()
    model: PathFLIPModelSettings | PathFLIP2ModelSettings = PathFLIPModelSettings()
    loss: LossConfig | SigmoidLossConfig = LossConfig()
    optim: OptimConfig = OptimConfig(preset="released", clip=0.0)

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        """Whether the config's model is of this family of networks."""
        model = config.get("model")
        return hasattr(model, "get") and model.get("family") == cls.model.family


@dataclass(frozen=True)
class PathFLIP2Settings(AlignmentSettings):
    """Settings of alignment with the authors' follow-up network; where its published defaults differ, those apply.

    16 regions of 16 x 16 patches are up to 4,096 patches per slide and step, as published.
    """

    data: AlignmentDataSettings = AlignmentDataSettings(regions=16, caption_length=512, subcaption_length=512)
    model: PathFLIP2ModelSettings = PathFLIP2ModelSettings()
    loss: SigmoidLossConfig = SigmoidLossConfig()
    optim: OptimConfig = OptimConfig(preset="released", clip=0.0, weight_decay=0.01)
    train: TrainSettings = TrainSettings(batch_size=64)  # published: 16 on each of 4 devices


@dataclass(frozen=True)
class LanguageSettings(RunSettings):
    """Settings of the language stage; the learning rate is that of the follow-up's first stage."""

    data: LanguageDataSettings = LanguageDataSettings()
    lm: LanguageModelSettings = LanguageModelSettings()
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, warmup_steps=100, final_learning_rate=0.0, weight_decay=0.0)
    train: TrainSettings = TrainSettings(batch_size=32, epochs=1, select="val/loss")

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        """Whether the config has the section of the language model."""
        return "lm" in config


Kind = type[RunSettings]
KINDS: tuple[Kind, ...] = (AlignmentSettings, PathFLIP2Settings, LanguageSettings)


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Kind of a run, from its settings as nested mappings.

    Settings that match no kind are of the first: those of runs from before there were other kinds, and of faulty files,
    for which a later check raises an error.
    """
    return next((kind for kind in KINDS if kind.describes(config)), KINDS[0])


@functools.cache
def fields(kind: Kind) -> Mapping[str, Setting]:
    """All settings of a kind of run, by "section.name"."""
    sections = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    found = {f"{at}.{name}": x for at, section in sections.items() for name, x in settings_of(section).items()}
    return MappingProxyType(found)


@functools.cache
def defaults(kind: Kind) -> Mapping[str, Any]:
    """Defaults of all settings of a kind of run, by "section.name"."""
    return MappingProxyType(flat(kind()))


def flat(settings: RunSettings) -> dict[str, Any]:
    """Values of all settings, by "section.name"."""
    return flatten(settings.to_dict())


def flatten(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values of nested mappings, by "section.name"."""
    return {f"{section}.{name}": x for section, own in values.items() for name, x in own.items()}


def _every() -> Iterator[tuple[str, Setting]]:
    for kind in KINDS:
        yield from fields(kind).items()


# Setting -> value that reproduces the behaviour of versions without it, for runs and config files that lack it.
LEGACY_VALUES: dict[str, Any] = {key: found.before for key, found in _every() if found.is_new}
MAY_CHANGE: frozenset[str] = frozenset(key for key, found in _every() if found.may_change)


def _objections(kind: Kind, values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Objections to values out of bounds."""
    usual = defaults(kind)
    for key, found in fields(kind).items():
        section, _, name = key.partition(".")
        if fault := found.objection(key, values[section][name], usual[key]):
            yield fault


def _contradictions(kind: Kind, values: Mapping[str, Any]) -> Iterator[str]:
    """Objections to combinations of settings that are each within bounds."""
    for key, found in fields(kind).items():
        for whole in found.divides:
            if values[key] and values[whole] % values[key]:
                yield f"{whole}={values[whole]} is not a multiple of {key}={values[key]}; change one of them"
    for key, found in fields(kind).items():
        if found.at_most and values[key] > values[found.at_most]:
            other = f"{found.at_most}={values[found.at_most]}"
            yield f"{key}={values[key]} is more than {other}; lower the first or raise the second"
    if values["train.steps"] == values["train.epochs"] == 0:
        yield "train.steps=0 and train.epochs=0: there is nothing to do; set one of them above 0"
    if bool(values["train.local_checkpoints"]) != bool(values["train.local_every"]):
        yield "train.local_checkpoints and train.local_every: only one of them is set; set both or neither"
