"""Compatibility with runs of other versions: settings that they lacked, and settings unknown to this version.

A run may outlive many versions. The value implied by a setting's absence in an earlier version is recorded with the
setting in `settings/`; a setting that a later version wrote, unknown here, is refused.
"""

import dataclasses
import functools
import importlib.metadata
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pathflip_jax.model.config import CONFIGS
from pathflip_jax.model.versions import before
from pathflip_jax.settings.kinds import KINDS, fields, kind_of

WRITTEN_BY = "written_by"  # section of config.json: the version that began the run
# Entries of a run's config.json other than settings, by section; of data and lm, all that readers use.
FACTS = {
    "data": ("encoder", "feature_dim", "recipe", "cut", "edge_um", "edge_px", "hashes", "meanings", "splits"),
    "lm": ("aligner_hash", "decoder_hash", "start_hash"),
    WRITTEN_BY: ("version",),
    "assumed": None,
    "converted_from": None,
}
READ = ("data", "lm")  # the sections that determine how the weights of a run are used


def this_version() -> str:
    """Version of this package."""
    return importlib.metadata.version("pathflip-jax")


def git_revision() -> str:
    """Git commit of this code, with "+" where files differ from it; "unknown" outside a clone.

    Code installed in an environment inside another project's clone is not attributed to that clone.
    """
    folder = Path(__file__).parents[1]
    try:
        ours = ["git", "ls-files", "--full-name", "--error-unmatch", "--", str(Path(__file__).relative_to(folder))]
        tracked = subprocess.run(ours, cwd=folder, capture_output=True, text=True)
        if tracked.stdout.strip() != Path(__file__).relative_to(folder.parent).as_posix():
            return "unknown"
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
        if commit.returncode:
            return "unknown"
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def signed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, with the version that writes them."""
    return {**config, WRITTEN_BY: {"version": this_version()}}


def unknown_settings(config: Mapping[str, Any], sections: Iterable[str] | None = None) -> list[str]:
    """Settings in a run's config.json that are unknown to this version, in all sections or in these."""
    known, found = _known_settings(), []
    for section, values in config.items():
        if sections is not None and section not in sections:
            continue
        if section not in known:
            found.append(section)
        elif known[section] is not None and isinstance(values, Mapping):
            found += [f"{section}.{name}" for name in values if name not in known[section]]
    return found


@functools.cache
def _known_settings() -> dict[str, frozenset[str] | None]:
    """Known names in each section of config.json, over all kinds of run; None where names are free."""
    names: dict[str, set[str] | None] = {section: None if of is None else set(of) for section, of in FACTS.items()}
    for key in {key for kind in KINDS for key in fields(kind)}:
        section, _, name = key.partition(".")
        names.setdefault(section, set()).add(name)
    names["model"] |= {field.name for kind in CONFIGS.values() for field in dataclasses.fields(kind)}
    return {section: None if of is None else frozenset(of) for section, of in names.items()}


def version_of(config: Mapping[str, Any]) -> str | None:
    """Version that wrote a run's config.json; None where it is not recorded."""
    wrote = config.get(WRITTEN_BY)
    return wrote.get("version") if isinstance(wrote, Mapping) else None


def refusal(place: object, names: Iterable[str], version: str | None) -> str:
    """Error message for settings unknown to this version in a file that `version` wrote (None: not recorded)."""
    wrote = f"version {version} wrote it" if version else "it does not say which version wrote it"
    if version not in (None, this_version()):
        cure = f"upgrade pathflip-jax to {version} or later"
    else:
        cure = "upgrade pathflip-jax to a version that has it, or restore the file as it was written"
    return f"{place}: pathflip-jax {this_version()} has no setting called {', '.join(names)} ({wrote}); {cure}"


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a run trained here, completed with its version's behaviour for each missing setting."""
    found = dict(config)
    if "train" in found:
        for key in fields(kind_of(found)):
            section, _, name = key.partition(".")
            if name not in found.get(section, {name: None}):
                found[section] = before(section, [name]) | found[section]
    return found


def drop_legacy_values(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without those equal to the behaviour before their setting existed, so that hashes survive new settings."""
    stated = before(section, values)
    return {name: value for name, value in values.items() if name not in stated or stated[name] != value}
