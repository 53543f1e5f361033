"""Checkpoints: written atomically, verified when read, restorable on any number of devices.

A run folder holds config.json (all settings), model.json (the model's configuration), tokenizer/ (a BERT folder),
checkpoints/<step>/ (parameters, optimizer state, facts) and best/<step>/ (parameters and facts of the step with the
best validation score). Arrays are flat dicts by parameter name: these names are the format (DESIGN section 6).

This is the only file that imports Orbax, so that a move to its v1 interface changes no other file.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.runs.checksums import checksum_of_facts, checksums, verified
from pathflip_jax.runs.files import BEST, CHECKPOINTS, run_folder
from pathflip_jax.runtime import distributed

log = logging.getLogger(__name__)
RUN = "run"  # fact that ties a checkpoint and its local counterparts to one run


def flat_state(opt_state: Any) -> dict[str, jax.Array]:
    """Optimizer state as a flat dict by path, such as "1/mu/qformer/query_tokens"."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Checkpoints:
    """Checkpoints of a run: saves in the background, restores the newest intact one; a context manager.

    With `local`, a folder on a disk (or in memory) of each host, `save_locally` adds checkpoints between those of the
    run, and the newest of both is restored. A local one is valid only while a checkpoint of the same run exists.
    """

    def __init__(self, workdir: Path, keep: int, facts: dict, keep_every: int = 0, local: str = ""):
        self.workdir = run_folder(workdir)
        self.facts = facts
        self._local = _LocalTier(local, self.workdir) if local else None
        self._run: str | None = None  # ties local checkpoints to those of the run
        self._keep = (max(keep, 2), keep_every)  # at least two, so that a damaged one has a fallback
        self._latest = _manager(self.workdir / CHECKPOINTS, *self._keep)
        self._best = _manager(self.workdir / BEST, 1)

    def compile(self, params: dict, opt_state: Any) -> None:
        """Compile the computations of `save` for arrays of these shapes."""
        jax.block_until_ready((checksums(params), checksums(flat_state(opt_state))))

    def save(self, step: int, params: dict, opt_state: Any, facts: dict) -> None:
        """Start saving; returns once the arrays are copied, so that the next step may overwrite them."""
        arrays = {"params": params, "opt_state": flat_state(opt_state)}
        self.wait()  # with two managers saving concurrently, one may wait forever for the signals of its threads
        if self._local:
            self._run = self._run or distributed.agree(uuid.uuid4().hex)
            facts = facts | {RUN: self._run}
        self._save(self._latest, step, arrays, facts)

    def save_locally(self, step: int, params: dict, opt_state: Any, facts: dict) -> None:
        """Start saving this host's share to its own disk; a no-op before the first `save`, which it depends on.

        Waits for the previous save, like `save`.
        """
        if self._run:
            self.wait()
            arrays = {"params": params, "opt_state": flat_state(opt_state)}
            self._save(self._local.manager, step, arrays, facts | {RUN: self._run}, ocp.args.PyTreeSave)

    def save_best(self, step: int, params: dict, facts: dict) -> None:
        """Save these parameters as the best, unless a best of this or a later step is there from before a restart.

        Waits for the checkpoint of the same step, so that a restarted run never resumes before its best step.
        """
        self.wait()
        if max(self._best.all_steps(), default=-1) < step:
            self._save(self._best, step, {"params": params}, facts)

    def _save(
        self, manager: ocp.CheckpointManager, step: int, arrays: dict, facts: dict, kind: type = ocp.args.StandardSave
    ) -> None:
        sums = {item: {k: int(v) for k, v in jax.device_get(checksums(tree)).items()} for item, tree in arrays.items()}
        about = {"step": step, **self.facts, **facts, "checksums": sums}
        about["checksum"] = checksum_of_facts(about)
        items = {item: kind(tree) for item, tree in arrays.items()}
        with _explained_save_errors(manager, step):
            # force instead of a save_decision_policy, as the loop decides when to save. Orbax would query JAX again for
            # preemption, and silently skip a step earlier than its newest.
            manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items), force=True)

    def restore(self, params: dict, opt_state: Any, before: int | None = None) -> tuple[int, dict, Any, dict] | None:
        """Step, parameters, optimizer state and facts of the newest intact checkpoint; None if there is none.

        `params` and `opt_state` give shapes and shardings (jax.ShapeDtypeStruct). Local checkpoints are used only for
        steps before `before`. A damaged checkpoint is reported on stdout and moved to damaged-<step>, or removed if
        local, and the previous one is used: damage found by one process counts for all. Raises ValueError when none is
        intact, NewerOrbaxError for one that is not damaged but unreadable here: it stays in place.
        """
        wanted = {"params": params, "opt_state": flat_state(opt_state)}
        faults = []
        for step, folder in self._candidates(before):
            try:
                found, facts = restore_arrays(folder, wanted)
            except _Damaged as error:
                faults.append(f"{folder}: {error}")
                continue
            if jax.process_index() == 0:
                for fault in faults:
                    print(f"Damaged checkpoint, going back to step {step}: {fault}", flush=True)
            self._set_aside(step)
            self._run = facts.pop(RUN, None)
            state = jax.tree.unflatten(jax.tree.structure(opt_state), list(found["opt_state"].values()))
            return step, found["params"], state, facts
        if faults:
            raise ValueError(
                "no checkpoint of this run can be read; start a new run in another --workdir:\n  " + "\n  ".join(faults)
            )
        if self._local:
            self._local.forget(after=-1)
        return None

    def _candidates(self, before: int | None) -> list[tuple[int, Path]]:
        """Checkpoints to try, as (step, folder): newest first, and local ones first within a step."""
        home = self.workdir / CHECKPOINTS
        steps = distributed.agree(sorted(self._latest.all_steps(), reverse=True))
        found = [(step, False, home / str(step)) for step in steps]
        if self._local:
            runs = (_run_of(home / str(step)) for step in steps)
            run = distributed.agree(next((run for run in runs if run is not None), ""))
            local = self._local.steps(run) if run else []
            found += [(step, True, self._local.folder / str(step)) for step in local if before is None or step < before]
        return [(step, folder) for step, _, folder in sorted(found, reverse=True)]

    def _set_aside(self, step: int) -> None:
        """Move checkpoints newer than `step` aside, as those steps will be repeated."""
        newer = [s for s in self._latest.all_steps() if s > step]
        if jax.process_index() == 0:
            for s in newer:
                aside = self.workdir / f"damaged-{s}"
                epath.Path(aside).rmtree(missing_ok=True)
                (self.workdir / CHECKPOINTS / str(s)).rename(aside)
        distributed.agree("moved")
        if newer:  # reopened: `reload` reads the metadata of every older step, and fails on a malformed one
            self._latest.close()
            self._latest = _manager(self.workdir / CHECKPOINTS, *self._keep)
        if self._local:
            self._local.forget(after=step)

    def wait(self) -> None:
        """Wait until all saves are on disk."""
        for manager in self._managers():
            with _explained_save_errors(manager, manager.latest_step()):
                manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Wait for the last save and stop its threads."""
        self.wait()
        for manager in self._managers():
            manager.close()

    def _managers(self) -> list[ocp.CheckpointManager]:
        return [self._latest, self._best, *(self._local.opened if self._local else ())]


def _manager(folder: Path, keep: int, keep_every: int = 0) -> ocp.CheckpointManager:
    """Checkpoint manager that keeps the newest `keep`, and permanently every multiple of `keep_every` (0: none)."""
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every:
        policies.append(checkpoint_managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        create=True,
        lightweight_initialize=True,  # damaged step metadata is handled by `restore`, not at startup
    )
    return ocp.CheckpointManager(folder, options=options)


class _LocalTier:
    """Local checkpoints: each process saves its own share on its own host, without waiting for the others.

    It uses the options of Orbax's ordinary manager with which its multi-tier checkpointing runs on each host. A process
    reads only its own files: with another number of processes, or if one has lost its share, there are none.
    """

    def __init__(self, folder: str, home: Path):
        if is_url(folder):
            raise ValueError(
                f"train.local_checkpoints={folder}: expected a folder on a disk or in the memory of each host; use "
                "train.checkpoints for a bucket"
            )
        key = hashlib.sha256(str(home).encode()).hexdigest()[:12]
        share = f"{jax.process_index()}-of-{jax.process_count()}"
        self.folder = Path(folder).expanduser().resolve() / f"{home.name}-{key}" / share
        self.opened: list[ocp.CheckpointManager] = []

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Checkpoint manager, opened by the first save."""
        if not self.opened:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.opened.append(_local_manager(self.folder))
        return self.opened[0]

    def steps(self, run: str) -> list[int]:
        """Steps of a run that are complete on every process."""
        own = [step for step in saved_steps(self.folder) if _run_of(self.folder / str(step)) == run]
        return sorted(set.intersection(*map(set, distributed.gather(own))))

    def forget(self, after: int) -> None:
        """Remove the steps after `after`, which will be repeated or belong to another run; before the first save."""
        for step in saved_steps(self.folder):
            if step > after:
                epath.Path(self.folder / str(step)).rmtree()


