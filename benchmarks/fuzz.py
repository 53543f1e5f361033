"""Fuzzing campaign of broken and hostile files against every reader: none may crash, hang or write outside its folder.

Valid files of every kind are mutated (`mutations.py`) and read as the commands read them (`fuzz_readers.py`). An input
passes if it is read, or refused by a ValueError or OSError that names its file. Faults are: another type of error
(`type`), an error without the name (`unnamed`), a crash of the process, more than 120 s (`hang`), more than 2 GB
(`memory`), a file written outside the output folder (`outside`), and executed code (`code`: payloads would create a
file; an audit hook watches every file opened, command started and connection made).

    python benchmarks/fuzz.py --inputs 100000 --h5 5000 --seed 0 --json benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --only "h5 clam" --first 1234 --inputs 1     # one input again, with its traceback

An input is a function of (seed, reader, number), whatever the number of processes. Exits with 1 on a fault.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from machine import describe, largest_child, resident_peak
from tqdm import tqdm

from pathflip_jax.runtime.limits import processors

HANG_SECONDS, MOST_BYTES, CHUNK = 120.0, 2_000_000_000, 40
PASSED = ("accepted", "refused")
FAULTS = ("type", "unnamed", "crash", "hang", "memory", "outside", "code")
SHOWN = 5  # faults of a kind and reader that the report quotes
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod")


class Attempt(NamedTuple):
    """Result of an input: its outcome, one of PASSED or FAULTS, the reader's message, and seconds."""

    number: int
    outcome: str
    message: str
    seconds: float


class Watch:
    """Audit hook that records files opened for writing or changed outside a folder, and commands started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.on = str(folder), [], False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else (flags or 0) & WRITES
            if writes and not isinstance(path, int):
                self._note("outside", event, path)
        elif event in CHANGES and arguments[-1] in (-1, None):  # otherwise relative to an open folder
            for path in arguments[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
                self._note("outside", event, path)
        elif event in WATCHED and not _is_ours(event, arguments):
            self.found.append(("code", f"{event}{arguments!r:.200}"))

    def _note(self, kind: str, event: str, path) -> None:
        place = os.path.realpath(os.fsdecode(path))
        if not place.startswith((self.folder + os.sep, "/dev/null", "/proc/self/", "/dev/shm/")):
            self.found.append((kind, f"{event} {place}"))


def _is_ours(event: str, arguments: tuple) -> bool:
    """Whether the library itself is starting its workers: the guarded reader, the pool of `prepare`."""
    if event == "socket.connect":  # the fork server listens on a socket of the file system
        return isinstance(arguments[1], str | bytes)
    return event == "subprocess.Popen" and arguments[0] == sys.executable


class Sandbox:
    """Folder of one process: `work` for the files of a reader, `out` for its output, and a canary file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.out = folder, folder / "inner" / "work", folder / "inner" / "out"
        self.seeds = folder / "seeds"
        self.canary = self.seeds / "canary"  # file that a payload would create; the payloads among the seeds name it
        temporary = folder / "inner" / "tmp"
        for path in (self.work, self.out, self.seeds, temporary):
            path.mkdir(parents=True)
        tempfile.tempdir = str(temporary)
        self.watch = Watch(self.folder / "inner")
        self.reader, self.sound = None, []

    def load(self, reader) -> None:
        """Create a reader's valid files, and the files that accompany the broken one."""
        if self.reader is reader:
            return
        for path in (self.work, self.seeds):
            shutil.rmtree(path)
            path.mkdir()
        (self.work / reader.file).parent.mkdir(exist_ok=True)
        self.reader, self.sound = reader, reader.seeds(self.seeds)
        if reader.prepare is not None:
            reader.prepare(self.work)

    def attempt(self, reader, seed: int, number: int, debug: bool = False) -> Attempt:
        """Break a file, read it, and record the outcome."""
        self.load(reader)
        data = reader.mutate(random.Random(f"{seed}/{reader.name}/{number}"), self.sound)
        path, outcome, message = self.work / reader.file, "accepted", ""
        path.write_bytes(data)
        self.watch.found.clear()
        start, self.watch.on = time.perf_counter(), True
        try:
            reader.read(path, self.out)
        except (ValueError, OSError) as error:
            named = str(self.work) if reader.beside else path.name
            outcome, message = "refused" if named in str(error) else "unnamed", f"{type(error).__name__}: {error}"
        except BaseException as error:  # also raised by panics of Rust libraries
            outcome, message = "type", f"{type(error).__name__}: {error}"
        finally:
            seconds, self.watch.on = time.perf_counter() - start, False
            if debug and outcome != "accepted":
                traceback.print_exc()
        for kind, what in self.watch.found:
            outcome, message = kind, what
        if self.canary.exists():
            self.canary.unlink()
            outcome, message = "code", "a payload ran: it created its file"
        strays = [p.name for p in self.folder.iterdir() if p.name not in ("inner", "seeds")]
        strays += [p.name for p in (self.folder / "inner").iterdir() if p.name not in ("work", "out", "tmp")]
        if strays:
            outcome, message = "outside", f"created {strays}"
        for left in self.out.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return Attempt(number, outcome, message[:400], seconds)


