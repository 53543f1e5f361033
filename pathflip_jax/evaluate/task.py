"""The interface between an evaluation and its tasks.

A task is a file in `evaluate/tasks/` that ends with its `Task` and is listed in `evaluate/tasks/__init__.py:FILES`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.embeddings import Bag
from pathflip_jax.evaluate.protocols import Protocol
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.units import METRICS, Evaluation, Units
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.scores.statistics import TEXT_ONLY

SCORE, SHARE, GAIN = "score", "share", "gain"  # written as 0.87, as 87.0%, as +0.05


class Setting(NamedTuple):
    """The specification, slides and protocol that all tasks of an evaluation share."""

    spec: EvaluationSpec
    cohort: Cohort
    protocol: Protocol


class LoadedRun(NamedTuple):
    """One loaded run, with the embeddings of the slides that the tasks requested."""

    predictor: Predictor
    name: str
    bags: dict[str, Bag]  # by slide id


class Predictions(NamedTuple):
    """The results of `Task.predict` for each run and for each run that they are compared to.

    `predictor` is the first run, for pictures; None in an evaluation of the language stage alone.
    """

    runs: list
    ours: list
    compared_runs: list
    theirs: list
    predictor: Predictor | None


class Part(NamedTuple):
    """The results of a task: its entry of scores.json, figures and tables by name, and warnings.

    `config` is that of a run which the task loads itself.
    """

    scores: Any
    pictures: dict[str, Figure] = {}
    tables: dict[str, list[dict]] = {}
    warnings: Sequence[str] = ()
    config: Mapping | None = None


class Headline(NamedTuple):
    """One score with its interval and baselines, shown on cards of the report and in the terminal; None for unknown."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    chance: float | None = None
    others: dict[str, float | None] = {}
    kind: str = SCORE


@dataclass(frozen=True)
class Task:
    """One kind of score, as functions: `check` and `read` before any model is loaded, `predict` per run, `score` once.

    `key` is the task's entry in scores.json, `title` its name in text. `wanted` tells whether a specification requests
    it, which it does by giving `needs`. `check` raises ValueError for options that contradict each other; `read`
    returns the task's data, raising for faulty input; `suits` raises ValueError for a run that it cannot score; `embed`
    names the slides whose embeddings `predict` takes from `LoadedRun.bags`. A task without `predict` loads what it
    scores itself. `headlines` yields the main scores of scores.json; `section` is the task's part of the report, a
    Jinja template that sees `scores` and `images`, and sections of higher `prominence` come first. `published` yields
    the identifiers of a score, with its metrics, for `published.json`; `paired` reads back the rows of an evaluation,
    by score, for `pathflip compare`, with `metric_names` and `heading` for its page.
    """

    key: str
    title: str
    needs: str
    wanted: Callable[[EvaluationSpec], bool]
    read: Callable[[Setting], Any]
    score: Callable[[Setting, Any, Predictions], Part]
    predict: Callable[[Setting, Any, LoadedRun], Any] | None = None
    check: Callable[[EvaluationSpec], None] = lambda spec: None
    suits: Callable[[EvaluationSpec, Predictor], Any] = lambda spec, predictor: None
    embed: Callable[[Setting, Any], Sequence[str]] = lambda setting, data: ()
    headlines: Callable[[dict], Iterable[Headline]] = lambda found: ()
    section: Path | None = None
    prominence: int = 0
    published: Callable[[dict], Iterator[tuple[tuple, dict]]] = lambda found: iter(())
    paired: Callable[[Evaluation], dict[tuple, Callable[[], Units]]] = lambda evaluation: {}
    metric_names: Mapping[str, str] = field(default_factory=lambda: METRICS)
    heading: Callable[[Sequence[str]], str] = ", ".join


def make_headline(name: str, entry: dict, others: dict | None = None, kind: str = SCORE) -> Headline:
    """A headline of an entry {value, low, high} with `chance` where it has one."""
    values = (entry[key] for key in ("value", "low", "high"))
    return Headline(name, *values, entry.get("chance"), others or {}, kind)


def baseline_values(entry: dict, names: dict[str, str]) -> dict[str, float | None]:
    """The values of an entry's baselines by the names to show; a baseline is a number or a separate entry."""
    known = {shown: entry[name] for name, shown in names.items() if name in entry}
    return {shown: other["value"] if isinstance(other, dict) else other for shown, other in known.items()}


def headline_with_baselines(name: str, entry: dict, kind: str = SCORE) -> Headline:
    """A headline of an entry that `statistics.with_baselines` made."""
    values = {other: found["value"] for other, found in entry["baselines"].items()}
    chance = values.pop("chance", None)
    others = {"without the slide" if other == TEXT_ONLY else other: value for other, value in values.items()}
    return make_headline(name, entry | {"chance": chance}, others, kind)
