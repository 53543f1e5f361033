"""The files of an evaluation: scores.json, tables as CSV, figures as PNG, and a self-contained report.html.

The page embeds its pictures and styles and needs no network, so that it can be mailed and archived.
"""

import base64
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax
import jinja2
from matplotlib.figure import Figure

from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.texts.tables import write_csv
from pathflip_jax.evaluate.task import GAIN, SCORE, SHARE, Headline, Task
from pathflip_jax.evaluate.tasks import TASKS
from pathflip_jax.evaluate.units import METRICS

PACKAGES = ("pathflip-jax", "jax", "flax", "numpy", "scikit-learn", "openslide-python")
OPTIONAL = ("scikit-survival",)


def versions() -> dict[str, str]:
    """The versions of the packages that scores depend on, and the device."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    for name in OPTIONAL:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    devices = jax.devices()
    return found | {"devices": f"{len(devices)} x {devices[0].device_kind}"}


def write(out: Path, scores: dict, pictures: dict[str, Figure], tables: dict[str, list[dict]], config: dict) -> dict:
    """Write every file of an evaluation into `out`; returns the content of scores.json."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(out / "figures" / f"{name}.png", dpi=160, facecolor="white")
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    scores = without_nan(scores)
    write_json(out / "scores.json", scores, indent=1, ensure_ascii=False, allow_nan=False)
    images = {name: (out / "figures" / f"{name}.png").read_bytes() for name in pictures}
    page = render(scores, images, config, [f"{name}.csv" for name in tables])
    with atomic_file(out / "report.html") as file:
        file.write(page.encode())
    return scores


def without_nan(value):
    """The tree with None in place of NaN and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(scores: dict, images: dict[str, bytes], config: dict, files: list[str]) -> str:
    """The report as one HTML page; `images` are PNG by figure name."""
    pages, shown = environment(), sorted(scored_tasks(scores), key=lambda task: -task.prominence)
    return pages.get_template("report.html").render(
        scores=scores,
        images={name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in images.items()},
        sections=[pages.get_template(task.section.name) for task in shown if task.section is not None],
        metrics=METRICS,
        cards=[_card(headline) for headline in headlines(scores)],
        command=command_line(scores["command"]),
        config=json.dumps(config, indent=2, default=str, ensure_ascii=False),
        files=["scores.json", *files],
    )


def scored_tasks(scores: dict) -> list[Task]:
    """The tasks that an evaluation has scores of."""
    return [task for task in TASKS if task.key in scores]


def headlines(scores: dict) -> list[Headline]:
    """The main scores of an evaluation, task by task."""
    return [headline for task in scored_tasks(scores) for headline in task.headlines(scores)]


def environment() -> jinja2.Environment:
    """The templates of the pages and of the tasks' sections, with filters that format numbers."""
    folders = dict.fromkeys([Path(__file__).parent, *(task.section.parent for task in TASKS if task.section)])
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found.filters |= {"figure": _figure, "percent": _percent, "signed": _signed, "points": _points}
    found.filters |= {
        "span": lambda entry, digits=3: _span(entry, partial(_figure, digits=digits)),
        "signed_span": lambda entry, digits=3: _span(entry, partial(_signed, digits=digits)),
        "percent_span": lambda entry: _span(entry, _percent),
        "points_span": lambda entry: _span(entry, _points),
        "merged": dict.__or__,
    }
    return found


def in_terminal(scores: dict) -> str:
    """The headline scores as a table for the terminal, with intervals, chance and other baselines."""
    rows = [("", "score", "95% interval", "chance", "baselines")]
    for headline in headlines(scores):
        write, entry = _writer(headline.kind), headline._asdict()
        others = ", ".join(f"{name} {write(value)}" for name, value in headline.others.items())
        rows.append((headline.name, write(headline.value), _span(entry, write), write(headline.chance), others))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join(lines).replace("–", "-").replace("−", "-")  # characters of every terminal


def _card(headline: Headline) -> dict[str, str]:
    """A headline as a card of the page."""
    write = _writer(headline.kind)
    against = [_span(headline._asdict(), write) + (", paired over slides" if headline.kind == GAIN else "")]
    known = {"chance": headline.chance} | headline.others
    against += [f"{name} {write(value)}" for name, value in known.items() if value is not None]
    return {"name": headline.name, "value": write(headline.value), "against": " · ".join(against)}


def _writer(kind: str) -> Callable[[float | None], str]:
    return {SCORE: partial(_figure, digits=2), SHARE: _percent, GAIN: partial(_signed, digits=2)}[kind]


def command_line(command: Sequence[str] | None) -> str | None:
    """The command that made a page, quoted for a shell."""
    return None if command is None else shlex.join(["pathflip", *command])


def _figure(value, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _points(value) -> str:
    """A difference of shares, in percentage points."""
    return _signed(None if value is None else 100 * value, 1)


def _span(entry, write: Callable[[float | None], str]) -> str:
    """An interval; a dash if there is none."""
    return "–" if entry["low"] is None else f"{write(entry['low'])} to {write(entry['high'])}"


def _signed(value, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")
