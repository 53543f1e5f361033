"""Training loop: from settings and a working folder to a trained, resumable, measured run.

One loop serves every stage (`training/stage.py` defines stages). A run is a function of settings, data and seed: one
that is stopped, killed or moved resumes as if it had never been interrupted (DESIGN section 6).
"""

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pathflip_jax.convert.versions import git_revision
from pathflip_jax.data.batches.pipeline import look_up
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.monitoring import goodput
from pathflip_jax.monitoring.metrics import METRICS, MetricsWriter, import_wandb, read_metrics, try_to_plot
from pathflip_jax.monitoring.profiling import profiled_steps
from pathflip_jax.monitoring.telemetry import USEFUL, Telemetry
from pathflip_jax.runs import files
from pathflip_jax.runs import lock as run_lock
from pathflip_jax.runs.checkpoints import Checkpoints
from pathflip_jax.runs.lock import StillEndingError
from pathflip_jax.runtime import distributed, sharding
from pathflip_jax.runtime.compilation import compiler_options
from pathflip_jax.runtime.distributed import TRY_AGAIN, Watchdog
from pathflip_jax.settings.kinds import RunSettings
from pathflip_jax.settings.sections import TrainSettings
from pathflip_jax.training import settings as edge
from pathflip_jax.training.findings import Findings
from pathflip_jax.training.monitors import Monitors, StopSignal
from pathflip_jax.training.optim import exchange, scheduled_optimizer
from pathflip_jax.training.resume import lock_to_run, resume_as, saved_config
from pathflip_jax.training.stage import Training
from pathflip_jax.training.stages import open_training
from pathflip_jax.training.state import begin
from pathflip_jax.training.step import make_step
from pathflip_jax.training.step_log import StepLog
from pathflip_jax.training.validation import choose_best, place_features


class Stopped(Exception):
    """The run was told to stop (SIGTERM, SIGHUP), has saved its state, and resumes when it is restarted."""


def train(
    settings: RunSettings, workdir: str | Path, *, profile: str = "", began: float | None = None
) -> dict[str, float]:
    """Train or resume the run of these settings in `workdir`; returns the last metrics.

    `profile` selects steps to profile (`monitoring.profiling.profiled_steps`); `began` is the start time of the process
    as of `time.time()`, by default now. Raises Stopped after SIGTERM, once the state is saved, and StillEndingError if
    another start was told to stop and has not finished; InUseError if another run is active in `workdir`; ValueError
    and OSError for unusable input, with the cure; MemoryError if a step would not fit; FloatingPointError when the loss
    is not finite.
    """
    ledger, setup = goodput.Ledger(began), settings.train
    edge.require(settings)
    profiled_steps(profile, 0)
    if setup.wandb_project:
        import_wandb(setup.wandb_project)
    if is_url(workdir):
        raise ValueError(
            f"--workdir={workdir}: logs can only be written to a local disk; name a local folder, and for checkpoints "
            f"at this URL, set --config.train.checkpoints={workdir}"
        )
    workdir = Path(workdir).resolve()
    mesh = sharding.make_mesh(**vars(settings.mesh))
    if settings.data.regions % mesh.shape["region"]:
        raise ValueError(
            f"data.regions={settings.data.regions} cannot be divided evenly over mesh.region={mesh.shape['region']} "
            "devices; set data.regions to a multiple of mesh.region"
        )
    home = files.run_folder(setup.checkpoints or workdir)
    with (
        StopSignal() as stop,
        Watchdog(setup.hang_seconds) as watchdog,
        run_lock.hold((workdir, home), stop.asked) as lock,
        jax.set_mesh(mesh),
    ):
        monitors = Monitors(workdir, ledger, stop, watchdog, lock, profile)
        monitors.phase("opening the data", 0)
        begun = distributed.agree(saved_config(home)) or {"data": {}}
        settings = resume_as(settings, begun, home)
        training = open_training(settings, mesh, begun)
        steps = settings.train.steps or settings.train.epochs * training.batches.steps_per_epoch
        settings = settings.with_changes({"train.steps": steps})
        training.resolved["train"]["steps"] = steps
        if setup.checkpoints:  # for readers with another working directory
            training.resolved["train"]["checkpoints"] = str(home)
        lock_to_run(workdir, training.resolved, training.describe)
        return fit(training, settings, mesh, monitors)


