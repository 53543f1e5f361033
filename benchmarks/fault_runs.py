"""Tiny cohort with runs in real processes for fault injection, and comparison of the final states of two runs."""

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

STEPS, SAVE_EVERY, DEVICES = 40, 5, 2
LIMIT_SECONDS = 1200  # enough for any run on a slow and busy machine
HEARTBEAT_SECONDS = 10
SETTINGS = [
    f"--config.train.steps={STEPS}", f"--config.train.save_every={SAVE_EVERY}", "--config.train.eval_every=20",
    f"--config.train.heartbeat_seconds={HEARTBEAT_SECONDS}", "--config.train.batch_size=4", "--config.data.regions=2",
    "--config.data.patch_slots=4", "--config.model.hidden=16", "--config.model.layers=1", "--config.model.embed_dim=16",
    "--config.data.threads=1",
]  # fmt: skip
SLIDES = 160  # one shard each: more shards than stay open, so that files are opened throughout the run
# Lazy imports of a run, besides those at the top of its modules.
LATE = ["matplotlib.figure", "pathflip_jax.scores.retrieval", "tensorboardX"]


class Rig:
    """A cohort in a folder, and a fork server with all modules loaded that starts runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "compiled"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pathflip_jax.cli", "pathflip_jax.training.loop", *LATE])
        self.records = make_cohort(folder / "cohort")
        parts = {"records": self.records, "texts": "reports.jsonl", "slides": "slides.csv", "tokenizer": "vocabulary"}
        self.data = [f"--config.data.{name}={folder / 'cohort' / path}" for name, path in parts.items()]
        self._undisturbed: dict[int, Path] = {}

    def undisturbed(self, hosts: int) -> Path:
        """Folder of the undisturbed reference run."""
        if hosts not in self._undisturbed:
            workdir = self.folder / f"undisturbed{hosts}"
            run = Run(self, workdir, hosts, [])
            if any(run.wait()):
                raise RuntimeError(f"the undisturbed run failed:\n{run.outputs()[0][-3000:]}")
            self._undisturbed[hosts] = workdir
        return self._undisturbed[hosts]


class Run:
    """Processes of one `pathflip train`.

    Each process writes its output to a pipe, which a full disk cannot block; a thread copies it to a file.
    """

    def __init__(self, rig: Rig, workdir: Path, hosts: int, more: list[str]) -> None:
        self.workdir, self.logs, self.copying = workdir, [], []
        arguments = ["--config=align_base:smoke", *rig.data, *SETTINGS, *more, f"--workdir={workdir}"]
        together = [f"--coordinator=localhost:{free_port()}", f"--num_processes={hosts}"] if hosts > 1 else []
        self.processes = []
        for host in range(hosts):
            log = rig.folder / f"{workdir.name}.{len(list(rig.folder.glob(f'{workdir.name}.*.log')))}.log"
            log.touch()
            argv = [*arguments, *together, *([f"--process_id={host}"] if together else [])]
            reader, writer = rig.context.Pipe(duplex=False)
            process = rig.context.Process(target=_train, args=(argv, writer, DEVICES, rig.cache))
            process.start()
            writer.close()
            copying = threading.Thread(target=_copy, args=(reader, log), daemon=True)
            copying.start()
            self.processes.append(process)
            self.logs.append(log)
            self.copying.append(copying)

    def step(self) -> int:
        """Last step with metrics on disk."""
        path = self.workdir / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0

    def reach(self, reached: Callable[[], bool]) -> bool:
        """Wait until a condition holds; returns False if a process ends first."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not reached():
            if any(process.exitcode is not None for process in self.processes) or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def kill(self, hosts: list[int], how: int = signal.SIGKILL) -> None:
        """Send a signal to some of the processes."""
        for host in hosts:
            if self.processes[host].exitcode is None:
                os.kill(self.processes[host].pid, how)

    def wait(self) -> list[int]:
        """Wait for the exit codes; a process that does not end is killed and counts as -9."""
        deadline = time.monotonic() + LIMIT_SECONDS
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.exitcode is None:
                process.kill()
                process.join()
        for copying in self.copying:
            copying.join()
        return [process.exitcode for process in self.processes]

    def outputs(self) -> list[str]:
        """Output of each process."""
        return [log.read_text(errors="replace") for log in self.logs]