def _local_manager(folder: Path) -> ocp.CheckpointManager:
    """Orbax manager for this process alone, which saves every shard that it holds, replicas included."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(None, active_processes={this}, barrier_sync_key_prefix=f"local{this}")
    shares = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    arrays = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, shares)),
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, arrays)
    registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler(multiprocessing_options=alone))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.LatestN(2),
        multiprocessing_options=alone,
        create=False,
        enable_per_process_directory_creation=True,
        lightweight_initialize=True,
    )
    logging.getLogger("absl").addFilter(lambda record: "Global object size logging" not in str(record.msg))  # each save
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


def _run_of(folder: Path) -> str | None:
    """Run id recorded in a checkpoint; None if there is none."""
    try:
        return _read_facts(folder).get(RUN)
    except Exception:  # damaged: Orbax raises arbitrary exceptions
        return None


class _explained_save_errors:
    """Context manager that turns any error of the storage library into an OSError with the checkpoint and the cure."""

    def __init__(self, manager: ocp.CheckpointManager, step: int | None):
        self.place = f"{manager.directory}/{step}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            raise OSError(
                f"{self.place}: the checkpoint was not written ({str(error).splitlines()[0]}); earlier checkpoints are "
                "intact: free disk space or fix permissions, and run the same command again to resume"
            ) from error


class _Damaged(ValueError):
    """A checkpoint that cannot be restored, on any process."""


class NewerOrbaxError(ValueError):
    """A checkpoint written by a newer Orbax than that of some process."""


def missing_handlers(folder: Path) -> list[str]:
    """Sorted Orbax classes that wrote a checkpoint and are missing from the installed Orbax."""
    try:
        handlers = set(json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: no classes recorded
        return []
    return sorted(name for name in handlers if isinstance(name, str) and not _is_installed(name))


def _is_installed(handler: str) -> bool:
    """Whether the installed Orbax has a class; no other package is imported because a file names it."""
    module, _, name = handler.rpartition(".")
    try:
        return module.split(".")[0] == "orbax" and hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def restore_arrays(folder: Path, wanted: dict[str, dict]) -> tuple[dict, dict]:
    """Arrays and facts of one checkpoint; an error of one process is raised on all.

    Raises NewerOrbaxError if Orbax must be upgraded to read it, else _Damaged.
    """
    arrays, about = _on_all_processes(lambda: _read(folder, wanted))
    kept = about.pop("checksums")
    # Separate from reading, as the checksums are computed over the devices of all processes.
    return _on_all_processes(lambda: (verified(arrays, kept), about))


def stored_arrays(folder: Path) -> dict[str, dict[str, jax.Array]]:
    """All arrays of a checkpoint by item ("params", "opt_state") and name, on one device and unverified."""
    folder = run_folder(folder)
    one, found = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), {}
    for item in ("params", "opt_state"):
        if (folder / item).is_dir():  # the best has no optimizer state
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                shapes = handler.metadata(folder / item)
                tree = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for name, x in shapes.items()}
                found[item] = handler.restore(folder / item, args=ocp.args.StandardRestore(tree))
    return found


def _on_all_processes(work: Callable) -> Any:
    """Result of `work` if it succeeds on all processes; else the first failure, raised on all of them.

    A newer Orbax takes precedence over damage, as damaged checkpoints are moved away.
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
    """Arrays and facts, unverified; NewerOrbaxError for files written by Orbax classes that are missing here."""
    try:
        return _read_items(folder, wanted)
    except Exception as error:  # checked only on failure: a class may have moved between versions with identical files
        if lacking := missing_handlers(folder):
            said = str(error).splitlines()[0] if str(error) else repr(error)
            raise NewerOrbaxError(
                f"{folder}: a checkpoint of a newer Orbax; orbax-checkpoint "
                f"{importlib.metadata.version('orbax-checkpoint')} has no {', '.join(lacking)} and cannot read it "
                f"({said}): pip install -U orbax-checkpoint, and run the same command again"
            ) from error
        raise


def _read_items(folder: Path, wanted: dict[str, dict]) -> tuple[dict, dict]:
    """Arrays, unverified, read without Orbax's barriers: a failing process must not leave the others waiting."""
    about, arrays = _read_facts(folder), {}
    for item, tree in wanted.items():
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            metadata = handler.metadata(folder / item)
            found = {name: tuple(leaf.shape) for name, leaf in metadata.items()}
            expected = {name: tuple(leaf.shape) for name, leaf in tree.items()}
            if found != expected:
                names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
                raise ValueError(f"its {item} do not match this model: {', '.join(names[:5])} ({len(names)} in all)")
            restored = handler.restore(folder / item, args=ocp.args.StandardRestore(tree))
        arrays[item] = {name: restored[name] for name in tree}
    return arrays, about


def _read_facts(folder: Path) -> dict:
    about = ocp.JsonCheckpointHandler().restore(folder / "about", ocp.args.JsonRestore())
    if about.pop("checksum", None) not in (None, checksum_of_facts(about)):  # None: written before checksums existed
        raise ValueError("its facts do not match their checksum")
    return about


def saved_steps(folder: Path) -> list[int]:
    """Complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(step) for step in ocp.path.step.checkpoint_steps(folder))
