"""Description stored in an export, so that its weights load as the same model with the same settings.

Attention heads, the cutting of regions, the patch encoder and text lengths cannot be inferred from weights. The
config.json of an export holds them under `SECTION`: the model's settings verbatim, and the run's settings with the
names of its files but never their folders.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pathflip_jax.convert.families import conversion_of
from pathflip_jax.convert.versions import READ, refusal, this_version, unknown_settings
from pathflip_jax.data.storage.json_values import json_object
from pathflip_jax.model.config import CONFIGS, ModelConfig
from pathflip_jax.model.versions import UnknownSettings, before

SECTION = "pathflip_jax"
CONFIG, BERT = "config.json", "bert"
ALIGNER, LANGUAGE = "aligner", "pathflip_language.json"  # of a language run: the aligner's export, and its description
REGION_TOP_K = "region_top_k"  # name of our `top_k` in transformers folders, which have a generation setting `top_k`
NAMED = {"data": ("records", "texts", "slides", "tokenizer", "embeddings")}
PLACES = {"model": ("bert",), "train": ("checkpoints", "wandb_project"), "lm": ("aligner", "decoder", "start")}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


class Exported(NamedTuple):
    """Export of this library: config.json, the model and run described there, tokenizer, and unstated settings."""

    path: Path
    config: ModelConfig
    settings: dict[str, Any]
    tokenizer: Path | None
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> Path:
        """Weights file read by default."""
        single = self.path.parent / "model.safetensors"
        return single if single.is_file() else self.path.parent


def describe_export(config: ModelConfig, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Section of config.json about a model and the settings of its run."""
    about = {"version": this_version(), "family": config.family}
    return {SECTION: about | {"model": config.to_dict(), "settings": without_paths(settings)} | more}


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run settings for publication: file names without their paths."""
    found = {name: dict(part) if isinstance(part, Mapping) else part for name, part in settings.items()}
    for section, names in NAMED.items():
        for name in names:
            if isinstance(value := found.get(section, {}).get(name), str):
                found[section][name] = ",".join(PurePosixPath(part.strip()).name for part in value.split(","))
    for section, names in PLACES.items():
        found |= {section: found[section] | {n: "" for n in names if n in found[section]}} if section in found else {}
    return found


def read_exported(source: str | Path) -> Exported | None:
    """Read the export that a config.json describes, given its folder or weights; None without a description.

    Raises ValueError naming the file where it contradicts itself or describes no model known here.
    """
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    path = folder / CONFIG
    values = json_object(path, path.read_bytes()) if path.is_file() else {}
    tokenizer = next(
        (place for place in (folder / BERT, folder) for name in TOKENIZER_FILES if (place / name).is_file()), None
    )
    try:
        if (about := values.get(SECTION)) is not None:
            config = _config_in_section(values, about)
            if unknown := unknown_settings(about["settings"], READ):
                raise UnknownSettings("settings of its run", unknown)
            return Exported(path, config, dict(about["settings"]), tokenizer, notes=tuple(about.get("notes", ())))
        config = _config_without_section(values)
    except UnknownSettings as error:
        raise ValueError(refusal(path, error.names, values[SECTION].get("version"))) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error!s:.600}; export the run again, or restore a copy") from None
    return None if config is None else Exported(path, config, *_assumed_settings(config, tokenizer))


def _config_in_section(values: Mapping[str, Any], about: Any) -> ModelConfig:
    """Model config in an export's section. Raises ValueError where the rest of config.json contradicts it."""
    if not isinstance(about, dict) or not all(isinstance(about.get(name), dict) for name in ("model", "settings")):
        raise ValueError(f'its section "{SECTION}" lacks the settings of the model or of the run')
    config = ModelConfig.from_dict(about["model"])
    values = {"top_k" if name == REGION_TOP_K else name: value for name, value in values.items()}
    clashes = [
        f"{name} is {values[name]!r} at the top level and {value!r} in that section"
        for name, value in about["model"].items()
        if name in values and values[name] != value
    ]
    if clashes:
        raise ValueError(f'contradicts its section "{SECTION}": {"; ".join(clashes)}')
    return config


def _config_without_section(values: Mapping[str, Any]) -> ModelConfig | None:
    """Model config of an export that predates the section: every setting of a family, by name."""
    for name, kind in CONFIGS.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        if fields - before("model", fields).keys() <= values.keys():
            return ModelConfig.from_dict({"family": name} | {field: values[field] for field in fields & values.keys()})
    return None


def _assumed_settings(config: ModelConfig, tokenizer: Path | None) -> tuple[dict, Path | None, tuple[str, ...]]:
    length, _ = conversion_of(config).text_lengths
    data = {"cut": "grid", "edge_um": 2048.0, "caption_length": length}
    assumed = (
        "an export of an older version, whose config.json does not describe the run's data; export the run again if "
        "you still have it",
        "regions are cut by grid, 2048 um wide",
        f"captions of at most {length} tokens",
        "the patch encoder is not known: features of any encoder with this width are accepted",
    )
    return {"data": data}, tokenizer, assumed
