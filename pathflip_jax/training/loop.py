"""Training: from a config and a working folder to a trained, resumable, measured run.

One loop for every stage (`training/stage.py` says what a stage is). All that happens is a function of config, data and
seed: a run that is stopped, killed or moved goes on as if nothing had happened (DESIGN section 6).
"""

import functools
import hashlib
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pathflip_jax.convert.versions import git_revision
from pathflip_jax.data.batches.pipeline import look_up
from pathflip_jax.data.storage.files import is_url
from pathflip_jax.model.parameters import Params
from pathflip_jax.monitoring import goodput
from pathflip_jax.monitoring.metrics import METRICS, MetricsWriter, import_wandb, read_metrics, try_to_plot
from pathflip_jax.monitoring.profiling import Profiler, profiled_steps
from pathflip_jax.monitoring.telemetry import USEFUL, Telemetry
from pathflip_jax.runs import checkpoints as checkpoint
from pathflip_jax.runs import files
from pathflip_jax.runs import lock as run_lock
from pathflip_jax.runs.lock import RunLock, StillEndingError
from pathflip_jax.runtime import distributed, sharding
from pathflip_jax.runtime.compilation import compiler_options
from pathflip_jax.runtime.distributed import TRY_AGAIN, Watchdog
from pathflip_jax.training import settings
from pathflip_jax.training.alignment import alignment_training
from pathflip_jax.training.optim import OptimConfig, learning_rate, make_optimizer
from pathflip_jax.training.resume import begun_config, claim, go_on_as
from pathflip_jax.training.stage import Training
from pathflip_jax.training.step import make_step
from pathflip_jax.training.validation import choose_best, place_features


class Stopped(Exception):
    """The run was told to stop (SIGTERM, SIGHUP), has saved its state, and goes on when it is started again."""


def train(
    config: ConfigDict, workdir: str | Path, *, profile: str = "", began: float | None = None
) -> dict[str, float]:
    """Train, or go on training, the run of this config in `workdir`; returns the last metrics.

    `profile` names steps to profile (`monitoring.profiling.profiled_steps`); the process counts as started at `began`,
    seconds of `time.time()`, or now. Raises Stopped after SIGTERM, once the state is saved, and StillEndingError where
    another start was told to stop and is not done with it; InUseError where another run is at work in `workdir`;
    ValueError and OSError for input that cannot be used, with the cure; MemoryError where a step would not fit;
    FloatingPointError when the loss is no longer a number.
    """
    ledger = goodput.Ledger(began)
    settings.require(config)
    profiled_steps(profile, 0)
    if config.train.wandb_project:
        import_wandb(config.train.wandb_project)
    if is_url(workdir):
        raise ValueError(
            f"--workdir={workdir}: logs are written to a local disk; name a folder there, and "
            f"--config.train.checkpoints={workdir} for the checkpoints"
        )
    workdir = Path(workdir).resolve()
    mesh = sharding.make_mesh(**config.mesh)
    if config.data.regions % mesh.shape["region"]:
        raise ValueError(
            f"data.regions={config.data.regions} cannot be spread evenly over mesh.region={mesh.shape['region']} "
            "devices; set one to a multiple of the other"
        )
    home = files.run_folder(config.train.checkpoints or workdir)
    with (
        StopSignal() as stop,
        Watchdog(config.train.hang_seconds) as watchdog,
        run_lock.hold((workdir, home), stop.asked) as lock,
        jax.set_mesh(mesh),
    ):
        watchdog.at(0, "opening the data", timed=False)
        begun = distributed.agree(begun_config(home)) or {"data": {}}
        config = go_on_as(config, begun, home)
        training = open_training(config, mesh, begun)
        steps = config.train.steps or config.train.epochs * training.batches.steps_per_epoch
        resolved = training.resolved
        resolved["train"]["steps"] = steps
        if config.train.checkpoints:  # for readers that stand in another folder
            resolved["train"]["checkpoints"] = str(files.run_folder(config.train.checkpoints))
        claim(workdir, resolved, training.describe)
        return fit(training, config, steps, mesh, workdir, Guard(ledger, stop, watchdog, lock, profile))


