"""Fault injection into real runs: each run is restarted and compared with the undisturbed run; lost steps are counted.

A tiny cohort is trained for 40 steps, by one process or by two with two virtual devices each, with a checkpoint every 5
steps. The fault is injected at a random (seeded) moment; then the same command is restarted, as a launcher would, and
its last parameters, optimizer state and metrics must equal those of the undisturbed run bit for bit.

fault            hosts  injection
sigterm          2      SIGTERM to one process or both
kill-one         2      kill -9 of one process
kill-all         2      kill -9 of both processes
kill-in-save     2      kill -9 of one or both while a checkpoint is being written
kill-in-records  1      kill -9 of `pathflip import` and its workers while a file of records is being written
full-disk        1      the disk fills up: a separate tmpfs and a ballast file (ENOSPC) if user namespaces are allowed,
                        otherwise a limit on the size of the process's files (RLIMIT_FSIZE, EFBIG)
flipped-byte     1      kill -9, then one bit of one file of the newest checkpoint is flipped
vanished-shard   2      a file of records disappears from the folder
hang             2      the files of records stop responding (replaced by FIFOs)

"Lost" steps are those that the restarted run repeats: the steps since the last complete checkpoint, never more. A fault
counts as reported ("told") if every surviving process describes it on stderr and exits with the right code: 75 if a
restart is enough, 2 if something must be repaired first.

    python benchmarks/faults.py --times 20 --json benchmarks/results/faults.json     # resumes an interrupted campaign
    python benchmarks/faults.py --faults kill-in-save flipped-byte --times 3
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fault_runs import (
    LIMIT_SECONDS,
    SAVE_EVERY,
    SLIDES,
    STEPS,
    Rig,
    Run,
    complete,
    differences,
    make_features,
    same_file,
)
from machine import describe

RESTART, REPAIR, KILLED = 75, 2, -signal.SIGKILL
HANG_SECONDS = 60  # on a busy machine, a step may take many seconds
OWN_MOUNTS = "FAULTS_OWN_MOUNTS"
RUNS = {"steps": STEPS, "save_every": SAVE_EVERY, "slides": SLIDES}  # settings shared by the outcomes of one table


class Outcome(NamedTuple):
    """Outcome of one fault: exit `codes`, steps reached, resumed from and repeated (`lost`), and errors (`wrong`)."""

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


class Injection(NamedTuple):
    """Injected fault: the expected exit codes, the survivors' messages, and the repair needed before the restart.

    Each survivor must report why it ends, except with `one_report`: then process 0 reports for all.
    """

    codes: list[set[int]]
    message: str
    repair: Callable[[], None] = lambda: None
    may_go_back: bool = False
    one_report: bool = False


class Bench(Rig):
    """Fault injector and comparison for runs of the rig."""

    def inject(self, fault: str, seed: int) -> Outcome:
        """Inject a fault into a run, restart it, and compare. Raises RuntimeError if it could not be injected."""
        if fault == "kill-in-records":
            return self._records(seed)
        begin = time.monotonic()
        inject_fault, hosts = FAULTS[fault]
        undisturbed = self.undisturbed(hosts)
        for attempt in range(5):
            rng = random.Random(f"{fault} {seed} {attempt}")
            workdir = (self._disk() if fault == "full-disk" else self.folder) / f"{fault}-{seed}-{attempt}"
            more = [f"--config.train.hang_seconds={HANG_SECONDS}"] if fault == "hang" else []
            run = Run(self, workdir, hosts, more)
            try:
                injection = inject_fault(self, run, rng)
                codes = run.wait()
            finally:
                run.kill(list(range(hosts)))
            if injection is not None:
                injection.repair()
            elif any(codes):
                raise RuntimeError(
                    f"{fault}: the run failed with {codes} before the fault was injected:\n{run.outputs()[0][-3000:]}"
                )
            if injection is None or set(codes) == {0}:  # the run finished before the injection
                continue
            wrong = [
                f"process {host} exited with {code}, expected {sorted(expected)}"
                for host, (code, expected) in enumerate(zip(codes, injection.codes, strict=True))
                if code not in expected
            ]
            survivors = [text for text, code in zip(run.outputs(), codes, strict=True) if code != KILLED]
            told = (any if injection.one_report else all)(re.search(injection.message, text) for text in survivors)
            reached, newest = run.step(), max(complete(workdir), default=0)
            again = Run(self, workdir, hosts, [])
            if any(again.wait()):
                wrong.append(f"the restarted run failed: {again.outputs()[0][-2000:]}")
            resumption = re.search(r"resuming from step (\d+)", again.outputs()[0])
            resumed = int(resumption[1]) if resumption else 0
            if resumed < newest:
                if not injection.may_go_back or newest - resumed > SAVE_EVERY:
                    wrong.append(f"resumed from step {resumed} although {newest} was complete")
                told &= "Damaged checkpoint, going back to step" in again.outputs()[0]
            wrong += differences(workdir, undisturbed)
            same = not wrong
            wrong += [] if told else [f"fault not reported: {[text[-300:] for text in survivors]}"]
            lost = max(reached - resumed, 0)
            seconds = time.monotonic() - begin
            if not wrong:
                shutil.rmtree(workdir)
            return Outcome(fault, seed, codes, reached, resumed, lost, same, told, wrong, round(seconds, 1))
        raise RuntimeError(f"{fault}: five runs ended before the fault was injected; is the machine too fast?")

    def _disk(self) -> Path:
        disk = self.folder / "disk"
        disk.mkdir(exist_ok=True)
        return disk

    def _records(self, seed: int) -> Outcome:
        """Kill an import while it writes; a second run must produce the same files as an undisturbed one."""
        begin, rng = time.monotonic(), random.Random(f"kill-in-records {seed}")
        features, undisturbed = self.folder / "features", self.folder / "imported"
        if not undisturbed.exists():
            make_features(features)
            self._import(features, undisturbed).wait()
        out = self.folder / f"imported-{seed}"
        process = self._import(features, out)
        count, seen = rng.randrange(1, 12), set()
        while process.poll() is None and len(seen) < count:  # the n-th file being written
            seen |= {path.name for path in out.rglob("*.tmp")}
        time.sleep(rng.random() * 0.01)
        running = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        codes = [process.wait()]
        whole = {path.name for path in out.glob("*.tfrecord")}
        wrong = [] if running else ["the import finished before it could be killed"]
        wrong += [f"{name} is incomplete" for name in whole if not same_file(out / name, undisturbed / name)]
        codes.append(self._import(features, out).wait())
        wrong += [f"the second run exited with {codes[1]}"] if codes[1] else []
        names = sorted(path.name for path in undisturbed.iterdir())
        left = [path.name for path in out.iterdir() if path.name not in names and not path.name.endswith(".tmp")]
        wrong += [f"{name} is left over" for name in left if name != ".parts"]
        wrong += [f"{name} differs" for name in names if not same_file(out / name, undisturbed / name)]
        if not wrong:
            shutil.rmtree(out)
        seconds = round(time.monotonic() - begin, 1)
        return Outcome("kill-in-records", seed, codes[:1], len(whole), 0, 0, not wrong, True, wrong, seconds)

    def _import(self, features: Path, out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "pathflip_jax.cli", "import", features, "--out", out, "--encoder=tiny"]
        command += ["--patch-size=256", "--mpp=0.5", "--slides-per-shard=2", "--workers=1"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(list(map(str, command)), start_new_session=True, **quiet)


def _sigterm(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    hosts = rng.choice([[0], [1], [0, 1]])
    if not _reach_random_step(run, rng, STEPS // 2):
        return None
    run.kill(hosts, signal.SIGTERM)
    return Injection([{RESTART}, {RESTART}], "stopped at step", one_report=True)


def _kill_one(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    return _kill(run, rng, [rng.randrange(2)])


def _kill_all(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    return _kill(run, rng, [0, 1])


def _kill(run: Run, rng: random.Random, hosts: list[int]) -> Injection | None:
    if not _reach_random_step(run, rng, STEPS - 5):
        return None
    run.kill(hosts)
    return _killed(run, hosts)


def _killed(run: Run, hosts: list[int]) -> Injection:
    codes = [{KILLED} if host in hosts else {RESTART} for host in range(len(run.processes))]
    return Injection(codes, "another process of this run is lost")


def _kill_in_save(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    hosts = rng.choice([[0], [1], [0, 1]])
    checkpoints, begin = run.workdir / "checkpoints", rng.randrange(SAVE_EVERY, STEPS - SAVE_EVERY)

    def saving() -> bool:
        return run.step() >= begin and any(checkpoints.glob("*tmp*"))

    if not run.reach(saving):
        return None
    time.sleep(rng.random() * 0.1)
    run.kill(hosts)
    return _killed(run, hosts)


def _full_disk(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    if not _reach_random_step(run, rng, STEPS - 10):
        return None
    message = r"the checkpoint was not written|No space left|File too large"
    if not os.path.ismount(bench.folder / "disk"):
        hard = resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, (0, hard))
        return Injection([{REPAIR}], message)
    ballast = run.workdir.with_name("ballast")
    deadline = time.monotonic() + LIMIT_SECONDS
    with open(ballast, "wb", buffering=0) as file:
        while run.processes[0].exitcode is None and time.monotonic() < deadline:
            try:
                file.write(bytes(2**16))
            except OSError:
                time.sleep(0.001)  # space freed by old checkpoints is taken immediately
    return Injection([{REPAIR}], message, repair=ballast.unlink)


def _flipped_byte(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
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
    return Injection([{KILLED}], "", may_go_back=True)


def _vanished_shard(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    if not _reach_random_step(run, rng, STEPS // 2):
        return None
    aside = bench.records.with_name("aside")
    bench.records.rename(aside)
    return Injection(
        [{REPAIR}, {REPAIR}], r"No such file or directory: '.*tfrecord'", lambda: aside.rename(bench.records)
    )


def _hang(bench: Bench, run: Run, rng: random.Random) -> Injection | None:
    if not _reach_random_step(run, rng, STEPS // 2):
        return None
    aside, shards = bench.records.with_name("aside"), list(bench.records.glob("*.tfrecord"))
    aside.mkdir()
    for shard in shards:  # no shard is missing at any moment, which would be another fault
        os.link(shard, aside / shard.name)
        os.mkfifo(aside / "fifo")
        os.replace(aside / "fifo", shard)

    def repair() -> None:
        for shard in shards:
            os.replace(aside / shard.name, shard)
        aside.rmdir()

    reading = "(reading the next batch|validating)"
    return Injection([{RESTART}, {RESTART}], rf"no progress for .*: process \d \(.*\) at step \d+, {reading}", repair)


def _reach_random_step(run: Run, rng: random.Random, most: int) -> bool:
    """Wait for a random moment of the run; False when the run ends first."""
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


def campaign(bench: Bench, names: list[str], seeds: range, done: list[Outcome]) -> Iterator[Outcome]:
    """Outcomes of every fault with every seed, all faults once before any repeats; those in `done` are reused."""
    known = {(outcome.fault, outcome.seed): outcome for outcome in done}
    for seed in seeds:
        for name in names:
            yield known.get((name, seed)) or bench.inject(name, seed)


def main() -> int:
    """Inject, print the table, write JSON; returns 1 if a run ended unlike the undisturbed one or without a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=list(FAULTS),
        default=list(FAULTS),
        metavar="NAME",
        help=f"faults to inject, of {', '.join(FAULTS)} (default: all)",
    )
    parser.add_argument("--times", type=int, default=20, help="number of injections of each fault (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of injection (default 0)")
    parser.add_argument("--folder", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file to write; faults that are in it already are not injected again")
    options = parser.parse_args()
    if "full-disk" in options.faults:
        own_mounts()
    try:
        done = read_outcomes(options.json) if options.json and options.json.exists() else []
    except ValueError as error:
        parser.error(str(error))
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if "full-disk" in options.faults:
            mount_disk(folder / "disk")
        seeds = range(options.seed, options.seed + options.times)
        for outcome in campaign(Bench(folder), options.faults, seeds, done):
            outcomes.append(outcome)
            state = "same state" if outcome.same else "DIFFERENT STATE"
            print(
                f"{outcome.fault:16} seed {outcome.seed}: exit {outcome.codes}, reached step {outcome.reached}, "
                f"resumed from {outcome.resumed}, {state}{'' if outcome.told else ', NOT REPORTED'} "
                f"({outcome.seconds} s)",
                flush=True,
            )
            for fault in outcome.wrong:
                print(f"    {fault}", flush=True)
            if options.json and outcome not in done:
                done.append(outcome)
                write_outcomes(options.json, done)
    print(f"\n{'fault':16}{'times':>7}{'same state':>12}{'reported':>10}{'lost steps, maximum':>21}{'mean':>7}")
    for row in summaries(outcomes):
        same, told = f"{row['same_state']}/{row['times']}", f"{row['told']}/{row['times']}"
        print(f"{row['fault']:16}{row['times']:>7}{same:>12}{told:>10}{row['lost_most']:>21}{row['lost_mean']:>7.1f}")
    return int(any(outcome.wrong for outcome in outcomes))


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes of an earlier campaign. Raises ValueError if its runs had other settings."""
    content = json.loads(path.read_text())
    if content["settings"] != RUNS:
        raise ValueError(f"{path}: found runs with {content['settings']}, expected {RUNS}; name another file")
    return [Outcome(**outcome) for outcome in content["outcomes"]]


def write_outcomes(path: Path, outcomes: list[Outcome]) -> None:
    """Write the table and all outcomes, so that an interrupted campaign can resume."""
    content = {"machine": describe("jax", "jaxlib", "orbax-checkpoint"), "settings": RUNS}
    content |= {"results": summaries(outcomes), "outcomes": [outcome._asdict() for outcome in outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def summaries(outcomes: list[Outcome]) -> list[dict]:
    """Rows of the table, one per fault."""
    return [summary(name, found) for name in FAULTS if (found := [o for o in outcomes if o.fault == name])]


def summary(fault: str, outcomes: list[Outcome]) -> dict:
    """Row of the table for one fault."""
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
    """Re-execute this program in a private mount namespace, if the kernel allows it (user namespaces)."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if not os.environ.get(OWN_MOUNTS) and shutil.which("unshare"):
        if subprocess.run([*inside, "true"], capture_output=True).returncode == 0:
            os.environ[OWN_MOUNTS] = "1"
            os.execvp(inside[0], [*inside, sys.executable, *sys.argv])


def mount_disk(folder: Path) -> None:
    """Mount a small in-memory disk in a private mount namespace; elsewhere the folder is an ordinary one."""
    folder.mkdir(exist_ok=True)
    if os.environ.get(OWN_MOUNTS):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "faults", folder], capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
