"""Faults injected into real runs, each then started again: does it end as the undisturbed run, and what was lost?

A tiny cohort is trained for 40 steps, by one process or by two with two virtual devices each; a checkpoint every 5
steps. At a random moment (seeded) the fault strikes; then the same command is started again, as a launcher would, and
its last parameters, optimizer state and metrics must be those of the undisturbed run, bit for bit.

fault            hosts  what is done
sigterm          2      SIGTERM to one of them or both
kill-one         2      kill -9 of one of them
kill-all         2      kill -9 of both
kill-in-save     2      kill -9 of one or both while a checkpoint is being written
kill-in-records  1      kill -9 of `pathflip import` and its workers while a file of records is being written
full-disk        1      the disk fills up: a tmpfs of its own and a ballast file (ENOSPC), where user namespaces are
                        allowed; else no file of the process may grow (RLIMIT_FSIZE, EFBIG)
flipped-byte     1      kill -9, then one bit of one file of the newest checkpoint is flipped
vanished-shard   2      the folder loses a file of records
hang             2      a file of records stops answering (a FIFO stands in its place)

"lost" are the steps that the restarted run takes again: those since the last complete checkpoint, never more. A fault
is told when every process that survives it says so on stderr and exits with the code that is right for it: 75 where
starting again is all that is needed, 2 where somebody must mend something first.

    python benchmarks/faults.py --times 20 --json benchmarks/results/faults.json
    python benchmarks/faults.py --faults kill-in-save flipped-byte --times 3
"""

import argparse
import atexit
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import describe

STEPS, SAVE_EVERY, DEVICES = 40, 5, 2
AGAIN, MEND, KILLED = 75, 2, -signal.SIGKILL
LIMIT_SECONDS = 1200  # for any run, on a slow and busy machine
HEARTBEAT_SECONDS, HANG_SECONDS = 10, 15
SETTINGS = [
    f"--config.train.steps={STEPS}", f"--config.train.save_every={SAVE_EVERY}", "--config.train.eval_every=20",
    f"--config.train.heartbeat_seconds={HEARTBEAT_SECONDS}", "--config.train.batch_size=4", "--config.data.regions=2",
    "--config.data.patch_slots=4", "--config.model.hidden=16", "--config.model.layers=1", "--config.model.embed_dim=16",
    "--config.data.threads=1",
]  # fmt: skip
OWN_MOUNTS = "FAULTS_OWN_MOUNTS"
SLIDES = 160  # a shard each: more than are held open, so that files are opened all along the run


class Outcome(NamedTuple):
    """What became of one fault. `codes` are exit codes; `lost` steps were taken again; `faults` is what was wrong."""

    fault: str
    seed: int
    codes: list[int]
    reached: int
    resumed: int
    lost: int
    same: bool
    told: bool
    wrong: list[str]
    seconds: float


class Run:
    """The processes of one `pathflip train`.

    They say what they say into a pipe each, which no full disk stops; a thread copies it to a file.
    """

    def __init__(self, bench: "Bench", workdir: Path, hosts: int, more: list[str]) -> None:
        self.workdir, self.logs, self.copying = workdir, [], []
        arguments = ["--config=align_base:smoke", *bench.data, *SETTINGS, *more, f"--workdir={workdir}"]
        together = [f"--coordinator=localhost:{free_port()}", f"--num_processes={hosts}"] if hosts > 1 else []
        self.processes = []
        for host in range(hosts):
            log = bench.folder / f"{workdir.name}.{len(list(bench.folder.glob(f'{workdir.name}.*.log')))}.log"
            log.touch()
            argv = [*arguments, *together, *([f"--process_id={host}"] if together else [])]
            hears, says = bench.context.Pipe(duplex=False)
            process = bench.context.Process(target=_train, args=(argv, says, DEVICES, bench.cache))
            process.start()
            says.close()
            copying = threading.Thread(target=_copy, args=(hears, log), daemon=True)
            copying.start()
            self.processes.append(process)
            self.logs.append(log)
            self.copying.append(copying)

    def step(self) -> int:
        """The last step whose metrics are written."""
        path = self.workdir / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0

    def reach(self, reached: Callable[[], bool]) -> bool:
        """Wait until something is so; False when the processes end before."""
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
        """The exit codes; what does not end by itself is killed and counts as -9."""
        deadline = time.monotonic() + LIMIT_SECONDS
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.exitcode is None:
                process.kill()
                process.join()
        for copying in self.copying:
            copying.join()
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        """What each process wrote."""
        return [log.read_text(errors="replace") for log in self.logs]