def complete(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def arrays(workdir: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, as bytes."""
    from pathflip_jax.runs.checkpoints import stored_arrays

    stored = stored_arrays(workdir / "checkpoints" / str(step))
    return {f"{item}/{name}": np.asarray(x).tobytes() for item, tree in stored.items() for name, x in tree.items()}


def metrics(workdir: Path) -> list[dict]:
    """Metrics of a run, without those that depend on time."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if "perf/" not in name and "per_second" not in name} for row in rows]


def differences(found: Path, expected: Path) -> list[str]:
    """Differences between two finished runs: metrics, best step, and every array of the last checkpoint."""
    if complete(found)[-1:] != [STEPS]:
        return [f"ended with checkpoints {complete(found)}"]
    wrong = []
    if metrics(found) != metrics(expected):
        wrong.append("metrics.jsonl differs")
    if os.listdir(found / "best") != os.listdir(expected / "best"):
        wrong.append("the best step differs")
    mine, theirs = arrays(found, STEPS), arrays(expected, STEPS)
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return wrong + ([f"{len(differing)} arrays differ, e.g. {differing[0]}"] if differing else [])


def same_file(one: Path, other: Path) -> bool:
    """Whether both files exist with identical bytes."""
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def make_cohort(folder: Path) -> Path:
    """Write slides of random features with reports, in shards of one slide; returns the folder of records."""
    from pathflip_jax.data.readers.features import SlideFeatures
    from pathflip_jax.data.records.records import finish_folder, shard_name, write_shard
    from pathflip_jax.data.texts.wordpiece import train_wordpiece

    records = folder / "records"
    records.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["glands", "stroma", "necrosis", "mucin", "fat", "lymphocytes", "mitoses", "fibrosis"]
    captions, table = [], ["slide_id,patient_id,label,split"]
    coords = (np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2) * 64).astype(np.int32)
    for number in range(SLIDES):
        name = f"S{number:03d}"
        features = rng.normal(size=(len(coords), 16)).astype(np.float32)
        place = {"coords": coords, "patch_size": 64, "mpp": 0.5, "width": 256, "height": 256}
        slide = SlideFeatures(name, name, features, encoder="tiny", **place)
        write_shard(records / shard_name(number), [slide], edge_um=64.0)
        sentences = [f"There is {word}." for word in rng.permutation(words)[:4]]
        captions.append({"slide_id": name, "case_id": name, "caption": " ".join(sentences)})
        table.append(f"{name},{name},solid,{'val' if number < 8 else 'train'}")
    finish_folder(records, edge_um=64.0)
    (folder / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (folder / "slides.csv").write_text("\n".join(table) + "\n")
    train_wordpiece([row["caption"] for row in captions], folder / "vocabulary", vocab_size=100)
    return records


def make_features(folder: Path) -> None:
    """Write feature files to import, in CLAM's format."""
    import h5py

    folder.mkdir()
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(40), np.arange(25)), axis=-1).reshape(-1, 2) * 256
    for number in range(6):
        with h5py.File(folder / f"S{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(len(coords), 512)).astype(np.float32)
            file["coords"] = coords.astype(np.int32)


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _copy(reader: Connection, log: Path) -> None:
    """Copy the output of a process to a file, until it ends."""
    with reader, open(log, "ab", buffering=0) as file:
        while data := os.read(reader.fileno(), 2**16):
            file.write(data)


def _train(argv: list[str], writer: Connection, devices: int, cache: Path) -> None:
    """Run `pathflip train` in this process, forked from the server with all modules loaded."""
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
    flags += f" --xla_force_host_platform_device_count={devices}"
    os.environ |= {"XLA_FLAGS": flags, "PATHFLIP_DEBUG": ""}
    import jax

    from pathflip_jax import cli

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        code = cli.main(["train", *argv])
        atexit._run_exitfuncs()  # multiprocessing skips JAX's shutdown handshake with the other processes
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
