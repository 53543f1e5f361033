"""Goodput: the share of a run's time that advanced training, and the causes of the rest.

A run appends to goodput.jsonl in its folder, so the file survives kills and restarts; each row gives the time that this
process has spent per cause. Time is productive if it went into steps that were not repeated: the seconds of steps after
the checkpoint that a later start resumed from are lost work, and the time between the last row of a process and the
next start is down time. All causes add up to the time from the first start to the last row.

The terms are those of the package ml-goodput-measurement 0.2.3. The package itself works on Google Cloud only: it
writes to and reads from Cloud Logging (offline its recorder raises DefaultCredentialsError), and pulls in 30 packages,
72 MB, besides NumPy and SciPy.
"""

import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pathflip_jax.monitoring.metrics import read_metrics

GOODPUT = "goodput.jsonl"
# Causes of the main thread's time. STEP is the remainder: dispatching steps and waiting for the devices.
INITIALISATION, COMPILATION, RESTORE, STEP = "initialisation", "compilation", "checkpoint_restore", "step"
DATA, SAVE, EVALUATION, PROFILE = "data_loading", "checkpoint_save", "evaluation", "profile"
CAUSES = (INITIALISATION, COMPILATION, RESTORE, STEP, DATA, SAVE, EVALUATION, PROFILE)
LOST, DOWN = "lost_work", "down"
START, PROGRESS, SAVED, END = "start", "progress", "saved", "end"
RECORD_SECONDS = 10.0  # time that a killed process leaves unrecorded at most
DAY = 86400.0


class Ledger:
    """Time of one process by cause, and the rows that record it; a context manager around the training loop.

    `began` is the `time.time()` taken as the start of the process. Rows are written once `open` has named the file, by
    the first process only. A file that cannot be written is reported once, and the run continues: times are cumulative,
    so the next row makes up for missing ones.
    """

    def __init__(self, began: float | None = None, record_seconds: float = RECORD_SECONDS):
        now = time.perf_counter()
        self._began = time.time() if began is None else began
        self._spent = dict.fromkeys(CAUSES, 0.0)
        self._cause, self._since = INITIALISATION, now - (time.time() - self._began)
        self._saving: tuple[int, float] | None = None  # the step, and the seconds of all saves before
        self.resumed = now  # perf_counter() at which the loop returned to steps
        self._path: Path | None = None
        self._torn = self._reported = False
        self._step = 0
        self._every, self._recorded = record_seconds, now

    def switch(self, cause: str, saving: int | None = None) -> str:
        """Attribute time to `cause` from now on; returns the previous cause.

        With `saving`, the time until the next switch is recorded as the time that the checkpoint of that step blocks
        the loop.
        """
        self._count()
        before, self._cause = self._cause, cause
        if cause == STEP != before:
            self.resumed = self._since
        saved, self._saving = self._saving, None if saving is None else (saving, self._spent[SAVE])
        if saved is not None:
            self._write(SAVED, saved[0], took=round(self._spent[SAVE] - saved[1], 4))
        return before

    def _count(self) -> None:
        now = time.perf_counter()
        self._spent[self._cause] += now - self._since
        self._since = now

    @contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """Attribute the time of a block to `cause`, even if it raises."""
        before = self.switch(cause)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Reattribute seconds from one cause to another, when the cause is known only afterwards."""
        self._spent[source] -= seconds
        self._spent[target] += seconds

    def open(self, workdir: Path, step: int, **facts: float) -> None:
        """Start writing to the run's file, for a run that resumes after `step`; `facts` go into the first row."""
        self._path, self._torn = workdir / GOODPUT, True
        self._write(START, step, began=round(self._began, 3), **facts)

    def progress(self, step: int) -> None:
        """Record a completed step, with a row every ten seconds."""
        self._step = step
        if time.perf_counter() - self._recorded >= self._every:
            self._write(PROGRESS, step)

    def _write(self, event: str, step: int, **more: float) -> None:
        if self._path is None:
            return
        self._count()
        self._step, self._recorded = step, self._since
        spent = {cause: round(seconds, 4) for cause, seconds in self._spent.items() if seconds}
        row = {"time": round(time.time(), 3), "event": event, "step": step, **more, "seconds": spent}
        try:
            self._append(json.dumps(row) + "\n")
        except OSError as error:
            if not self._reported:
                print(
                    f"{self._path}: not written ({error}); training continues, but this file may be incomplete",
                    file=sys.stderr,
                )
            self._reported = True

    def _append(self, row: str) -> None:
        if self._torn and self._path.exists():  # a row truncated by a crash or a full disk would precede ours
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
        self._torn = True
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(row)
        self._torn = False

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Write the last row, however the run ended."""
        self._write(END, self._step)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Breakdown of a run's time over all of its starts, in seconds except shares and counts.

    `goodput` is the productive share of `total`, `goodput_while_running` that of the time in which a process was
    running. `badput` and `productive` add up to `total`. `save` is the median time that a checkpoint blocks the loop,
    nan before the first.
    """

    total: float
    productive: float
    goodput: float
    goodput_while_running: float
    badput: dict[str, float]
    starts: int
    steps: int
    step: float
    saves: int
    save: float
    save_every: int
    preemptions_per_day: float