class Struck(NamedTuple):
    """How a fault struck: who must exit how, what the survivors say, what must be mended before the next start.

    Each survivor says why it ends, but for `one_speaks`: for what they do together process 0 does.
    """

    codes: list[set[int]]
    message: str
    mend: Callable[[], None] = lambda: None
    may_go_back: bool = False
    one_speaks: bool = False


class Bench:
    """A cohort, the undisturbed runs, and the faults; everything lies in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "compiled"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pathflip_jax.cli", "pathflip_jax.train", "matplotlib.figure"])
        self.records = make_cohort(folder / "cohort")
        parts = {"records": self.records, "texts": "reports.jsonl", "slides": "slides.csv", "tokenizer": "vocabulary"}
        self.data = [f"--config.data.{name}={folder / 'cohort' / path}" for name, path in parts.items()]
        self._straight: dict[int, Path] = {}

    def straight(self, hosts: int) -> Path:
        """The undisturbed run."""
        if hosts not in self._straight:
            workdir = self.folder / f"straight{hosts}"
            run = Run(self, workdir, hosts, [])
            if any(run.wait()):
                raise RuntimeError(f"the undisturbed run failed:\n{run.said()[0][-3000:]}")
            self._straight[hosts] = workdir
        return self._straight[hosts]

    def inject(self, fault: str, seed: int) -> Outcome:
        """Let a fault strike a run, start the run again, and compare. Raises RuntimeError where it never struck."""
        if fault == "kill-in-records":
            return self._records(seed)
        begin = time.monotonic()
        strike, hosts = FAULTS[fault]
        straight = self.straight(hosts)
        for attempt in range(5):
            rng = random.Random(f"{fault} {seed} {attempt}")
            workdir = (self._disk() if fault == "full-disk" else self.folder) / f"{fault}-{seed}-{attempt}"
            more = [f"--config.train.hang_seconds={HANG_SECONDS}"] if fault == "hang" else []
            run = Run(self, workdir, hosts, more)
            try:
                struck = strike(self, run, rng)
                codes = run.wait()
            finally:
                run.kill(list(range(hosts)))
            if struck is None and any(codes):
                raise RuntimeError(f"{fault}: the run failed before it struck, with {codes}:\n{run.said()[0][-3000:]}")
            if struck is None or set(codes) == {0}:  # it was through before
                continue
            wrong = [
                f"process {host} exited with {code}, expected {sorted(expected)}"
                for host, (code, expected) in enumerate(zip(codes, struck.codes, strict=True))
                if code not in expected
            ]
            survivors = [text for text, code in zip(run.said(), codes, strict=True) if code != KILLED]
            told = (any if struck.one_speaks else all)(re.search(struck.message, text) for text in survivors)
            reached, newest = run.step(), max(complete(workdir), default=0)
            struck.mend()
            again = Run(self, workdir, hosts, [])
            if any(again.wait()):
                wrong.append(f"the restarted run failed: {again.said()[0][-2000:]}")
            going_on = re.search(r"going on from step (\d+)", again.said()[0])
            resumed = int(going_on[1]) if going_on else 0
            if resumed < newest:
                if not struck.may_go_back or newest - resumed > SAVE_EVERY:
                    wrong.append(f"went on from step {resumed}, {newest} was complete")
                told &= "Damaged checkpoint, going back to step" in again.said()[0]
            wrong += differences(workdir, straight)
            same = not wrong
            wrong += [] if told else [f"not told: {[text[-300:] for text in survivors]}"]
            lost = max(reached - resumed, 0)
            seconds = time.monotonic() - begin
            if not wrong:
                shutil.rmtree(workdir)
            return Outcome(fault, seed, codes, reached, resumed, lost, same, told, wrong, round(seconds, 1))
        raise RuntimeError(f"{fault}: five runs ended before it struck; is the machine that fast?")

    def _disk(self) -> Path:
        disk = self.folder / "disk"
        disk.mkdir(exist_ok=True)
        return disk

    def _records(self, seed: int) -> Outcome:
        """Kill an import while it writes; a second run must leave the files that an undisturbed one leaves."""
        begin, rng = time.monotonic(), random.Random(f"kill-in-records {seed}")
        features, straight = self.folder / "features", self.folder / "imported"
        if not straight.exists():
            make_features(features)
            self._import(features, straight).wait()
        out = self.folder / f"imported-{seed}"
        process = self._import(features, out)
        count, seen = rng.randrange(1, 12), set()
        while process.poll() is None and len(seen) < count:  # the n-th file that is being written
            seen |= {path.name for path in out.rglob("*.tmp")}
        time.sleep(rng.random() * 0.01)
        struck = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        codes = [process.wait()]
        whole = {path.name for path in out.glob("*.tfrecord")}
        wrong = [] if struck else ["it was through before"]
        wrong += [f"{name} is there, and not whole" for name in whole if not same_file(out / name, straight / name)]
        codes.append(self._import(features, out).wait())
        wrong += [f"the second run exited with {codes[1]}"] if codes[1] else []
        names = sorted(path.name for path in straight.iterdir())
        left = [path.name for path in out.iterdir() if path.name not in names and not path.name.endswith(".tmp")]
        wrong += [f"{name} is left" for name in left if name != ".parts"]
        wrong += [f"{name} differs" for name in names if not same_file(out / name, straight / name)]
        if not wrong:
            shutil.rmtree(out)
        seconds = round(time.monotonic() - begin, 1)
        return Outcome("kill-in-records", seed, codes[:1], len(whole), 0, 0, not wrong, True, wrong, seconds)

    def _import(self, features: Path, out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "pathflip_jax.cli", "import", features, "--out", out, "--encoder=tiny"]
        command += ["--patch-size=256", "--mpp=0.5", "--slides-per-shard=2", "--workers=1"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(list(map(str, command)), start_new_session=True, **quiet)


def _sigterm(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    hosts = rng.choice([[0], [1], [0, 1]])
    if not _some_step(run, rng, STEPS // 2):
        return None
    run.kill(hosts, signal.SIGTERM)
    return Struck([{AGAIN}, {AGAIN}], "stopped at step", one_speaks=True)


def _kill_one(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    return _kill(run, rng, [rng.randrange(2)])


def _kill_all(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    return _kill(run, rng, [0, 1])


def _kill(run: Run, rng: random.Random, hosts: list[int]) -> Struck | None:
    if not _some_step(run, rng, STEPS - 5):
        return None
    run.kill(hosts)
    return _killed(run, hosts)


def _killed(run: Run, hosts: list[int]) -> Struck:
    codes = [{KILLED} if host in hosts else {AGAIN} for host in range(len(run.processes))]
    return Struck(codes, "another process of this run is lost")


def _kill_in_save(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    hosts = rng.choice([[0], [1], [0, 1]])
    checkpoints, begin = run.workdir / "checkpoints", rng.randrange(SAVE_EVERY, STEPS - SAVE_EVERY)

    def saving() -> bool:
        return run.step() >= begin and any(checkpoints.glob("*tmp*"))

    if not run.reach(saving):
        return None
    time.sleep(rng.random() * 0.1)
    run.kill(hosts)
    return _killed(run, hosts)


def _full_disk(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    if not _some_step(run, rng, STEPS - 10):
        return None
    message = r"the checkpoint was not written|No space left|File too large"
    if not os.path.ismount(bench.folder / "disk"):
        hard = resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, (0, hard))
        return Struck([{MEND}], message)
    ballast = run.workdir.with_name("ballast")
    deadline = time.monotonic() + LIMIT_SECONDS
    with open(ballast, "wb", buffering=0) as file:
        while run.processes[0].exitcode is None and time.monotonic() < deadline:
            try:
                file.write(bytes(2**16))
            except OSError:
                time.sleep(0.001)  # what old checkpoints free is taken at once
    return Struck([{MEND}], message, mend=ballast.unlink)


def _flipped_byte(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    if not run.reach(lambda: len(complete(run.workdir)) >= 2):
        return None
    time.sleep(rng.random() * 0.5)
    run.kill([0])
    run.wait()
    steps = complete(run.workdir)
    files = sorted(path for path in (run.workdir / "checkpoints" / str(max(steps))).rglob("*") if path.is_file())
    path = rng.choice([path for path in files if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return Struck([{KILLED}], "", may_go_back=True)


def _vanished_shard(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    if not _some_step(run, rng, STEPS // 2):
        return None
    aside = bench.records.with_name("aside")
    bench.records.rename(aside)
    return Struck([{MEND}, {MEND}], r"No such file or directory: '.*tfrecord'", lambda: aside.rename(bench.records))


def _hang(bench: Bench, run: Run, rng: random.Random) -> Struck | None:
    if not _some_step(run, rng, STEPS // 2):
        return None
    aside = bench.records.with_name("aside")
    bench.records.rename(aside)
    bench.records.mkdir()
    for path in aside.glob("*.tfrecord"):
        os.mkfifo(bench.records / path.name)

    def mend() -> None:
        shutil.rmtree(bench.records)
        aside.rename(bench.records)

    return Struck(
        [{AGAIN}, {AGAIN}], r"no progress for .*: process \d \(.*\) at step \d+, reading the next batch", mend
    )


def _some_step(run: Run, rng: random.Random, most: int) -> bool:
    """Wait for a random moment of the run; False when the run ends before."""
    step = rng.randrange(1, most)
    if not run.reach(lambda: run.step() >= step):
        return False
    time.sleep(rng.random() * 0.05)
    return True


FAULTS: dict[str, tuple[Callable, int]] = {
    "sigterm": (_sigterm, 2),
    "kill-one": (_kill_one, 2),
    "kill-all": (_kill_all, 2),
    "kill-in-save": (_kill_in_save, 2),
    "kill-in-records": (Bench._records, 1),
    "full-disk": (_full_disk, 1),
    "flipped-byte": (_flipped_byte, 1),
    "vanished-shard": (_vanished_shard, 2),
    "hang": (_hang, 2),
}


def complete(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def arrays(workdir: Path, step: int) -> dict[str, bytes]:
    """Every number of a checkpoint, as bytes."""
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "opt_state"):
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            folder = workdir / "checkpoints" / str(step) / item
            like = {name: np.zeros(x.shape, x.dtype) for name, x in handler.metadata(folder).items()}
            restored = handler.restore(folder, args=ocp.args.StandardRestore(like))
        found |= {f"{item}/{name}": np.asarray(x).tobytes() for name, x in restored.items()}
    return found


def metrics(workdir: Path) -> list[dict]:
    """The rows of a run without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if "perf/" not in name and "per_second" not in name} for row in rows]