def fit(training: Training, settings: RunSettings, mesh: Mesh, monitors: Monitors) -> dict[str, float]:
    """Training loop of steps, validations and saves, from the newest intact checkpoint if there is one."""
    setup, steps, phase, traces = settings.train, settings.train.steps, monitors.phase, Counter()
    schedule, optimizer = scheduled_optimizer(settings.optim, steps, training.batches.steps_per_epoch)
    plain_step = make_step(training.stage, training.build, optimizer, schedule, setup.accumulate, setup.seed)
    with monitors, _open_checkpoints(training, setup, monitors.workdir) as checkpoints:
        start, learned, frozen, opt_state, best = begin(training, optimizer, mesh, checkpoints, steps, phase)
        telemetry = _open_ledger(monitors, setup, Telemetry(monitors.ledger, mesh, training.compute_dtype), start)
        batches = telemetry.timed_batches(training.batches.__iter__(start))
        phase("reading the first batch", start)
        batch = sharding.place_batch(mesh, next(batches)) if start < steps else None
        phase("placing the features on the devices", start)
        features = place_features(mesh, training.batches)
        step = _jit_step(training, plain_step, (learned, opt_state), mesh, setup.deterministic, traces)
        if start < steps:
            phase("compiling", start)
            step = step.lower(learned, frozen, opt_state, batch, np.int32(start), features).compile()
            checkpoints.compile(training.checkpointed(learned | frozen), opt_state)
            training.check_memory(step)
            if monitors.stop.requested(start):
                raise Stopped(f"stopped before step {start + 1} of {steps}; run the same command again to resume")
        phase("opening the logs", start)
        step = telemetry.timed_step(step)
        with _open_log(monitors, settings, training, telemetry, start) as log, telemetry:
            for done in range(start + 1, steps + 1):
                phase("computing the step", done)
                learned, opt_state, metrics = step(learned, frozen, opt_state, batch, np.int32(done - 1), features)
                if done < steps:
                    phase("reading the next batch", done)
                    batch = sharding.place_batch(mesh, next(batches))
                phase("waiting for the devices", done)
                log.follow(done, metrics)
                phase("ending the step", done, metrics)
                last, stopping, improved = done == steps, monitors.stopping(done), False
                shown, beside = exchange(learned, opt_state)
                if training.validate and (last or done % setup.eval_every == 0):
                    phase("waiting for the devices", done)
                    jax.block_until_ready(metrics)  # later time is attributed to the validation
                    scores = training.validate(shown, frozen, functools.partial(phase, step=done))
                    phase("writing the metrics", done)
                    best, improved = choose_best(best, done, scores, setup)
                    log.write(scores)
                shared = last or stopping or improved or done % setup.save_every == 0
                if shared or (setup.local_every and done % setup.local_every == 0):
                    phase("writing the metrics", done)
                    log.flush()
                    monitors.check_lock(done)
                    phase("saving" if shared else "saving locally", done)
                    save = checkpoints.save if shared else checkpoints.save_locally
                    save(done, kept := training.checkpointed(shown | frozen), beside, {"best": best})
                if improved:
                    phase("saving the best", done)
                    checkpoints.save_best(done, kept, {"best": best})
                if last or stopping:
                    phase("waiting for the save", done)
                    checkpoints.wait()
                    phase("closing the logs", done)
                if stopping and not last:
                    raise Stopped(f"stopped at step {done} of {steps} and saved; run the same command again to resume")
    return _finish(monitors, setup, start, log.findings, best, traces)


def _open_checkpoints(training: Training, setup: TrainSettings, workdir: Path) -> Checkpoints:
    """Checkpoints of a run; each records its settings and the commit of this code."""
    facts = {"config": training.resolved, "git": git_revision()}
    return Checkpoints(setup.checkpoints or workdir, setup.keep, facts, setup.keep_every, setup.local_checkpoints)


def _jit_step(
    training: Training, plain_step: Callable, state: tuple, mesh: Mesh, deterministic: bool, traces: Counter
) -> Callable:
    """Jitted step, not yet compiled; learned parameters and optimizer state have the same shardings in and out.

    `traces` counts compilations, as its Python code runs only when it is traced.
    """

    def step(learned, frozen, opt_state, batch, number, features):
        traces["step"] += 1
        batch = look_up(batch, features)
        learned, opt_state, metrics = plain_step(learned, frozen, opt_state, batch, number)
        return learned, opt_state, metrics | {USEFUL: training.model_flops(batch)}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    metrics = NamedSharding(mesh, P())
    options = compiler_options(deterministic)
    return jax.jit(step, donate_argnums=(0, 2), out_shardings=(*shardings, metrics), compiler_options=options)


