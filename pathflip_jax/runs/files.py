"""Files of a run folder: their names, and the settings and model configuration that they hold."""

import logging
from pathlib import Path

from etils import epath

from pathflip_jax.convert.versions import READ, completed, refusal, signed, unknown_settings, version_of
from pathflip_jax.data.storage.files import as_path, make_folder
from pathflip_jax.data.storage.json_files import read_json, write_json
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.versions import UnknownSettings
from pathflip_jax.runs import bundled

log = logging.getLogger(__name__)
CONFIG, MODEL, TOKENIZER, CHECKPOINTS, BEST = "config.json", "model.json", "tokenizer", "checkpoints", "best"


def read_model_config(path: Path) -> ModelConfig:
    """Configuration of a run's model, from its model.json. Raises ValueError naming the file and the setting.

    Settings missing from a run of an earlier version take the value that reproduces that version, which is logged.
    """
    values = read_json(path)
    try:
        config = ModelConfig.from_dict(values)
    except UnknownSettings as error:
        about = path.with_name(CONFIG)
        version = version_of(read_json(about)) if about.exists() else None
        raise ValueError(refusal(path, error.names, version)) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if lacking := config.to_dict().keys() - values.keys():
        taken = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(lacking))
        log.warning("%s: written by a version without some of today's settings; they are set to %s", path, taken)
    return config


def run_folder(place: str | Path) -> Path:
    """Folder of a run: on a local disk, or at a gs:// URL, which Orbax supports too. ValueError for other URLs."""
    if not is_url(place):
        return Path(place).resolve()
    if not str(place).startswith("gs://"):
        raise ValueError(
            f"{place}: expected a folder on a local disk or a gs:// URL; Orbax writes checkpoints nowhere else"
        )
    as_path(place)  # raises if a package to read it is missing
    return epath.Path(str(place))


def describe_run(workdir: Path, model: ModelConfig, config: dict, tokenizer) -> None:
    """Write config.json, model.json and tokenizer/, everything needed to use a checkpoint."""
    make_folder(as_path(workdir))
    tokenizer.save(workdir / TOKENIZER)
    write_json(workdir / CONFIG, signed(config))
    write_json(workdir / MODEL, model.to_dict())


def read_run_config(workdir: Path) -> dict:
    """Settings of a run; those that its version lacked take the value that reproduces it.

    Raises FileNotFoundError for a folder without a run, ValueError for one of a later version with settings of the data
    or the language stage that this version does not know.
    """
    for name in (MODEL, CONFIG):
        if not (workdir / name).exists():
            ours = "".join(f", or {run}, which comes with the package" for run in bundled.names())
            raise FileNotFoundError(
                f"{workdir}: no {name} in it, so it is not a run folder; give the --workdir of `pathflip train`, the "
                f"--out of `pathflip convert`{ours}"
            )
    settings = read_json(workdir / CONFIG)
    if unknown := unknown_settings(settings, READ):
        raise ValueError(refusal(workdir / CONFIG, unknown, version_of(settings)))
    return completed(settings)