def open_training(config: ConfigDict, mesh: jax.sharding.Mesh, begun: dict) -> Training:
    """What a config trains: slides against texts, or with a section `lm` a language model about slides."""
    if "lm" in config:
        from pathflip_jax.training.language import language_training

        return language_training(config, mesh, begun=bool(begun["data"]))
    return alignment_training(config, mesh, begun["data"].get("text_groups", 0))


class Guard(NamedTuple):
    """Monitors of a run: its time by cause, requests to stop, hangs, the lock on its folder, the steps to profile."""

    ledger: goodput.Ledger
    stop: "StopSignal"
    watchdog: Watchdog
    lock: RunLock
    profile: str


def fit(
    training: Training, config: ConfigDict, steps: int, mesh: jax.sharding.Mesh, workdir: Path, guard: Guard
) -> dict[str, float]:
    """The loop: step, validate, save; from the newest sound checkpoint, if there is one."""
    ledger, stop, watchdog, lock, profile = guard
    optim, setup, primary = OptimConfig(**config.optim), config.train, jax.process_index() == 0
    schedule = learning_rate(optim, steps, training.batches.steps_per_epoch)
    optimizer = make_optimizer(optim, schedule)
    resolved, validate = training.resolved, training.validate
    compiled = 0
    plain_step = make_step(training.stage, training.build, optimizer, schedule, setup.accumulate, setup.seed)

    def counted_step(learned, frozen, opt_state, batch, number, features):
        nonlocal compiled
        compiled += 1  # Python runs through here only to compile
        batch = look_up(batch, features)
        learned, opt_state, metrics = plain_step(learned, frozen, opt_state, batch, number)
        return learned, opt_state, metrics | {USEFUL: training.useful_operations(batch)}

    def kept(learned: Params, frozen: Params) -> Params:
        return {name: x for name, x in (learned | frozen).items() if training.keeps(name)}

    facts = {"config": resolved, "git": git_revision()}
    with (
        ledger,
        Profiler(workdir, profile, ledger) as profiler,
        checkpoint.Checkpoints(setup.checkpoints or workdir, setup.keep, facts, setup.keep_every) as checkpoints,
    ):
        start, learned, frozen, opt_state, best = _begin(training, optimizer, mesh, checkpoints, guard)
        if primary and start < steps:
            ledger.open(workdir, start, save_every=setup.save_every, preemptions_per_day=setup.preemptions_per_day)
        telemetry = Telemetry(ledger, mesh, training.compute_dtype)
        if primary:
            print(telemetry.describe(), file=sys.stderr)
        places = jax.tree.map(lambda x: x.sharding, (learned, opt_state))
        step = jax.jit(
            counted_step,
            donate_argnums=(0, 2),
            out_shardings=(*places, NamedSharding(mesh, P())),
            compiler_options=compiler_options(setup.deterministic),
        )
        batches = telemetry.timed_batches(training.batches.__iter__(start))
        watchdog.at(start, "reading the next batch")
        with ledger.during(goodput.DATA):
            batch = sharding.place_batch(mesh, next(batches)) if start < steps else None
        watchdog.at(start, "placing the features on the devices", slow=True)
        features = place_features(mesh, training.batches)
        watchdog.at(start, "compiling", timed=False)
        if start < steps:
            with ledger.during(goodput.COMPILATION):
                step = step.lower(learned, frozen, opt_state, batch, np.int32(start), features).compile()
                checkpoints.compile(kept(learned, frozen), opt_state)
            training.require_room(step)
            if stop.requested(start):
                raise Stopped(f"stopped before step {start + 1} of {steps}; the same command goes on from there")
        step = telemetry.timed_step(step)
        with (
            MetricsWriter(
                workdir,
                start,
                steps,
                slides_per_step=setup.batch_size,
                primary=primary,
                wandb_project=setup.wandb_project,
                config=resolved,
            ) as writer,
            telemetry,
            ledger.during(goodput.STEP),
        ):
            pending: tuple[int, dict] | None = None  # a step under way, whose metrics nobody has waited for

            def write(scores: dict[str, float] | None = None) -> None:
                nonlocal pending
                if pending is not None:
                    (number, metrics), pending = pending, None
                    row = {name: float(x) for name, x in jax.device_get(metrics).items()} | (scores or {})
                    _refuse_nan(number, row["loss"], workdir)
                    writer.write(number, row | telemetry.row(number, row[USEFUL]))
                    ledger.progress(number)

            for done in range(start + 1, steps + 1):
                watchdog.at(done, "computing the step")
                profiler.begin(done)
                learned, opt_state, metrics = step(learned, frozen, opt_state, batch, np.int32(done - 1), features)
                if done < steps:
                    watchdog.at(done, "reading the next batch")
                    batch = sharding.place_batch(mesh, next(batches))
                watchdog.at(done, "waiting for the devices")
                write()  # of the step before: the device is busy with this one
                pending = (done, metrics)
                watchdog.at(done, "ending the step", slow=True)  # with a profile that is written, at times
                profiler.end(done, metrics)
                lock.require()
                last, stopping, improved = done == steps, stop.requested(done), False
                if stopping:
                    lock.ending()
                if validate and (last or done % setup.eval_every == 0):
                    watchdog.at(done, "waiting for the devices")
                    jax.block_until_ready(metrics)  # time from here on is the validation's
                    with ledger.during(goodput.EVALUATION):
                        scores = validate(learned, frozen, functools.partial(watchdog.at, done))
                    best, improved = choose_best(best, done, scores[setup.select], setup.select, setup.select_margin)
                    write(scores)
                if last or stopping or improved or done % setup.save_every == 0:
                    watchdog.at(done, "writing the metrics")
                    write()
                    writer.flush()  # a checkpoint is never ahead of its metrics
                    watchdog.at(done, "saving", slow=True)  # and waiting for the save before, in the background
                    lock.require(look=True)
                    with ledger.saving(done):
                        checkpoints.save(done, kept(learned, frozen), opt_state, {"best": best})
                with ledger.during(goodput.SAVE):
                    if improved:
                        watchdog.at(done, "saving the best", slow=True)
                        checkpoints.save_best(done, kept(learned, frozen), {"best": best})
                    if stopping or last:
                        watchdog.at(done, "waiting for the save", slow=True)
                        checkpoints.wait()
                        watchdog.at(done, "closing the logs", slow=True)
                if stopping and not last:
                    raise Stopped(f"stopped at step {done} of {steps}, saved; the same command goes on from there")
    watchdog.at(steps, "drawing the plots", slow=True)
    if primary:
        try_to_plot(workdir)
        print(f"{workdir}: {steps} steps done; the step was compiled {compiled} times", file=sys.stderr)
        if start < steps:
            print(goodput.try_to_describe(workdir), file=sys.stderr)
    distributed.agree("done")  # else the others would wait for process 0 in JAX's farewell, which gives up sooner
    rows = read_metrics(workdir / METRICS)
    return rows[-1] if rows else {}  # none where the logs of a run that was done before are gone