def _open_ledger(monitors: Monitors, setup: TrainSettings, telemetry: Telemetry, start: int) -> Telemetry:
    """Open the time ledger of a run that has steps left, and report the peak that utilisation is relative to."""
    if jax.process_index() == 0:
        if start < setup.steps:
            rates = {"save_every": setup.save_every, "preemptions_per_day": setup.preemptions_per_day}
            monitors.ledger.open(monitors.workdir, start, **rates)
        print(telemetry.describe(), file=sys.stderr)
    return telemetry


@contextlib.contextmanager
def _open_log(
    monitors: Monitors, settings: RunSettings, training: Training, telemetry: Telemetry, start: int
) -> Iterator[StepLog]:
    """Metrics writer of a run that resumes after step `start`."""
    setup, primary = settings.train, jax.process_index() == 0
    names = {"slides_per_step": setup.batch_size, "wandb_project": setup.wandb_project, "config": training.resolved}
    with MetricsWriter(monitors.workdir, start, setup.steps, primary=primary, **names) as writer:
        findings = Findings(setup.select, read_metrics(monitors.workdir / METRICS) if primary else ())
        yield StepLog(writer, telemetry, monitors.ledger, monitors.workdir, findings)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _finish(
    monitors: Monitors, setup: TrainSettings, start: int, findings: Findings, best: dict | None, traces: Counter
) -> dict[str, float]:
    """Plot and summarise a completed run; returns its last metrics."""
    workdir, steps = monitors.workdir, setup.steps
    monitors.phase("drawing the plots", steps)
    if jax.process_index() == 0:
        try_to_plot(workdir)
        print(
            f"{workdir}: finished {steps} steps; the training step was compiled {_times(traces['step'])}",
            file=sys.stderr,
        )
        if start < steps:
            print(goodput.try_to_describe(workdir), file=sys.stderr)
        folder = files.run_folder(setup.checkpoints or workdir) / files.BEST
        print(*findings.summary(best, folder), sep="\n", file=sys.stderr)
    distributed.agree("done")  # JAX's shutdown barrier would not wait as long for process 0
    rows = read_metrics(workdir / METRICS)
    return rows[-1] if rows else {}  # none if the logs of an already completed run are gone


def main(argv: list[str]) -> int:
    """`pathflip train`: exit code 0 when done, 75 when stopped by a signal, a hang or a lost host, to be restarted."""
    if not argv or {"-h", "--help"}.intersection(argv):
        print(HELP)
        for name in edge.configs_named(argv):
            print(f"\n{edge.describe(name)}")
        return 0
    began = time.time()
    settings, options = edge.parse(argv)
    launch = distributed.find_launch(options["coordinator"], options["num_processes"], options["process_id"])
    distributed.initialize(launch, settings.train.heartbeat_seconds)
    try:
        hashed = hashlib.sha256(json.dumps(settings.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        distributed.require_same(**{"--workdir": str(Path(options["workdir"]).resolve()), "settings with hash": hashed})
        train(settings, options["workdir"], profile=options["profile"], began=began)
    except (Stopped, StillEndingError) as stopped:
        if jax.process_index() == 0:
            print(stopped, file=sys.stderr)
        return TRY_AGAIN
    except Exception as error:
        distributed.end_all_processes(error, settings.train.heartbeat_seconds)
        raise
    return 0


HELP = f"""Train a model, or resume a run.

{edge.USAGE}

  --config    a config file or the name of a bundled one (align_base, lm_stage1, ...); `:smoke` shrinks it
  --workdir   folder of the run; a run that is already there is resumed
  --profile STEPS
              trace steps to <workdir>/profile: 10:13 for steps 10 to 13, 3 for three steps after the first two;
              SIGUSR1 traces the next three steps at any time
  --coordinator HOST:PORT --num_processes N --process_id I
              join a run of N processes; under a TPU pod, Slurm or Open MPI, or with JAX_COORDINATOR_ADDRESS,
              JAX_NUM_PROCESSES and JAX_PROCESS_ID set, these options are not needed; PATHFLIP_DISTRIBUTED=0 ignores
              the launcher and these variables, 1 requires them

`--config FILE_OR_NAME --help` lists and explains every setting of that config. Exit code 75: the run was stopped by
SIGTERM or SIGHUP and has saved; a host was lost, hung or did not join within 300 s; or the previous run in the folder
is still saving. Start it again. If a run is started twice, the second start is refused (exit code 2).

example:
  pathflip train --config align_base --config.data.records=records --config.data.texts=reports.jsonl \\
      --config.data.slides=slides.csv --config.data.tokenizer=bert --config.model.bert=bert --workdir runs/base"""