def peak_bytes() -> int:
    """Peak memory of this process or any of its ended children."""
    return max(resident_peak(), largest_child())


def work(connection, current, folder: str, seed: int) -> None:
    """Worker loop of the campaign: takes (reader, numbers), sends attempts; `current` is the input in progress."""
    # Set before JAX is imported. Files of its compilation cache would count as written outside the folder.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    from fuzz_readers import readers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sandbox, known, reported = Sandbox(Path(folder)), {reader.name: reader for reader in readers()}, False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print warnings about the files
    while True:
        task = connection.recv()
        if task is None:
            return
        name, numbers = task
        for number in numbers:
            current[0], current[1] = number, time.monotonic()
            attempt = sandbox.attempt(known[name], seed, number)
            if peak_bytes() > MOST_BYTES and not reported:
                reported, attempt = True, attempt._replace(outcome="memory", message=f"{peak_bytes() / 1e9:.2f} GB")
            current[1] = 0.0
            connection.send((attempt, peak_bytes()))
        connection.send(None)


class Worker:
    """Handle of a campaign process; restarted where an input crashed it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.task, self.starts = folder, seed, None, 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.starts += 1
        self.current = context.Array("d", 2, lock=False)
        self.connection, theirs = context.Pipe()
        place = self.folder / str(self.starts)
        self.process = context.Process(target=work, args=(theirs, self.current, str(place), self.seed), daemon=False)
        place.mkdir(parents=True)
        self.process.start()
        theirs.close()

    def give(self, name: str, numbers: list[int]) -> None:
        """Assign inputs of a reader."""
        self.task = (name, numbers)
        self.current[1] = 0.0
        self.connection.send(self.task)

    def answer(self) -> Iterator[tuple[str, Attempt, int]]:
        """Next message: an attempt, nothing at the end of the task, or a crash, reported as an attempt too."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            yield (*self.replace("crash"), 0)
            return
        if answer is None:
            self.task = None
        else:
            yield self.task[0], *answer

    def hangs(self) -> bool:
        """Whether it has exceeded the time limit of one input."""
        return self.task is not None and 0 < self.current[1] < time.monotonic() - HANG_SECONDS

    def replace(self, outcome: str) -> tuple[str, Attempt]:
        """Kill it, report the responsible input, and restart it on the remaining ones."""
        name, numbers = self.task
        at, self.task = int(self.current[0]), None
        if outcome == "hang":
            self.process.kill()
        self.process.join()
        message = f"exit code {self.process.exitcode}"
        seconds = time.monotonic() - self.current[1]
        self._start()
        left = [number for number in numbers if number > at]
        if left:
            self.give(name, left)
        return name, Attempt(at, outcome, message, seconds)

    def end(self) -> None:
        """Kill it."""
        if self.task is None:
            self.connection.send(None)
        else:
            self.process.kill()
        self.process.join()


def share_out(inputs: int, h5: int, first: int, only: str | None) -> dict[str, list[int]]:
    """Numbers of the inputs assigned to each reader. Raises ValueError for an unknown reader."""
    from fuzz_readers import readers

    known = list(readers())
    if only is not None:
        names = [reader.name for reader in known]
        if only not in names:
            raise ValueError(f"--only {only!r} is none of the readers: {', '.join(names)}")
        return {only: list(range(first, first + inputs))}
    files, others = [r for r in known if not r.weight], [r for r in known if r.weight]
    total, counts = sum(r.weight for r in others), {}
    for group, all_of, weigh in (
        (files, h5, lambda r: 1 / len(files)),
        (others, inputs - h5, lambda r: r.weight / total),
    ):
        given = 0.0
        for reader in group:
            start, given = round(given), given + all_of * weigh(reader)
            counts[reader.name] = list(range(first, first + round(given) - start))
    return counts


