"""Resuming the run of a folder: settings that must not change, on other hosts and devices too."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax

from pathflip_jax.convert.versions import WRITTEN_BY, refusal, unknown_settings, version_of
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe, objection
from pathflip_jax.data.storage import json_files
from pathflip_jax.monitoring.metrics import METRICS
from pathflip_jax.runs import checkpoints, files
from pathflip_jax.settings.fields import CURRENT_VALUE
from pathflip_jax.settings.kinds import LEGACY_VALUES, MAY_CHANGE, RunSettings, defaults, flat, kind_of
from pathflip_jax.training.fingerprints import same_data

RECIPE = "recipe"  # of the features, in section data of config.json
# The content of paths is compared by hash. Of the facts besides the settings, only the split counts may change; recipes
# are compared by what both of them know.
_MAY_CHANGE = MAY_CHANGE | {"data.splits", f"data.{RECIPE}"}


def resume_as(settings: RunSettings, begun: dict, home: Path) -> RunSettings:
    """Settings with which a run that began with `begun` in `home` resumes.

    A run of an earlier version keeps that version's behaviour: a setting that it lacks takes the value that reproduces
    it (`settings.fields.Setting.before`), which is reported once. Raises ValueError for a run of a later version with
    unknown settings.
    """
    if unknown := unknown_settings(begun):
        raise ValueError(refusal(home / files.CONFIG, unknown, version_of(begun)))
    kind = type(settings)
    if "train" not in begun or kind_of(begun) != kind:
        return settings
    taken, changes, values = [], {}, flat(settings)
    for key, default in defaults(kind).items():
        section, _, name = key.partition(".")
        if name in begun.get(section, {}):
            continue
        now, value = values[key], LEGACY_VALUES.get(key, default)
        chosen = key in MAY_CHANGE and now != default
        if value is not CURRENT_VALUE and value != now and not chosen:
            changes[key] = value
        kept = changes.get(key, now)
        taken.append(f"{key}={kept!r}" + (f" (not {now!r})" if kept != now else ""))
    if taken and jax.process_index() == 0:
        print(
            f"{home}: a run of an earlier version, which resumes with that version's behaviour; settings that it "
            f"did not have take the values that reproduce it: {', '.join(taken)}",
            file=sys.stderr,
        )
    return settings.with_changes(changes)


def lock_to_run(workdir: Path, resolved: dict, describe: Callable[[Path], None]) -> None:
    """Bind `workdir` to this run; ValueError lists the differences if it is bound to another.

    The number of steps may be raised, or lowered down to those already done: the learning rate then continues along the
    schedule of the new length. `describe` writes a run's description into a folder. The folder of
    `train.checkpoints`, the only one to survive a lost machine, is bound too. A run that ended before its first
    checkpoint, on a wrong setting or for lack of memory, binds neither.
    """
    home = files.run_folder(resolved["train"]["checkpoints"] or workdir)
    if (workdir / METRICS).exists() and (workdir / files.CONFIG).exists():
        before = json_files.read_json(workdir / files.CONFIG).get("train", {}).get("checkpoints") or workdir
        if files.run_folder(before) != home and saved_config(files.run_folder(before)) is not None:
            raise ValueError(
                f"{workdir} has the logs of a run with checkpoints in {before}, not in {home}; set "
                f"--config.train.checkpoints={before}, or name another --workdir"
            )
    before = saved_config(home)
    if before is not None:
        differing = _differing(before, resolved)
        if differing:
            raise ValueError(
                f"{home} holds a run with other settings:\n  " + "\n  ".join(differing) + "\n"
                "use the settings of that run to resume it, or name another --workdir to start a new one"
            )
        _change_length(home, before, resolved["train"])
    elif jax.process_index() == 0:
        describe(home)
    if home != workdir and jax.process_index() == 0:
        describe(workdir)


def saved_config(home: Path) -> dict | None:
    """Config of the run with checkpoints in `home`; None without a complete one, even if a killed run left files."""
    if (home / files.CONFIG).exists() and checkpoints.saved_steps(home / files.CHECKPOINTS):
        return json_files.read_json(home / files.CONFIG)
    return None


def _change_length(home: Path, before: dict, now: dict) -> None:
    """Record a changed number of steps in the config of the run. ValueError if it is already past that step."""
    steps, old = now["steps"], before["train"]["steps"]
    if steps == old:
        return
    reached = checkpoints.saved_steps(home / files.CHECKPOINTS)[-1]
    if steps < reached:
        raise ValueError(
            f"{home}: the run has already done {reached} steps, more than the {steps} of these settings; set "
            f"--config.train.steps (or train.epochs) to {reached} steps or more, or name another --workdir"
        )
    if jax.process_index() == 0:
        print(
            f"{home}: the run was to end at step {old} and will now end at step {steps}; from step {reached} on, the "
            f"learning rate and the batches are those of a run of {steps} steps",
            file=sys.stderr,
        )
        length = {"steps": steps, "epochs": now["epochs"]}
        json_files.write_json(home / files.CONFIG, before | {"train": before["train"] | length})


def _differing(before: dict, now: dict) -> list[str]:
    """Differences between a run's settings and the current ones, except for settings that the run began without."""
    before, now = dict(before), dict(now)
    before["data"], now["data"] = same_data(before.get("data", {}), now.get("data", {}))
    for found in (before, now):
        found.pop(WRITTEN_BY, None)
    known = {section: values | before.get(section, {}) for section, values in now.items()}
    return _recipe_differences(before["data"], now["data"]) + differences(_fixed(before | known), _fixed(now))


def _recipe_differences(before: dict, now: dict) -> list[str]:
    try:
        recipes = [FeatureRecipe.from_dict(data.get(RECIPE) or {}) for data in (now, before)]
    except ValueError as error:
        raise ValueError(f"data.{RECIPE} in the run's config.json: {error}; restore a copy of the file") from None
    found = objection(*recipes)
    return [f"data.{RECIPE}: {found}"] if found else []


def _fixed(resolved: dict) -> dict:
    """Settings that identify a run."""
    return {
        section: {name: x for name, x in values.items() if f"{section}.{name}" not in _MAY_CHANGE}
        for section, values in resolved.items()
    }


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Differences between two nested configs, as "train.steps: 100 in the run, 200 now"."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new and not (old != old and new != new):
            found.append(f"{prefix}{name}: {old!r} in the run, {new!r} now")
    return found