def _begin(training: Training, optimizer, mesh, checkpoints, guard: Guard):
    """(step, learned, frozen, optimizer state, best): from the newest sound checkpoint, else from the beginning.

    Shapes and places come first, so that nothing is computed that a checkpoint holds.
    """
    shapes = training.shapes
    places = sharding.placements(mesh, shapes)
    learns = {name for name in shapes if training.stage.trainable(name)}
    opt_shapes = jax.eval_shape(optimizer.init, {name: shapes[name] for name in learns})
    opt_places = sharding.placements(mesh, opt_shapes)

    def placed(shapes, places):
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)

    held = {name: x for name, x in placed(shapes, places).items() if training.keeps(name)}
    guard.watchdog.at(0, "reading the checkpoint", slow=True)
    with guard.ledger.during(goodput.RESTORE):
        found = checkpoints.restore(held, placed(opt_shapes, opt_places))
    guard.watchdog.at(found[0] if found else 0, "making the parameters", timed=False)
    saved = found[1] if found else {}
    params = saved if len(saved) == len(shapes) else training.initial(places) | saved
    learned = {name: x for name, x in params.items() if name in learns}
    frozen = {name: x for name, x in params.items() if name not in learns}
    if not found:
        return 0, learned, frozen, jax.jit(optimizer.init, out_shardings=opt_places)(learned), None
    step, _, opt_state, facts = found
    if facts["best"] and facts["best"]["step"] == step:  # perhaps it ended between the two saves of a best step
        checkpoints.save_best(step, saved, {"best": facts["best"]})
    if jax.process_index() == 0:
        print(f"{checkpoints.workdir}: going on from step {step}", file=sys.stderr)
    return step, learned, frozen, opt_state, facts["best"]