def summarise(workdir: str | Path) -> Summary:
    """Summary of goodput.jsonl of a run. Raises FileNotFoundError if it is missing, ValueError if it is damaged."""
    path = Path(workdir) / GOODPUT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the --workdir of a `pathflip train` run")
    processes: list[list[dict]] = []
    for number, row in enumerate(read_metrics(path), 1):
        if lacking := [name for name in ("event", "time", "seconds") if name not in row]:
            raise ValueError(f"{path}: row {number} has no {' and no '.join(lacking)}; delete that line")
        if row["event"] == START:
            processes.append([])
        elif not processes:
            raise ValueError(f"{path}: its first row is {row['event']!r}, expected {START!r}; restore the whole file")
        processes[-1].append(row)
    if not processes:
        raise ValueError(f"{path}: the file has no rows; start the run again")
    spent = dict.fromkeys((*CAUSES, LOST, DOWN), 0.0)
    for number, rows in enumerate(processes):
        for cause, seconds in rows[-1]["seconds"].items():
            spent[cause] += seconds
        later = processes[number + 1 :]
        if later:
            spent[DOWN] += max(later[0][0]["began"] - rows[-1]["time"], 0.0)
            kept = min(after[0]["step"] for after in later)  # later steps were repeated
            there = [row["seconds"].get(STEP, 0.0) for row in rows if row["step"] <= kept]
            lost = rows[-1]["seconds"].get(STEP, 0.0) - max(there, default=0.0)
            spent[STEP] -= lost
            spent[LOST] += lost
    total, productive = max(sum(spent.values()), 1e-9), spent.pop(STEP)
    saves = [row["took"] for rows in processes for row in rows if row["event"] == SAVED]
    first, last = processes[0][0]["step"], processes[-1][-1]["step"]
    newest = processes[-1][0]
    return Summary(
        total=total,
        productive=productive,
        goodput=productive / total,
        goodput_while_running=productive / max(total - spent[DOWN], 1e-9),
        badput=spent,
        starts=len(processes),
        steps=last,
        step=productive / (last - first) if last > first else math.nan,
        saves=len(saves),
        save=statistics.median(saves) if saves else math.nan,
        save_every=newest["save_every"],
        preemptions_per_day=newest["preemptions_per_day"],
    )


def save_interval(cost: float, preemptions_per_day: float) -> float:
    """Optimal seconds between saves: sqrt(2 x cost of a save x mean time between failures).

    Young's first-order formula (Communications of the ACM 17, 1974, p. 530), valid if a save takes far less time than
    passes between failures.
    """
    return math.sqrt(2 * cost * DAY / preemptions_per_day)


def overhead(interval: float, cost: float, preemptions_per_day: float) -> float:
    """Share of time lost to saves every `interval` seconds and to work repeated after preemptions."""
    return cost / interval + interval / 2 * preemptions_per_day / DAY


def recommend(found: Summary) -> dict | None:
    """Optimal steps and seconds between saves, with the current and the optimal overhead.

    None without a configured preemption rate, or before a save and a step have been measured.
    """
    rate = found.preemptions_per_day
    if not (rate > 0 and found.save > 0 and found.step > 0):
        return None
    steps = max(round(save_interval(found.save, rate) / found.step), 1)
    loss, now = (overhead(n * found.step, found.save, rate) for n in (steps, found.save_every))
    return {"save_every": steps, "seconds": steps * found.step, "overhead": loss, "overhead_now": now}


def as_dict(found: Summary) -> dict:
    """Summary and recommendation as plain values for JSON, with null for unknown ones."""
    values = dataclasses.asdict(found) | {"recommended": recommend(found)}
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in values.items()}


def describe(found: Summary) -> str:
    """Summary as text, with the recommendation if there is one."""
    lines = [
        f"goodput {found.goodput:.1%} of {_duration(found.total)} ({found.goodput_while_running:.1%} while running): "
        f"{found.steps} steps, {found.starts} start{'s' * (found.starts > 1)}"
    ]
    rows = sorted(found.badput.items(), key=lambda item: -item[1])
    lines += [
        f"  {cause.replace('_', ' '):20} {seconds / found.total:6.1%}  {_duration(seconds)}"
        for cause, seconds in rows
        if seconds
    ]
    advice = recommend(found)
    if advice:
        lines.append(
            f"a save blocks training for {_duration(found.save)}; at {found.preemptions_per_day:g} preemptions per "
            f"day, --config.train.save_every={advice['save_every']} (every {_duration(advice['seconds'])}) costs "
            f"{advice['overhead']:.2%} of the time in saves and lost work, the present {found.save_every} costs "
            f"{advice['overhead_now']:.2%}"
        )
    elif found.saves and not found.preemptions_per_day:
        lines.append(
            f"a save blocks training for {_duration(found.save)}; set --config.train.preemptions_per_day to get a "
            "recommended train.save_every"
        )
    return "\n".join(lines)


def try_to_describe(workdir: Path) -> str:
    """Text of `describe` for a run folder, or the reason why there is none: a damaged file must not end a run."""
    try:
        return describe(summarise(workdir))
    except (OSError, ValueError) as error:
        return f"goodput not reported: {error}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