def campaign(counts: dict[str, list[int]], seed: int, jobs: int) -> Iterator[tuple[str, Attempt, int]]:
    """Attempts as they are made: reader, attempt, and the peak bytes of its process so far."""
    parts = ((name, numbers, range(0, len(numbers), CHUNK)) for name, numbers in counts.items())
    tasks = [(name, numbers[start : start + CHUNK]) for name, numbers, starts in parts for start in starts]
    random.Random(seed).shuffle(tasks)  # so that an interrupted campaign has covered every reader
    with tempfile.TemporaryDirectory(prefix="pathflip-fuzz-", ignore_cleanup_errors=True) as folder:
        workers = [Worker(Path(folder) / str(i), seed) for i in range(min(jobs, len(tasks)))]
        try:
            while tasks or any(worker.task for worker in workers):
                for worker in workers:
                    if worker.task is None and tasks:
                        worker.give(*tasks.pop())
                ready = wait([worker.connection for worker in workers if worker.task], timeout=1.0)
                for worker in [worker for worker in workers if worker.task]:
                    if worker.connection in ready:
                        yield from worker.answer()
                    elif worker.hangs():
                        yield (*worker.replace("hang"), 0)
        finally:
            for worker in workers:
                worker.end()


def main() -> int:
    """Run the campaign, print one row per reader and the faults, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="total number of broken files (default 100000)")
    parser.add_argument("--h5", type=int, default=5_000, help="how many of them are h5 files (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=processors(), help="processes (default: cores)")
    parser.add_argument("--only", metavar="READER", help="test only this reader")
    parser.add_argument("--first", type=int, default=0, help="number of a reader's first input (default 0)")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    try:
        counts = share_out(options.inputs, options.h5, options.first, options.only)
    except ValueError as error:
        parser.error(str(error))
    total = sum(map(len, counts.values()))
    if options.only and total == 1:
        from fuzz_readers import readers

        reader = next(reader for reader in readers() if reader.name == options.only)
        with tempfile.TemporaryDirectory(prefix="pathflip-fuzz-") as folder:
            print(Sandbox(Path(folder) / "one").attempt(reader, options.seed, options.first, debug=True))
        return 0
    outcomes = {name: Counter() for name in counts}
    slowest, peaks, faults = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0), []
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stopped = contextlib.suppress(KeyboardInterrupt)  # attempts so far are reported
    with tqdm(total=total, unit="file", desc="broken files", smoothing=0.05) as bar, stopped:
        for name, attempt, peak in campaign(counts, options.seed, options.jobs):
            outcomes[name][attempt.outcome] += 1
            slowest[name], peaks[name] = max(slowest[name], attempt.seconds), max(peaks[name], peak)
            if attempt.outcome not in PASSED:
                faults.append((name, attempt))
                bar.set_postfix(faults=len(faults))
            bar.update()
    seconds, tried = time.monotonic() - started, {name: sum(found.values()) for name, found in outcomes.items()}
    total = sum(tried.values())
    rows = {name: {key: found[key] for key in (*PASSED, *FAULTS)} for name, found in outcomes.items()}
    print(f"{'reader':<20}{'inputs':>8}{'read':>8}{'refused':>9}{'faults':>8}{'slowest':>10}{'peak':>9}")
    for name, row in rows.items():
        wrong, shown = sum(row[key] for key in FAULTS), f"{slowest[name]:>8.2f} s{peaks[name] / 1e9:>6.2f} GB"
        print(f"{name:<20}{tried[name]:>8}{row['accepted']:>8}{row['refused']:>9}{wrong:>8}{shown}")
    found = Counter(attempt.outcome for _, attempt in faults)
    print(
        f"{total} inputs in {seconds / 60:.1f} minutes, faults: " + ", ".join(f"{key} {found[key]}" for key in FAULTS)
    )
    seen: Counter = Counter()
    for name, attempt in faults:
        seen[name, attempt.outcome] += 1
        if seen[name, attempt.outcome] <= SHOWN:
            print(f"  {name}, input {attempt.number}: {attempt.outcome}: {attempt.message}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        content = {
            "machine": describe("numpy", "h5py", "torch", "openslide-bin", "tokenizers", "orbax-checkpoint"),
            "settings": settings, "seconds": seconds, "inputs": total, "faults": found, "readers": rows,
            "slowest_seconds": slowest, "peak_bytes": peaks,
            "faults_found": [(name, *attempt) for name, attempt in faults[:200]],
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
