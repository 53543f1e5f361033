"""Report page of an accelerator session: all tables, plots of some, faults and their cures."""

import base64
import io
import json
import math
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from accelerator_parts import CURE, FAULT
from pathflip_jax.evaluate.figures import BASE, GRID, MAIN, SECOND, make_axes

SHARES = ("share", "utilisation", "waiting")  # prefixes and suffixes of columns that hold fractions


def render(found: dict) -> str:
    """Render `accelerator.json` as a self-contained page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": cell, "words": words}
    parts = {name: part | {"tables": tables(part["rows"])} for name, part in found["parts"].items()}
    for part in parts.values():
        pictures = {title: picture(title, rows) for title, (_, rows) in part["tables"].items()}
        part["pictures"] = {title: embed(figure) for title, figure in pictures.items() if figure is not None}
    failed = {name: part for name, part in parts.items() if FAULT in part}
    return environment.get_template("page.html").render(
        found=found, parts=parts, failed=failed, fault=FAULT, cure=CURE, facts=json.dumps(found["machine"], indent=1)
    )


def tables(rows: list) -> dict[str, tuple[list[str], list[dict]]]:
    """Columns and rows of each table, in the order of their first appearance."""
    found: dict[str, tuple[list[str], list[dict]]] = {}
    for title, values in rows:
        columns, kept = found.setdefault(title, ([], []))
        columns += [name for name in values if name not in columns]
        kept.append(values)
    return found


def words(name: str) -> str:
    """Display name of a column."""
    return name.replace("_", " ")


def cell(value, column: str) -> str:
    """Formatted value of a table cell: three digits, fractions in percent."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else str(value)
    if not math.isfinite(value):
        return str(value)
    if column.startswith(SHARES) or column.endswith(SHARES):
        return f"{100 * value:.1f}%"
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def embed(figure: Figure) -> str:
    """Figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(title: str, rows: list[dict]) -> Figure | None:
    """Plot of a table; None for tables without one."""
    if title.startswith("growing batches"):
        return batches([row for row in rows if "slides_per_second" in row])
    if title.startswith("longest operations"):
        return bars([row["operation"] for row in rows], [row["ms"] for row in rows], "ms per step")
    if title.startswith("beside"):
        return beside(rows)
    if title.startswith("encoding"):
        return encoding(rows)
    if title.startswith("planned"):
        return bars(
            [row["step"] for row in rows], [row["true_over_planned"] for row in rows], "actual over planned memory"
        )
    return None


def batches(rows: list[dict]) -> Figure | None:
    """Speed, utilisation and memory over the slides of a step."""
    if len(rows) < 2:
        return None
    figure, panels = _axes(9.6, 2.9, 3)
    x = [row["slides"] for row in rows]
    panels[0].plot(x, [row["slides_per_second"] for row in rows], "o-", color=MAIN)
    panels[0].set_ylabel("slides per second")
    panels[1].plot(x, [100 * (row["utilisation"] or math.nan) for row in rows], "o-", color=MAIN)
    panels[1].set_ylabel("model FLOP utilisation, %")
    panels[2].plot(x, [row["peak_gb"] for row in rows], "o-", color=MAIN, label="used")
    panels[2].plot(x, [row["planned_gb"] for row in rows], "o--", color=SECOND, label="planned")
    panels[2].set_ylabel("memory, GB")
    panels[2].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, list(map(str, x)))
        panel.set_xlabel("slides per step")
        panel.set_ylim(bottom=0)
    return figure


def bars(names: list[str], values: list[float], label: str) -> Figure:
    """Horizontal bars with their names, the first on top."""
    figure, (axes,) = _axes(9.6, 0.8 + 0.28 * len(names), 1)
    axes.barh(names[::-1], values[::-1], color=MAIN, height=0.7)
    axes.set_xlabel(label)
    return figure


def beside(rows: list[dict]) -> Figure | None:
    """Speed-up of ours over each other side, by job or case."""
    found = {}
    for row in rows:
        for column, value in row.items():
            if column.endswith("times_as_fast") and value:
                what = column.removeprefix("ours_").removesuffix("times_as_fast").strip("_")
                found[f"{row.get('job', row.get('case'))} {what} / {row['side']}".replace("  ", " ")] = value
    if not found:
        return None
    figure = bars(list(found), list(found.values()), "speed-up of ours")
    figure.axes[0].axvline(1, color=BASE, linewidth=1)
    return figure


def encoding(rows: list[dict]) -> Figure:
    """Slides and texts per second over the batch."""
    names = list(dict.fromkeys(row["what"] for row in rows))
    figure, panels = _axes(9.6, 2.9, len(names))
    for panel, name in zip(panels, names, strict=True):
        own = [row for row in rows if row["what"] == name]
        panel.plot([row["batch"] for row in own], [row["per_second"] for row in own], "o-", color=MAIN)
        panel.set(xlabel="batch", ylabel=f"{name} per second", xscale="log", ylim=(0, None))
    return figure


def _axes(width: float, height: float, columns: int):
    figure, panels = make_axes(width, height, columns)
    for panel in panels:
        panel.grid(color=GRID, linewidth=0.8)
    return figure, panels
