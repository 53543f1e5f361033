"""Complete runs of `pathflip train` on the device: speed, determinism, kill and resume, input stalls, embedding."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import time_to_train as benchmark

from accelerator_parts import CURE, FAULT, Context, Row, Rows
from pathflip_jax.monitoring.metrics import METRICS, PERFORMANCE, read_metrics

CLI = [sys.executable, "-m", "pathflip_jax.cli"]
SLIDES, SMALL_SLIDES = 64, 8
STEPS, SAVE_EVERY = 12, 4
PART = 256  # slides of the prediction, before an epoch is run for real
SPARE_GB = 10
LOAD = """
import json, sys
from pathflip_jax.runs.folder import load_run
for run in sys.argv[1:]:
    try:
        load_run(run, "latest")
        fault = ""
    except Exception as error:
        fault = (str(error).splitlines() or [repr(error)])[0]
    print(json.dumps(fault), flush=True)
"""


def time_to_train(context: Context) -> Rows:
    """Epoch time predicted from a part of it, then measured if disk and time allow."""
    if context.small:
        yield Row("an epoch", _epoch(context, 6, 2, "align_base:smoke", width=16))
        return
    predicted = _epoch(context, PART, 32, "align_large", profile=True)
    yield Row("an epoch", predicted)
    whole = benchmark.EPOCH_SLIDES
    needed = predicted["cohort_seconds"] * whole / PART + predicted["epoch_seconds"]
    room, free = 43 + SPARE_GB, shutil.disk_usage(context.work).free / 1e9
    left = context.limit - predicted["cohort_seconds"] - predicted["part_seconds"] - 30
    if needed > left or free < room:
        command = f"python benchmarks/time_to_train.py --slides {whole} --batch 32 --dtype {context.dtype}"
        why = f"about {needed:.0f} s and {room} GB are needed, {left:.0f} s and {free:.0f} GB are left"
        yield Row("an epoch", {"slides": whole, "note": f"not measured: {why}", CURE: f"run separately: {command}"})
        return
    yield Row("an epoch", _epoch(context, whole, 32, "align_large"))


def _epoch(context: Context, slides: int, batch: int, config: str, width: int = 512, profile: bool = False) -> dict:
    out = context.work / "time_to_train.json"
    command = [sys.executable, benchmark.__file__, f"--slides={slides}", f"--batch={batch}", f"--config={config}"]
    command += [f"--dtype={context.dtype}", f"--width={width}", f"--folder={context.work}", f"--json={out}"]
    command += ["--steps=5"] * context.small
    start = time.monotonic()
    _checked(command)
    found = json.loads(out.read_text())["result"]
    rate = context.device.get("peak_bfloat16")
    rate = rate and rate * context.device.get("count", 1)
    if context.platform != "cpu":  # the script computes `utilisation` for the device of its --device
        operations = found["useful_gflop_per_slide"] * 1e9 * found["slides_per_second"]
        found["utilisation"] = operations / rate if rate else None
    return {"slides": slides, "batch": batch} | found | {"part_seconds": time.monotonic() - start}


def deterministic(context: Context) -> Rows:
    """Check that two runs with train.deterministic=True, compiled separately, end bit-identical."""
    first, second = context.work / "first", context.work / "second"
    cohort = make_cohort(context)
    for workdir in (first, second):
        fresh = {
            "JAX_COMPILATION_CACHE_DIR": str(workdir.with_suffix(".cache"))
        }  # otherwise the second run would reuse the programs of the first
        _train(cohort, workdir, context, "--config.train.deterministic=True", more=fresh)
    yield Row("the same bits twice", _compared(first, second, "two runs with train.deterministic=True"))


def resume(context: Context) -> Rows:
    """Check that a run killed by SIGKILL and restarted ends as an undisturbed one, and that old checkpoints load."""
    yield from _old_checkpoints()
    cohort, undisturbed, killed = make_cohort(context), context.work / "undisturbed", context.work / "killed"
    settings = ["--config.train.deterministic=True"]
    _train(cohort, undisturbed, context, *settings)
    process = subprocess.Popen(_command(cohort, killed, context, *settings), start_new_session=False)
    saved = killed / "checkpoints" / str(SAVE_EVERY)
    while process.poll() is None and not saved.is_dir():
        time.sleep(0.002)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL) if not ended else None
    process.wait()
    if ended:
        fault = {
            FAULT: f"the run ended with {process.returncode} before it could be killed",
            CURE: "raise STEPS in benchmarks/accelerator_parts/runs.py",
        }
        yield Row("save, kill and resume", fault)
        return
    _train(cohort, killed, context, *settings)
    yield Row("save, kill and resume", _compared(undisturbed, killed, "a killed run and an undisturbed one"))


def _old_checkpoints() -> Rows:
    """One row per checkpoint of an earlier version in the test data: whether it loads."""
    versions = Path(__file__).resolve().parents[2] / "tests" / "golden" / "runs"
    runs = sorted(path for path in versions.glob("*/pathflip*") if (path / "checkpoints").is_dir())
    done = subprocess.run([sys.executable, "-c", LOAD, *runs], capture_output=True, text=True)
    said = {run: json.loads(line) for run, line in zip(runs, done.stdout.splitlines(), strict=False)}
    last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    for run in runs:
        fault = said.get(run, last[-1])
        row = {"checkpoint": f"{run.parent.name}/{run.name}", "loads": not fault}
        if fault:
            newer = [fault for step in (run / "checkpoints").iterdir() if (fault := of_newer_orbax(step))]
            row |= (
                newer[0] if newer else {FAULT: f"{run} does not load: {fault}", CURE: "compare pip list with setup.cfg"}
            )
        yield Row("old checkpoints", row)


def of_newer_orbax(step: Path) -> dict[str, str] | None:
    """Fault of a checkpoint written by handlers that this Orbax lacks; None for any other."""
    from pathflip_jax.runs.checkpoints import missing_handlers

    if not (lacking := missing_handlers(step)):
        return None
    here = importlib.metadata.version("orbax-checkpoint")
    what = f"{step}: a checkpoint of a newer Orbax; orbax-checkpoint {here} has no {', '.join(lacking)}"
    return {FAULT: what, CURE: "pip install --upgrade orbax-checkpoint, within the range of setup.cfg"}


def wait_for_input(context: Context) -> Rows:
    """Fraction of a run's time in which the device waited for its batch, from disk and from memory."""
    cohort = make_cohort(context)
    for resident in ("", "device") if context.small else ("", "host", "device"):
        workdir = context.work / f"resident_{resident or 'disk'}"
        _train(cohort, workdir, context, f"--config.data.resident={resident}")
        rows = [{k.removeprefix(PERFORMANCE): v for k, v in row.items()} for row in read_metrics(workdir / METRICS)]
        steps = rows[len(rows) // 2 :]  # during the first steps the read-ahead fills
        utilisation = [row["utilisation"] for row in steps if "utilisation" in row]
        seconds = statistics.median(row["step_seconds"] for row in steps)
        row = {"features": f"in the memory of the {resident}" if resident else "read from disk"}
        row |= {"waiting": rows[-1]["input_wait"], "step_ms": 1e3 * seconds}
        row |= {"utilisation": statistics.median(utilisation) if utilisation else None}
        yield Row("waiting for input", row)


def embed(context: Context) -> Rows:
    """Throughput of `pathflip embed` on the cohort, with a run trained on it."""
    cohort, workdir, out = make_cohort(context), context.work / "run", context.work / "embeddings.parquet"
    _train(cohort, workdir, context)
    command = [*CLI, "embed", str(cohort / "records"), "--checkpoint", str(workdir), "--out", str(out), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    row = {"slides": len(report["done"]), "slides_per_second": report["slides_per_second"]}
    yield Row("pathflip embed, compilation included", row)


def make_cohort(context: Context) -> Path:
    """Slides of real sizes with reports, in a folder that the parts share."""
    shared, own = context.work.parent / "cohort", context.work / "cohort"
    if not shared.exists():
        own.mkdir(parents=True)
        slides, width = (SMALL_SLIDES, 16) if context.small else (SLIDES, 512)
        benchmark.write_cohort(own, slides, width)
        with contextlib.suppress(OSError):  # another part has created it meanwhile
            own.rename(shared)
    return shared


def _command(cohort: Path, workdir: Path, context: Context, *settings: str) -> list[str]:
    smoke = ":smoke" if context.small else ""
    batch = 4 if context.small else 16
    return [
        *CLI, "train", f"--config=align_base{smoke}", f"--config.data.records={cohort / 'records'}",
        f"--config.data.texts={cohort / 'reports.jsonl'}", f"--config.data.tokenizer={cohort / 'vocabulary'}",
        f"--config.model.compute_dtype={context.dtype}", f"--config.train.batch_size={batch}",
        f"--config.train.steps={STEPS}", f"--config.train.save_every={SAVE_EVERY}", "--workdir", str(workdir),
        *settings,
    ]  # fmt: skip


def _train(cohort: Path, workdir: Path, context: Context, *settings: str, more: dict[str, str] | None = None) -> None:
    _checked(_command(cohort, workdir, context, *settings), os.environ | (more or {}))


def _checked(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command. Raises RuntimeError with its last output if it fails."""
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _compared(one: Path, other: Path, what: str) -> dict:
    """Number of arrays in the last checkpoints of two runs that differ in any bit."""
    mine, theirs = arrays(one, STEPS), arrays(other, STEPS)
    differ = [name for name in mine if not np.array_equal(mine[name].view(np.uint8), theirs[name].view(np.uint8))]
    row = {"compared": what, "arrays": len(mine), "steps": STEPS, "arrays that differ": len(differ)}
    if differ or mine.keys() != theirs.keys():
        row |= {FAULT: f"{what} differ in {len(differ)} of {len(mine)} arrays, first {differ[:1]}"}
        row |= {CURE: "set XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true to find the non-deterministic kernels"}
    return row


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name, flattened, read on the CPU: the device belongs to other processes."""
    import jax

    from pathflip_jax.runs.checkpoints import stored_arrays

    jax.config.update("jax_platforms", "cpu")
    stored = stored_arrays(workdir / "checkpoints" / str(step))
    return {f"{item}/{name}": np.asarray(x).reshape(-1) for item, tree in stored.items() for name, x in tree.items()}
