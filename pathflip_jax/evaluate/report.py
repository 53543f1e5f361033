"""The files of an evaluation: scores.json, tables as CSV, figures as PNG, and one page that shows them all.

The page stands alone (pictures and style inside it, no network), so it can be mailed and archived.
"""

import base64
import importlib.metadata
import json
import math
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jinja2
from matplotlib.figure import Figure

from pathflip_jax.data.texts.tables import write_csv
from pathflip_jax.evaluate.headlines import GAIN, SCORE, SHARE, Headline, headlines

PACKAGES = ("pathflip-jax", "jax", "flax", "numpy", "scikit-learn", "openslide-python")
METRICS = {
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "auc": "AUC (one against the rest)",
    "weighted_f1": "F1, weighted",
    "macro_f1": "F1, macro",
    "published_f1": "F1 as published",
}


def versions() -> dict[str, str]:
    """The versions of everything that a figure depends on, and the device that computed it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    devices = jax.devices()
    return found | {"devices": f"{len(devices)} x {devices[0].device_kind}"}


def write(out: Path, scores: dict, pictures: dict[str, Figure], tables: dict[str, list[dict]], config: dict) -> dict:
    """Write every file of an evaluation into `out` and return the scores as scores.json holds them."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(out / "figures" / f"{name}.png", dpi=160, facecolor="white")
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    scores = without_nan(scores)
    text = json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "scores.json").write_text(text + "\n", encoding="utf-8")
    images = {name: (out / "figures" / f"{name}.png").read_bytes() for name in pictures}
    page = render(scores, images, config, [f"{name}.csv" for name in tables])
    partial = out / "report.html.part"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out / "report.html")
    return scores


def without_nan(value):
    """The same tree with None for every NaN: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(scores: dict, images: dict[str, bytes], config: dict, files: list[str]) -> str:
    """The report as one HTML page; `images` are PNG by figure name."""
    return (
        environment()
        .get_template("report.html")
        .render(
            scores=scores,
            images={name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in images.items()},
            metrics=METRICS,
            cards=[_card(headline) for headline in headlines(scores)],
            command=command_line(scores["command"]),
            config=json.dumps(config, indent=2, default=str, ensure_ascii=False),
            files=["scores.json", *files],
        )
    )


def environment() -> jinja2.Environment:
    """The templates beside this file, with the ways in which a page writes numbers."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
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
    """The headline scores as a table for the terminal, each beside its interval, chance and other baselines."""
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
    return "\n".join(lines).replace("–", "-").replace("−", "-")  # what every terminal has


def _card(headline: Headline) -> dict[str, str]:
    """A headline as the page's card shows it."""
    write = _writer(headline.kind)
    against = [_span(headline._asdict(), write) + (", paired over slides" if headline.kind == GAIN else "")]
    known = {"chance": headline.chance} | headline.others
    against += [f"{name} {write(value)}" for name, value in known.items() if value is not None]
    return {"name": headline.name, "value": write(headline.value), "against": " · ".join(against)}


def _writer(kind: str) -> Callable[[float | None], str]:
    return {SCORE: partial(_figure, digits=2), SHARE: _percent, GAIN: partial(_signed, digits=2)}[kind]


def command_line(command: Sequence[str] | None) -> str | None:
    """The command that made a page, as one would type it."""
    return None if command is None else shlex.join(["pathflip", *command])


def _figure(value, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _points(value) -> str:
    """A difference of shares, in percentage points."""
    return _signed(None if value is None else 100 * value, 1)


def _span(entry, write: Callable[[float | None], str]) -> str:
    """An interval; a dash where there is none."""
    return "–" if entry["low"] is None else f"{write(entry['low'])} to {write(entry['high'])}"


def _signed(value, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")