class StopSignal:
    """Turns SIGTERM into a question that the loop asks after each step; several processes agree on the step.

    In those, JAX itself takes the signal from the moment they join, whichever of them it comes to. SIGHUP, of a
    terminal that is closed, is passed on as SIGTERM, but for a process that was started to outlive it (nohup).
    """

    def __enter__(self):
        self._asked = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            if jax.process_count() == 1:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._pass_on)
        return self

    def _pass_on(self, *_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self, *_) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether a lone process has been told to stop."""
        return self._asked

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def main(argv: list[str]) -> int:
    """`pathflip train`: 0 done, 75 stopped by a signal, a hang or a lost host, and to be started again."""
    if not argv or {"-h", "--help"}.intersection(argv):
        print(HELP)
        return 0
    began = time.time()
    config, options = settings.parse(argv)
    launch = distributed.find_launch(options["coordinator"], options["num_processes"], options["process_id"])
    distributed.initialize(launch, config.train.heartbeat_seconds)
    try:
        hashed = hashlib.sha256(config.to_json().encode()).hexdigest()[:8]
        distributed.require_same(**{"--workdir": str(Path(options["workdir"]).resolve()), "settings of hash": hashed})
        train(config, options["workdir"], profile=options["profile"], began=began)
    except (Stopped, StillEndingError) as stopped:
        if jax.process_index() == 0:
            print(stopped, file=sys.stderr)
        return TRY_AGAIN
    except Exception as error:
        distributed.end_together(error, config.train.heartbeat_seconds)
        raise
    return 0


HELP = f"""Train a model, or go on with a run.

{settings.USAGE}

  --config    a config file or the name of a bundled one (align_base, lm_stage1, ...); `:smoke` shrinks it
  --workdir   folder of the run; a run that is there goes on
  --profile STEPS
              trace steps 10:13, or 3 steps after the first two, to <workdir>/profile; so does SIGUSR1 at any time
  --coordinator HOST:PORT --num_processes N --process_id I
              join N processes; TPU pods, Slurm, Open MPI and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
              JAX_PROCESS_ID need no option; PATHFLIP_DISTRIBUTED=0 ignores them, 1 insists on them

configs/align_base.py lists and explains every setting, configs/pathflip2.py those of the follow-up network,
configs/lm_stage1.py those of the language stage. Exit code 75: stopped by SIGTERM or SIGHUP and saved, or a host was
lost, hung or did not come in 300 s, or the run before still saves; start it again. Of two starts of one run, the second
is refused (2).

example:
  pathflip train --config align_base --config.data.records=records --config.data.texts=reports.jsonl \\
      --config.data.slides=slides.csv --config.data.tokenizer=bert --config.model.bert=bert --workdir runs/base"""


def _refuse_nan(step: int, loss: float, workdir: Path) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: the loss is {loss}; checkpoints in {workdir / files.CHECKPOINTS} are from before it. "
            "Lower --config.optim.learning_rate or set --config.optim.clip=1.0, in another --workdir"
        )
