"""Checkpoints: whole or absent, checked when read, restorable on any number of devices.

A run folder holds config.json (all settings), model.json (the model's shape), tokenizer/ (a BERT folder),
checkpoints/<step>/ (parameters, optimizer state, facts) and best/<step>/ (parameters and facts of the step that
validated best). Arrays are flat dicts by parameter name: these names are the format (DESIGN section 6).

This is the one file that imports Orbax: its v1 interface would change nothing elsewhere.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from pathflip_jax.runs.files import BEST, CHECKPOINTS, run_folder
from pathflip_jax.runtime import distributed

log = logging.getLogger(__name__)


@jax.jit
def checksums(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A uint32 per array that any one changed number changes.

    A sum of the bits, each number weighed by an odd factor of its place, modulo 2**32: the same however the array is
    cut over devices, so it is computed where the array lives and checked on any other mesh.
    """

    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def content_hash(params: dict[str, jax.Array]) -> str:
    """A SHA-256 over the checksums of all parameters, by name: equal where every number is."""
    sums = {name: int(value) for name, value in jax.device_get(checksums(params)).items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def flat_state(opt_state: Any) -> dict[str, jax.Array]:
    """Optimizer state as a flat dict by path, such as "1/mu/qformer/query_tokens"."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run: saves in the background, restores the newest sound one; a context manager."""

    def __init__(self, workdir: Path, keep: int, facts: dict, keep_every: int = 0):
        self.workdir = run_folder(workdir)
        self.facts = facts
        self._keep = (max(keep, 2), keep_every)  # two: a damaged one has one before it
        self._latest = _manager(self.workdir / CHECKPOINTS, *self._keep)
        self._best = _manager(self.workdir / BEST, 1)

    def compile(self, params: dict, opt_state: Any) -> None:
        """Compile what `save` computes of arrays like these."""
        jax.block_until_ready((checksums(params), checksums(flat_state(opt_state))))

    def save(self, step: int, params: dict, opt_state: Any, facts: dict) -> None:
        """Start saving; returns once the arrays are copied, so that the next step may overwrite them."""
        arrays = {"params": params, "opt_state": flat_state(opt_state)}
        self._save(self._latest, step, arrays, facts)

    def save_best(self, step: int, params: dict, facts: dict) -> None:
        """Keep these parameters as the best; a best of this or a later step, from before a restart, stays.

        Waits for the checkpoint of the same step, so that a run that restarts never stands before its best.
        """
        self.wait()
        if max(self._best.all_steps(), default=-1) < step:
            self._save(self._best, step, {"params": params}, facts)

    def _save(self, manager: ocp.CheckpointManager, step: int, arrays: dict, facts: dict) -> None:
        sums = {item: {k: int(v) for k, v in jax.device_get(checksums(tree)).items()} for item, tree in arrays.items()}
        about = {"step": step, **self.facts, **facts, "checksums": sums}
        about["checksum"] = _checksum(about)
        items = {item: ocp.args.StandardSave(tree) for item, tree in arrays.items()}
        with _clear_errors(manager, step):
            # force in place of a save_decision_policy: when to save is the loop's to say. Orbax would ask JAX once more
            # whether a host is to stop, and pass over a step before its newest without a word.
            manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items), force=True)

    def restore(self, params: dict, opt_state: Any) -> tuple[int, dict, Any, dict] | None:
        """Step, parameters, optimizer state and facts of the newest sound checkpoint; None where there is none.

        `params` and `opt_state` say shapes and shardings (jax.ShapeDtypeStruct). A damaged checkpoint is named on
        stdout and moved to damaged-<step>, and the one before is taken: what one process finds damaged is damaged for
        all. Raises ValueError when none is sound, NewerOrbaxError for one that is no damage: it stays where it is.
        """
        wanted = {"params": params, "opt_state": flat_state(opt_state)}
        faults = []
        for step in distributed.agree(sorted(self._latest.all_steps(), reverse=True)):
            folder = self.workdir / CHECKPOINTS / str(step)
            try:
                found, facts = restore_arrays(folder, wanted)
            except _Damaged as error:
                faults.append(f"{folder}: {error}")
                continue
            if jax.process_index() == 0:
                for fault in faults:
                    print(f"Damaged checkpoint, going back to step {step}: {fault}", flush=True)
            self._set_aside(step)
            state = jax.tree.unflatten(jax.tree.structure(opt_state), list(found["opt_state"].values()))
            return step, found["params"], state, facts
        if faults:
            raise ValueError(
                "no checkpoint of this run can be read; start anew in another --workdir:\n  " + "\n  ".join(faults)
            )
        return None

    def _set_aside(self, step: int) -> None:
        """Move checkpoints newer than `step` out of the way of the steps that will be run again."""
        newer = [s for s in self._latest.all_steps() if s > step]
        if jax.process_index() == 0:
            for s in newer:
                aside = self.workdir / f"damaged-{s}"
                epath.Path(aside).rmtree(missing_ok=True)
                (self.workdir / CHECKPOINTS / str(s)).rename(aside)
        distributed.agree("moved")
        if newer:  # opened anew: `reload` reads what every older step says of itself, and fails on one that is malformed
            self._latest.close()
            self._latest = _manager(self.workdir / CHECKPOINTS, *self._keep)

    def wait(self) -> None:
        """Wait until what was saved stands on disk."""
        for manager in (self._latest, self._best):
            with _clear_errors(manager, manager.latest_step()):
                manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Wait for the last save and end its threads."""
        self.wait()
        self._latest.close()
        self._best.close()


def _manager(folder: Path, keep: int, keep_every: int = 0) -> ocp.CheckpointManager:
    """Keeps the newest `keep`, and those whose step is a multiple of `keep_every` (0: none) for good."""
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every:
        policies.append(checkpoint_managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        create=True,
        lightweight_initialize=True,  # what a step says of itself is for `restore` to find damaged, not for the start
    )
    return ocp.CheckpointManager(folder, options=options)


class _clear_errors:
    """Say which checkpoint could not be written and what to do, whatever the storage library raised."""

    def __init__(self, manager: ocp.CheckpointManager, step: int | None):
        self.place = f"{manager.directory}/{step}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            raise OSError(
                f"{self.place}: the checkpoint was not written ({str(error).splitlines()[0]}); the ones before it are "
                "whole: free disk space or mend permissions, and run the same command again to resume"
            ) from error


class _Damaged(ValueError):
    """A checkpoint that cannot be taken, on whichever process."""


class NewerOrbaxError(ValueError):
    """A checkpoint that the Orbax of a process is too old to read."""


def lacking_handlers(folder: Path) -> list[str]:
    """The classes of Orbax that wrote one checkpoint and that the Orbax here does not have; sorted."""
    try:
        handlers = set(json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: it says nothing
        return []
    return sorted(name for name in handlers if isinstance(name, str) and not _is_here(name))


def _is_here(handler: str) -> bool:
    """Whether this Orbax has a class; another package is not imported because a file names it."""
    module, _, name = handler.rpartition(".")
    try:
        return module.split(".")[0] == "orbax" and hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def restore_arrays(folder: Path, wanted: dict[str, dict]) -> tuple[dict, dict]:
    """Arrays and facts of one checkpoint; on all processes the error of one that cannot take it.

    Raises NewerOrbaxError where Orbax must be upgraded to read it, else _Damaged.
    """
    arrays, about = _on_all(lambda: _read(folder, wanted))  # apart, for what follows computes over all processes
    kept = about.pop("checksums")
    return _on_all(lambda: (_checked(arrays, kept), about))


def stored_arrays(folder: Path) -> dict[str, dict[str, jax.Array]]:
    """Every array of one checkpoint by item ("params", "opt_state") and name, on one device, as read: unchecked."""
    folder = run_folder(folder)
    one, found = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), {}
    for item in ("params", "opt_state"):
        if (folder / item).is_dir():  # the best has no optimizer state
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                shapes = handler.metadata(folder / item)
                tree = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for name, x in shapes.items()}
                found[item] = handler.restore(folder / item, args=ocp.args.StandardRestore(tree))
    return found


def _on_all(work: Callable) -> Any:
    """What `work` returns, if no process fails in it; else the first failure, raised on all of them.

    A newer Orbax comes before damage, for which a checkpoint is moved away.
    """
    found, fault, newer = None, "", False
    try:
        found = work()
    except Exception as error:  # Orbax raises bare Exception for damaged files
        fault, newer = str(error).splitlines()[0] if str(error) else repr(error), isinstance(error, NewerOrbaxError)
    faults = []
    for process, (other, is_newer) in enumerate(distributed.gather((fault, newer))):
        if other:
            faults.append((is_newer, other if jax.process_count() == 1 else f"{other} (process {process})"))
    if faults:
        is_newer, fault = max(faults, key=lambda told: told[0])
        raise (NewerOrbaxError if is_newer else _Damaged)(fault)
    return found


def _read(folder: Path, wanted: dict[str, dict]) -> tuple[dict, dict]:
    """Arrays and facts as read; NewerOrbaxError for what cannot be read and was written by what is not here."""
    try:
        return _read_items(folder, wanted)
    except Exception as error:  # only then: a class may have moved between versions whose files are the same
        if lacking := lacking_handlers(folder):
            said = str(error).splitlines()[0] if str(error) else repr(error)
            raise NewerOrbaxError(
                f"{folder}: a checkpoint of a newer Orbax; orbax-checkpoint "
                f"{importlib.metadata.version('orbax-checkpoint')} has no {', '.join(lacking)} and cannot read it "
                f"({said}): pip install -U orbax-checkpoint, and run the same command again"
            ) from error
        raise


def _read_items(folder: Path, wanted: dict[str, dict]) -> tuple[dict, dict]:
    """Arrays as read, without Orbax's barriers: a process that fails must not leave the others waiting there."""
    about = ocp.JsonCheckpointHandler().restore(folder / "about", ocp.args.JsonRestore())
    if about.pop("checksum", None) not in (None, _checksum(about)):  # None: written before there was one
        raise ValueError("its facts are not those that were saved")
    arrays = {}
    for item, tree in wanted.items():
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            metadata = handler.metadata(folder / item)
            found = {name: tuple(leaf.shape) for name, leaf in metadata.items()}
            expected = {name: tuple(leaf.shape) for name, leaf in tree.items()}
            if found != expected:
                names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
                raise ValueError(f"its {item} are not of this model: {', '.join(names[:5])} ({len(names)} in all)")
            restored = handler.restore(folder / item, args=ocp.args.StandardRestore(tree))
        arrays[item] = {name: restored[name] for name in tree}
    return arrays, about


def _checksum(facts: dict) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _checked(arrays: dict[str, dict], kept: dict[str, dict]) -> dict[str, dict]:
    """The arrays, if their numbers are those that were saved; ValueError names one that is not."""
    for item, tree in arrays.items():
        for name, value in jax.device_get(checksums(tree)).items():
            if int(value) != kept[item][name]:
                raise ValueError(f"the numbers of {name} are not those that were saved")
    return arrays


def saved_steps(folder: Path) -> list[int]:
    """Whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(step) for step in ocp.path.step.checkpoint_steps(folder))
