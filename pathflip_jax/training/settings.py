"""Settings of a run from a config file and the command line, validated before any expensive work.

This is the edge: files and overrides are ConfigDicts, and the result is frozen (`settings.kinds.RunSettings`). A config
may override the defaults, but not add names. Errors give the file, the name, and the closest known name.
"""

import difflib
import logging
import re
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from pathflip_jax.data.storage.files import as_path, exists
from pathflip_jax.data.storage.paths import expand
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.runtime.config_files import bundled_configs, flat_settings, run_config_file
from pathflip_jax.settings.fields import CURRENT_VALUE, Unrestricted
from pathflip_jax.settings.kinds import LEGACY_VALUES, Kind, RunSettings, defaults, fields, flat, kind_of

USAGE = """usage: pathflip train --config FILE_OR_NAME[:smoke] [--config.section.setting=value ...] --workdir FOLDER
       [--profile STEPS] [--coordinator HOST:PORT --num_processes N --process_id I]"""
OPTIONS = ("workdir", "profile", "coordinator", "num_processes", "process_id")
_log = logging.getLogger(__name__)


def find_config(name: str) -> tuple[Path, str]:
    """File and argument of `PATH_OR_NAME[:ARGUMENT]`. Raises FileNotFoundError for neither a file nor a known name."""
    whole = Path(expand(name))
    if whole.is_file():
        return whole, ""
    name, _, argument = name.partition(":")
    path = Path(expand(name))
    if path.is_file():
        return path, argument
    bundled = bundled_configs()
    if name in bundled:
        return bundled[name], argument
    if path.is_dir():
        raise IsADirectoryError(f"--config={name}: is a folder; name a config file in it")
    close = difflib.get_close_matches(Path(name).stem, bundled, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(f"--config={name}: no such file; the bundled configs are {', '.join(bundled)}{hint}")


def load_config(name: str, given: Collection[str] = ()) -> ConfigDict:
    """Settings of a config file, before overrides. Raises ValueError for an unknown name or a wrong type.

    `~` and environment variables in its strings are expanded, except in settings that are `given` elsewhere.
    """
    path, argument = find_config(name)
    config = run_config_file(path, argument)
    reference = defaults(kind_of(config))
    _add_legacy_settings(path, config, reference)
    found = flat_settings(config)
    faults = [f"no setting is called {key}{_suggestion(key, reference)}" for key in found if key not in reference]
    faults += [f"{key} is missing" for key in reference if key not in found]
    for key, value in found.items():
        default = reference.get(key)
        if default is None or value is None or isinstance(value, type(default)):
            continue
        if isinstance(value, bool) or not (isinstance(default, float) and isinstance(value, int)):
            faults.append(f"{key} is {value!r}, expected {type(default).__name__} as in {default!r}")
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults))
    config.lock()
    for key, value in found.items():
        if isinstance(value, str) and key not in given:
            try:
                _set(config, key, _expand_setting(key, value))
            except ValueError as error:
                raise ValueError(f"{path}: {key}: {error}") from None
    return config


def freeze(config: ConfigDict) -> RunSettings:
    """Frozen settings of a config. ValueError for values that are out of bounds or contradict others."""
    return kind_of(config).from_dict(config.to_dict())


def _add_legacy_settings(path: Path, config: ConfigDict, reference: Mapping[str, Any]) -> None:
    """Add missing settings to a config file of an earlier version, with that version's behaviour, and report them."""
    taken = []
    for key in (key for key in LEGACY_VALUES if key in reference):
        section, name = key.split(".")
        if isinstance(config.get(section), ConfigDict) and name not in config[section]:
            config[section][name] = reference[key] if LEGACY_VALUES[key] is CURRENT_VALUE else LEGACY_VALUES[key]
            taken.append(f"{key}={config[section][name]!r}")
    if taken:
        _log.warning(
            "%s: written for an earlier version; settings that it lacks take the values that reproduce that version: "
            "%s; add them to the file",
            path, ", ".join(taken),
        )  # fmt: skip


