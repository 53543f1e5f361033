"""Python config files, whose errors are reported in a single line with the file and line number."""

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from pathflip_jax.settings.fields import types_of
from pathflip_jax.settings.kinds import RunSettings

SUFFIX = ".py"


def as_config(settings: RunSettings) -> ConfigDict:
    """Settings as a ConfigDict of the same types, for config files and the command line to override."""
    config = ConfigDict()
    for name, section in vars(settings).items():
        config[name], of = ConfigDict(), types_of(type(section))
        for key, value in vars(section).items():
            config[name][key] = placeholder(of[key]) if value is None else value
    return config


def run_config_file(path: Path, argument: str) -> ConfigDict:
    """Result of the file's `get_config(argument)`. Its prints go to stderr, so that stdout holds only our output.

    Raises ValueError for an invalid config file, naming the line that fails.
    """
    if path.suffix != SUFFIX:
        raise ValueError(
            f"{path}: expected a Python file, NAME.py, with a function get_config, found "
            f"{path.suffix or 'a name without an ending'}; start from a copy of configs/align_base.py"
        )
    spec = importlib.util.spec_from_file_location("pathflip_config", path)
    module = importlib.util.module_from_spec(spec)
    _run(path, lambda: spec.loader.exec_module(module))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(
            f"{path}: no function get_config(argument='') in it; define one that returns the settings as a ConfigDict"
        )
    takes = inspect.signature(get_config).parameters
    if argument and not takes:
        raise ValueError(
            f"{path}: get_config() takes no argument, but :{argument} is given; define get_config(argument)"
        )
    config = _run(path, lambda: get_config(argument) if argument else get_config())
    if not isinstance(config, ConfigDict):
        cure = "end it with `return config`" if config is None else "return an ml_collections.ConfigDict"
        raise ValueError(f"{path}: get_config returns {type(config).__name__}, expected the settings; {cure}")
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _run(path: Path, step: Callable[[], Any]) -> Any:
    """Result of executing a part of the file. ValueError with the line for any exception, SystemExit included."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return step()
    except SystemExit as error:
        raise ValueError(f"{_place(path, error)}: the config exits the program (exit {error.code})") from error
    except SyntaxError as error:
        text = f" in {error.text.strip()!r}" if error.text else ""
        other = f" of {error.filename}" if Path(error.filename or path).absolute() != path.absolute() else ""
        raise ValueError(f"{path}, line {error.lineno}{other}: {error.msg}{text}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"{_place(path, error)}: {type(error).__name__}: {reason}") from error


def _place(path: Path, error: BaseException) -> str:
    """The file and its last line in the error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == path.absolute()]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def bundled_configs() -> dict[str, Path]:
    """Configs bundled with the package, by name."""
    folder = Path(importlib.util.find_spec("pathflip_jax.configs").origin).parent
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def flat_settings(config: ConfigDict, prefix: str = "") -> dict:
    """Settings of a config, by "section.name"."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= flat_settings(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
