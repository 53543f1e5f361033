"""Metrics logging of a run: metrics.jsonl, TensorBoard events, a progress bar, and plots at the end.

If `train.wandb_project` names a project, Weights & Biases gets the same numbers (extra [wandb]). metrics.jsonl is the
record, and a run ends if it cannot be written. All other outputs are views of it: the failure of one is reported once,
and the run continues without it.
"""

import collections
import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pathflip_jax.data.storage.durable import sync
from pathflip_jax.data.storage.json_values import parse_json
from pathflip_jax.runtime.private_interfaces import is_writing_events

METRICS, TENSORBOARD, PLOTS = "metrics.jsonl", "tensorboard", "plots"
VALIDATION, PERFORMANCE = "val/", "perf/"
CHANCE, STDERR = "_chance", "_stderr"  # suffixes of the names of a score's chance level and standard error
WANDB_ID = "wandb_id"
BAR_REFRESH_SECONDS = 0.5
EVENTS_UNDER_WAY = 10_000  # events that may be queued for writing: far more than a row has
CURE = "free disk space or fix permissions, and run the same command again to resume from the last checkpoint"
SPEED_STEPS = 20  # rows over which slides per second are measured, including validations


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line truncated by a crash is ignored."""
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); delete that line") from None
    lines = lines[:-1] if not lines[-1] else lines
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("no step in it")
            rows.append(row)
        except ValueError:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: not a row of metrics: {line[:60]!r}; delete that line"
                ) from None
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`: a resumed run writes them again, and no step may appear twice."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def _tensorboard(folder: Path, step: int) -> Any:
    """TensorBoard event writer that resumes after `step`; later events, from an interrupted run, are purged."""
    # tensorboardX imports PyTorch if it is installed, which takes seconds, and no PyTorch tensors are logged here.
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]

    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30, max_queue=EVENTS_UNDER_WAY)


class MetricsWriter:
    """Writer for the metrics of a run that resumes after `step`; a context manager. Only the first process writes.

    With `wandb_project` they are also logged to a Weights & Biases run, together with `config`.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        steps: int,
        *,
        slides_per_step: int,
        primary: bool = True,
        wandb_project: str = "",
        config: dict | None = None,
    ):
        self.primary = primary
        self.slides_per_step = slides_per_step
        self._validation: dict[str, float] = {}
        self._recent = collections.deque([(time.monotonic(), step)], maxlen=SPEED_STEPS)
        if not primary:
            return
        if wandb_project:
            import_wandb(wandb_project)
        workdir.mkdir(parents=True, exist_ok=True)
        truncate_metrics(workdir / METRICS, step)
        self._file = open(workdir / METRICS, "a", buffering=1, encoding="utf-8")  # line-buffered: others tail it
        self._wandb = _View(
            "Weights & Biases", lambda: start_wandb(wandb_project, workdir, config), bool(wandb_project)
        )
        self._events = _View("TensorBoard", lambda: _tensorboard(workdir / TENSORBOARD, step))
        look = {"unit": "step", "desc": "train", "mininterval": BAR_REFRESH_SECONDS, "dynamic_ncols": True}
        self._bar = _View("the progress bar", lambda: tqdm(total=steps, initial=step, **look))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row: a step's losses, and the validation after it, if any."""
        if not self.primary:
            return
        now, (then, before) = time.monotonic(), self._recent[0]
        speed = (step - before) * self.slides_per_step / max(now - then, 1e-9)
        self._recent.append((now, step))
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        row["slides_per_second"] = round(speed, 2)
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(f"{self._file.name}: step {step} was not written ({error}); {CURE}") from error
        scalars = {name if "/" in name else f"train/{name}": value for name, value in row.items() if name != "step"}
        self._events.attempt(lambda events: _add_scalars(events, step, scalars))
        self._wandb.attempt(lambda wandb: wandb.log(scalars, step=step))
        self._validation |= {name: value for name, value in row.items() if name.startswith(VALIDATION)}
        shown = {name: f"{row[name]:.3f}" for name in ("loss", "loss_slide", "loss_region") if name in row}
        scores = [name for name in (VALIDATION + "recall_at_1", VALIDATION + "loss") if name in self._validation]
        shown |= {name: with_chance(self._validation, name) for name in scores}
        shown |= {"slides/s": f"{speed:.3g}"} | _shown_performance(row)
        self._bar.attempt(lambda bar: _advance(bar, step, shown))

    def flush(self) -> None:
        """Flush all rows to disk, before a checkpoint, which must not be ahead of its metrics."""
        if self.primary:
            self._file.flush()
            sync(self._file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        if self.primary:
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # only the first error is raised
                self.flush()
                self._file.close()
            self._events.attempt(_close_events)
            self._bar.attempt(tqdm.close)
            self._wandb.attempt(lambda wandb: wandb.finish())


def with_chance(row: dict[str, float], name: str) -> str:
    """A score of a row, with its chance level if the row has one: `0.412 (chance 0.026)`."""
    chance = f" (chance {row[name + CHANCE]:.3f})" if name + CHANCE in row else ""
    return f"{row[name]:.3f}{chance}"


class _View:
    """An optional view of metrics.jsonl: its first failure is reported and disables it."""

    def __init__(self, name: str, start: Callable[[], Any], wanted: bool = True):
        self.name, self.part, self._works = name, None, wanted
        self.part = self.attempt(lambda _: start())

    def attempt(self, work: Callable[[Any], Any]) -> Any:
        """Result of `work` on the view; None if it fails or has failed before."""
        if not self._works:
            return None
        try:
            return work(self.part)
        except Exception as error:  # wandb's exceptions have no common base
            self._works = False
            with contextlib.suppress(Exception):  # stderr itself may fail
                print(f"{self.name} failed: {error!r}; training continues, {METRICS} has every row", file=sys.stderr)
            return None


def _advance(bar: tqdm, step: int, shown: dict[str, str]) -> None:
    bar.set_postfix(shown, refresh=False)
    bar.update(step - bar.n)


def _add_scalars(events: Any, step: int, scalars: dict[str, float]) -> None:
    _require_writer(events)
    for name, value in scalars.items():
        events.add_scalar(name, value, step)


def _close_events(events: Any) -> None:
    _require_writer(events)
    events.close()


def _require_writer(events: Any) -> None:
    """Raise OSError if the event writer thread has ended, as on a full disk: waiting for it would never return."""
    if not is_writing_events(events):
        raise OSError("its events can no longer be written")


def import_wandb(project: str):
    """The wandb package; ImportError names the extra if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise ImportError(
            f"train.wandb_project={project!r} needs wandb: `pip install pathflip-jax[wandb]`, or leave it empty"
        ) from None
    if not hasattr(wandb, "init"):  # a folder called wandb, which Weights & Biases creates where it runs
        raise ImportError(
            f"train.wandb_project={project!r} needs the package wandb, but {next(iter(wandb.__path__), 'a folder')} is "
            "imported instead: rename it or start in another folder, and run `pip install pathflip-jax[wandb]`"
        )
    return wandb


def start_wandb(project: str, workdir: Path, config: dict | None):
    """Weights & Biases run of a run folder; a resumed run continues the same one.

    Of rows that a restart writes again, Weights & Biases keeps the first version. WANDB_MODE=offline needs no account;
    mode, key and server are set as for wandb itself.
    """
    wandb = import_wandb(project)
    named = workdir / WANDB_ID
    if not named.exists():
        named.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    name = named.read_text(encoding="utf-8")
    return wandb.init(project=project, dir=str(workdir), id=name, name=workdir.name, resume="allow", config=config)


def _shown_performance(row: dict[str, float]) -> dict[str, str]:
    """Hardware utilisation as shown by the progress bar."""
    shown = {}
    for name, label in (("utilisation", "use"), ("input_wait", "wait")):
        if PERFORMANCE + name in row:
            shown[label] = f"{row[PERFORMANCE + name]:.1%}"
    for name in ("device_memory_bytes", "process_memory_bytes"):
        if PERFORMANCE + name in row:
            shown["GB"] = f"{row[PERFORMANCE + name] / 1e9:.1f}"
    return shown


def try_to_plot(workdir: Path) -> None:
    """Draw the plots of `plot`, reporting a failure: the run is complete with or without them."""
    try:
        plot(workdir)
    except Exception as error:
        print(f"{workdir / PLOTS}: not drawn ({error!r}); the run itself is complete", file=sys.stderr)


def _chance_last(name: str) -> tuple[str, bool]:
    """Sort key that places a chance level directly after its score."""
    return name.removesuffix(CHANCE), name.endswith(CHANCE)


def plot(workdir: Path) -> list[Path]:
    """Plot losses, learning rate, validation and hardware utilisation over steps into plots/; returns the files."""
    from matplotlib.figure import Figure

    rows = read_metrics(workdir / METRICS)
    names = {name for row in rows for name in row}
    shown = sorted((name for name in names if not name.endswith(STDERR)), key=_chance_last)
    groups = {
        "loss": ([name for name in shown if "loss" in name], "loss"),
        "learning_rate": (["learning_rate"], "learning rate"),
        "validation": ([name for name in shown if name.startswith(VALIDATION) and "loss" not in name], "validation"),
        "gradient_norm": (["gradient_norm"], "global gradient norm"),
        "speed": (["slides_per_second"], "slides per second"),
        "utilisation": ([PERFORMANCE + name for name in ("utilisation", "input_wait")], "share"),
        "memory": (sorted(name for name in names if "memory" in name), "bytes"),
    }
    folder = workdir / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for title, (columns, label) in groups.items():
        columns = [column for column in columns if column in names]
        if not columns:
            continue
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        line = None
        for column in columns:
            points = [(row["step"], row[column]) for row in rows if column in row]
            marker = "o" if column.startswith(VALIDATION) else None
            if column.endswith(CHANCE) and line:  # dashed, in the colour of its score, which sorts just before it
                axes.plot(*zip(*points, strict=True), label=column, color=line.get_color(), linestyle="--", linewidth=1)
                continue
            (line,) = axes.plot(*zip(*points, strict=True), label=column, marker=marker, markersize=3, linewidth=1)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(folder / f"{title}.png", dpi=120)
        pictures.append(folder / f"{title}.png")
    return pictures