def parse(argv: list[str]) -> tuple[RunSettings, dict]:
    """Settings and other options of `pathflip train`. Raises ValueError, naming the error and the closest match."""
    argv = [_expand_argument(argument) for argument in _join_values(argv)]
    for argument in argv:
        name = argument.partition("=")[0]
        if name not in ("--config", *(f"--{option}" for option in OPTIONS)) and not name.startswith("--config."):
            close = difflib.get_close_matches(name, ["--config", *(f"--{option}" for option in OPTIONS)], n=1)
            hint = f"; did you mean {close[0]}?" if close else "; settings are given as --config.section.name=value"
            raise ValueError(f"{argument}: not an option of `pathflip train`{hint}\n{USAGE}")
    names = configs_named(argv)
    if len(names) != 1:
        raise ValueError(
            f"give one --config, a file or one of {', '.join(bundled_configs())}; found {len(names)} such options\n"
            f"{USAGE}"
        )
    given = [argument.partition("=")[0].removeprefix("--config.") for argument in argv]
    config = load_config(names[0], given)
    known = flat_settings(config)
    for argument in argv:
        key = argument.partition("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and key not in known:
            raise ValueError(f"{argument}: {find_config(names[0])[0]} has no setting {key}{_suggestion(key, known)}")
    values = flags.FlagValues()
    kind = kind_of(config)
    none, argv = _split_none_settings(argv, kind)
    rest = [argument for argument in argv if not argument.startswith("--config=")]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["train", *rest])
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("profile", "", "steps to profile: a count, or first:last", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of the first process", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of the run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process", flag_values=values)
    try:
        values(["train", *rest])
    except (flags.Error, TypeError, SyntaxError) as error:
        raise ValueError(str(error)) from None
    for key in none:
        _set(config, key, None)
    settings = kind.from_dict(config.to_dict())
    if not values.workdir:
        raise ValueError(f"--workdir is not given: name the folder that the run writes to\n{USAGE}")
    return settings, {name: values[name].value for name in OPTIONS}


def configs_named(argv: list[str]) -> list[str]:
    """Values of --config among the options."""
    return [argument.partition("=")[2] for argument in _join_values(argv) if argument.startswith("--config=")]


def require(settings: RunSettings) -> None:
    """Raise ValueError for an empty required setting, FileNotFoundError for a missing path."""
    known, values = fields(type(settings)), flat(settings)
    for key, found in known.items():
        if found.required and not values[key]:
            raise ValueError(f"{key} is not set: add --config.{key}=..., {found.required}")
    for key, found in known.items():
        if found.local and is_url(values[key]):
            raise ValueError(
                f"--config.{key}={values[key]}: weights can only be read from a local disk; copy the folder to one"
            )
        if found.exists and values[key] and not exists(as_path(values[key])):
            expected = found.required or found.help
            raise FileNotFoundError(f"--config.{key}={values[key]}: no such file or folder; expected {expected}")


def describe(name: str) -> str:
    """All settings of a config with value, purpose and accepted values, for the command line's help."""
    config = load_config(name)
    lines = [f"settings of {name}:"]
    for key, found in fields(kind_of(config)).items():
        section, _, own = key.partition(".")
        words = [found.help] + ([] if isinstance(found.bounds, Unrestricted) else [found.bounds.words()])
        lines += [f"  --config.{key}={config[section][own]}", *textwrap.wrap("; ".join(words), 108, **_INDENT)]
    return "\n".join(lines)


_INDENT = {"initial_indent": " " * 10, "subsequent_indent": " " * 10}


def _expand_argument(argument: str) -> str:
    """`--name=value` with the value expanded, except for --config, which `find_config` expands."""
    name, equals, value = argument.partition("=")
    if not equals or name == "--config":
        return argument
    try:
        return f"{name}={_expand_setting(name.removeprefix('--config.'), value)}"
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _expand_setting(key: str, value: str) -> str:
    """Expanded value of a setting; in a list of tables, each is expanded."""
    return ",".join(map(expand, value.split(","))) if key == "data.texts" else expand(value)


def _split_none_settings(argv: list[str], kind: Kind) -> tuple[list[str], list[str]]:
    """Settings whose final value is None, and the other arguments: absl reads None as a string, or not at all.

    Raises ValueError for a setting that cannot be None.
    """
    none: dict[str, None] = {}
    others, known, usual = [], fields(kind), defaults(kind)
    for argument in argv:
        option, _, value = argument.partition("=")
        key = option.removeprefix("--config.")
        none.pop(key, None)
        if key == option or value not in ("None", "none") or (value == "none" and isinstance(usual[key], str)):
            others.append(argument)
        elif fault := known[key].objection(key, None, usual[key]):
            raise ValueError(fault)
        elif isinstance(usual[key], str):  # another spelling of an empty string
            others.append(argument)
        else:
            none[key] = None
    return list(none), others


def _set(config: ConfigDict, key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    config[section][name] = value


def _suggestion(key: str, known: dict) -> str:
    """Closest known setting, by its full name or by its last part in another section."""
    last = {name.rpartition(".")[2]: name for name in known}
    part = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7) or [
        last[name] for name in difflib.get_close_matches(part, last, n=1, cutoff=0.7)
    ]
    return f"; did you mean {close[0]}?" if close else ""


def _join_values(argv: list[str]) -> list[str]:
    """Arguments with `--name value` joined to `--name=value`, so that every option is one string."""
    joined, i = [], 0
    while i < len(argv):
        argument = re.sub(r"^-(?=\w)", "--", argv[i])
        if argument.startswith("--") and "=" not in argument and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            argument, i = f"{argument}={argv[i + 1]}", i + 1
        joined.append(argument)
        i += 1
    return joined