def differences(found: Path, expected: Path) -> list[str]:
    """What two runs that ended differ in: metrics, best step, and every array of the last checkpoint."""
    if complete(found)[-1:] != [STEPS]:
        return [f"ended with checkpoints {complete(found)}"]
    wrong = []
    if metrics(found) != metrics(expected):
        wrong.append("metrics.jsonl differs")
    if os.listdir(found / "best") != os.listdir(expected / "best"):
        wrong.append("another best step")
    mine, theirs = arrays(found, STEPS), arrays(expected, STEPS)
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return wrong + ([f"{len(differing)} arrays differ, such as {differing[0]}"] if differing else [])


def same_file(one: Path, other: Path) -> bool:
    """Whether both are there and hold the same bytes."""
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def make_cohort(folder: Path) -> Path:
    """Slides of random features with reports, in shards of one slide; returns the folder of records."""
    from pathflip_jax.data.features import SlideFeatures
    from pathflip_jax.data.records import finish_folder, shard_name, write_shard
    from pathflip_jax.data.tokens import train_wordpiece

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
    """Feature files to import, in CLAM's form."""
    import h5py

    folder.mkdir()
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(40), np.arange(25)), axis=-1).reshape(-1, 2) * 256
    for number in range(6):
        with h5py.File(folder / f"S{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(len(coords), 512)).astype(np.float32)
            file["coords"] = coords.astype(np.int32)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _copy(hears: Connection, log: Path) -> None:
    """Copy what a process says to a file, until it has ended."""
    with hears, open(log, "ab", buffering=0) as file:
        while said := os.read(hears.fileno(), 2**16):
            file.write(said)


def _train(argv: list[str], says: Connection, devices: int, cache: Path) -> None:
    """`pathflip train` in this process, which the fork server has made with all modules loaded."""
    os.dup2(says.fileno(), 1)
    os.dup2(says.fileno(), 2)
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    os.environ |= {"XLA_FLAGS": flags, "PATHFLIP_DEBUG": ""}
    import jax

    from pathflip_jax import cli

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        code = cli.main(["train", *argv])
        atexit._run_exitfuncs()  # multiprocessing leaves out JAX's farewell to the other processes
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def campaign(bench: Bench, names: list[str], times: int, seed: int) -> Iterator[Outcome]:
    """Every fault so many times."""
    for name in names:
        for number in range(times):
            yield bench.inject(name, seed + number)


def main() -> int:
    """Inject, print the table, write JSON; 1 where a run did not end as the undisturbed one, or was silent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="NAME")
    parser.add_argument("--times", type=int, default=20, help="of each fault (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if "full-disk" in options.faults:
        own_mounts()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        disk = "full-disk" in options.faults and mount_disk(folder / "disk")
        bench, outcomes = Bench(folder), []
        for outcome in campaign(bench, options.faults, options.times, options.seed):
            outcomes.append(outcome)
            state = "same" if outcome.same else "NOT THE SAME"
            print(
                f"{outcome.fault:16} seed {outcome.seed}: exit {outcome.codes}, reached {outcome.reached}, went on "
                f"from {outcome.resumed}, {state}{'' if outcome.told else ', NOT TOLD'} ({outcome.seconds} s)",
                flush=True,
            )
            for fault in outcome.wrong:
                print(f"    {fault}", flush=True)
    rows = [summary(name, [o for o in outcomes if o.fault == name]) for name in options.faults]
    print(f"\n{'fault':16}{'times':>7}{'same state':>12}{'told':>7}{'lost steps, most':>18}{'mean':>7}")
    for row in rows:
        same, told = f"{row['same_state']}/{row['times']}", f"{row['told']}/{row['times']}"
        print(f"{row['fault']:16}{row['times']:>7}{same:>12}{told:>7}{row['lost_most']:>18}{row['lost_mean']:>7.1f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"times": options.times, "seed": options.seed, "steps": STEPS, "save_every": SAVE_EVERY}
        settings["full_disk"] = "tmpfs, ENOSPC" if disk else "RLIMIT_FSIZE, EFBIG"
        content = {"machine": describe("jax", "jaxlib", "orbax-checkpoint"), "settings": settings, "results": rows}
        content["outcomes"] = [outcome._asdict() for outcome in outcomes]
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(outcome.wrong for outcome in outcomes))


def summary(fault: str, outcomes: list[Outcome]) -> dict:
    """A row of the table."""
    lost = [outcome.lost for outcome in outcomes]
    return {
        "fault": fault,
        "times": len(outcomes),
        "same_state": sum(outcome.same for outcome in outcomes),
        "told": sum(outcome.told for outcome in outcomes),
        "lost_most": max(lost, default=0),
        "lost_mean": round(sum(lost) / max(len(lost), 1), 2),
    }


def own_mounts() -> None:
    """Start this program again where it may mount what nobody else sees, if the kernel lets it (user namespaces)."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if not os.environ.get(OWN_MOUNTS) and shutil.which("unshare"):
        if subprocess.run([*inside, "true"], capture_output=True).returncode == 0:
            os.environ[OWN_MOUNTS] = "1"
            os.execvp(inside[0], [*inside, sys.executable, *sys.argv])


def mount_disk(folder: Path) -> bool:
    """Mount a small disk in memory; False outside a mount namespace of our own."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "faults", folder]
    return bool(os.environ.get(OWN_MOUNTS)) and subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
