"""The specification of an evaluation: one frozen dataclass that Python, the command line and YAML files build.

    evaluate(EvaluationSpec(run="runs/base", records="records", slides="slides.csv", prompts="tcga-rcc", out="scores"))

A field with an `Option` in its metadata is an option of `pathflip evaluate` and a key of its YAML files under the same
name, with dashes. To add one, add a field here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from pathflip_jax.evaluate.protocols import PROTOCOLS, STRICT
from pathflip_jax.grounding import maps
from pathflip_jax.grounding.methods import METHODS
from pathflip_jax.inference.families import method_help
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.runs.bounds import OPTIONS

Place = str | os.PathLike  # a path, or a URL where the field's kind is PLACE
PLACE, FILE, PROMPTS, TEXT, NUMBER, FLAG = "place", "file", "prompts", "text", "number", "flag"
RETRIEVAL, CLASSES, GROUNDING, LANGUAGE = "retrieval", "zero-shot and few-shot classification", "grounding", "language"
OUTCOMES = "survival and regression"
TIME_UNITS = {"days": 365.25, "weeks": 365.25 / 7, "months": 12.0, "years": 1.0}  # of a survival time, per year


class Option(NamedTuple):
    """The form of a field on the command line and in YAML.

    `kind` is PLACE (a path or URL), FILE (a local path), PROMPTS (a local path, or the name of a shipped prompt file),
    TEXT, NUMBER (within `runs.bounds.OPTIONS` of its name) or FLAG. `many` is argparse's `nargs` of a list.
    """

    kind: str
    help: str
    metavar: str | None = None
    many: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""  # heading in `pathflip evaluate --help`


def _option(default: Any, kind: str, help: str, metavar: str | None = None, **more) -> Any:
    return field(default=default, metadata={"option": Option(kind, help, metavar, **more)})


def _required(kind: str, help: str, metavar: str | None = None) -> Any:
    return field(metadata={"option": Option(kind, help, metavar)})


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """The inputs and options of an evaluation, and the folder of its results.

    `run` is a run folder, several (seeds of one experiment, scored as their mean) or a run of the language stage to be
    scored alone. A task is scored if its input is given: `texts`, `region_texts`, `prompts`, `few_shot`,
    `survival_time` with `survival_event`, `regression`, `grounding` with `outlines`, or `language`. Raises ValueError
    for numbers out of bounds and unknown choices.
    """

    run: Place | Sequence[Place]
    records: Place = _required(PLACE, "folder of records")
    slides: Place = _required(
        PLACE, "slide table: slide_id, patient_id, label, split; or a split file of CLAM or Patho-Bench", "CSV"
    )
    out: Place
    fold: str | None = _option(None, TEXT, "fold of a slide table that holds several, as k=all.tsv of Patho-Bench", "K")
    split: str = _option("test", TEXT, "split to score (default test)")
    strict: bool = _option(False, FLAG, "fail on a faulty split (pathflip split --check)")
    protocol: str = _option(
        STRICT, TEXT, "strict (default), or paper: the published script's arithmetic; the report says where it is "
        "optimistic", "NAME", choices=PROTOCOLS,
    )  # fmt: skip
    images: Place | None = _option(None, FILE, "slide files, for thumbnails and the mean-colour baselines", "DIR")
    compare_to: Place | Sequence[Place] | None = _option(
        None, PLACE, "the same number of other runs, for paired differences", "RUN", many="+"
    )
    seed: int = _option(0, NUMBER, "seed of the bootstrap (default 0)")
    texts: Place | None = _option(None, PLACE, "text table: scores retrieval and captions", group=RETRIEVAL)
    region_texts: Place | None = _option(
        None,
        PLACE,
        "captions of slides of one region, or of the region at point x, y of a slide",
        "TABLE",
        group=RETRIEVAL,
    )
    prompts: Place | None = _option(
        None,
        PROMPTS,
        "texts of each class, or the name of a shipped file: zero-shot classification",
        "JSON",
        group=CLASSES,
    )
    zero_shot_windows: bool = _option(
        False, FLAG, "also classify slides by area: the mean over patches of the class probabilities of their windows "
        "(--window)", group=CLASSES,
    )  # fmt: skip
    few_shot: Sequence[str | int] | None = _option(
        None, TEXT, "probes on K training slides per class, or all (default 1 4 16)", "K", many="*", group=CLASSES
    )
    labels: str | Sequence[str] = _option(
        ("label",), TEXT, "label columns for --few-shot (default label)", "COLUMN", many="+", group=CLASSES
    )
    label_table: Place | None = _option(
        None, PLACE, "table of label, survival, clinical and regression columns, by slide_id or patient_id", "CSV",
        group=CLASSES,
    )  # fmt: skip
    draws: int = _option(5, NUMBER, "draws of training slides for every K (default 5)", "N", group=CLASSES)
    survival_time: str | None = _option(
        None, TEXT, "column of times to event or last follow-up, as os_months: scores survival", "COLUMN",
        group=OUTCOMES,
    )  # fmt: skip
    survival_event: str | None = _option(
        None, TEXT, "column that is 1, true or 1:DECEASED for an event, 0, false or 0:LIVING for a censored time",
        "COLUMN", group=OUTCOMES,
    )  # fmt: skip
    survival_unit: str | None = _option(
        None,
        TEXT,
        "unit of the times, if the column's name does not end in it",
        choices=tuple(TIME_UNITS),
        group=OUTCOMES,
    )
    survival_strata: str | None = _option(
        None, TEXT, "column of strata, such as site: patients are compared only within one", "COLUMN", group=OUTCOMES
    )
    regression: Sequence[str] | None = _option(
        None, TEXT, "columns of numbers to predict", "COLUMN", many="+", group=OUTCOMES
    )
    clinical: Sequence[str] | None = _option(
        None, TEXT, "clinical columns, such as age stage sex: a baseline of survival and regression without slides",
        "COLUMN", many="+", group=OUTCOMES,
    )  # fmt: skip
    grounding: Place | None = _option(None, FILE, "texts of each concept: scores grounding", "JSON", group=GROUNDING)
    outlines: Place | None = _option(None, FILE, "annotated outlines, <slide_id>.geojson", "DIR", group=GROUNDING)
    method: str | None = _option(None, TEXT, method_help(), choices=tuple(METHODS), group=GROUNDING)
    window: int = _option(maps.WINDOW, NUMBER, f"patches across a window (default {maps.WINDOW})", "N", group=GROUNDING)
    smooth: float = _option(
        maps.SMOOTH, NUMBER,
        f"standard deviation of the Gaussian that smooths maps, in patch edges (default {maps.SMOOTH}; 0: none)",
        "EDGES", group=GROUNDING,
    )  # fmt: skip
    clear: float | None = _option(
        None, NUMBER, "leave out patches of which an outline covers more than SHARE and less than 1 - SHARE", "SHARE",
        group=GROUNDING,
    )  # fmt: skip
    lesions: str | None = _option(
        None, TEXT, "concept whose outlines are lesions to detect: scores FROC as CAMELYON16 does", "CONCEPT",
        group=GROUNDING,
    )  # fmt: skip
    language: Place | None = _option(
        None, PLACE, "run of the language stage: scores its captions and answers too", "RUN", group=LANGUAGE
    )
    questions: Place | None = _option(None, PLACE, "questions to the language stage", "TABLE", group=LANGUAGE)
    concepts: Place | None = _option(
        None, FILE, "phrasings of each concept: scores the concepts that captions assert", "JSON", group=LANGUAGE
    )
    max_tokens: int = _option(384, NUMBER, "maximum number of tokens to generate (default 384)", "N", group=LANGUAGE)
    min_tokens: int = _option(0, NUMBER, "minimum number of tokens to generate (default 0)", "N", group=LANGUAGE)
    beams: int = _option(1, NUMBER, "beam search with N beams (default 1: greedy)", "N", group=LANGUAGE)
    length_penalty: float = _option(1.0, NUMBER, "length penalty of beam search (default 1)", "X", group=LANGUAGE)
    repetition_penalty: float = _option(
        1.0, NUMBER, "penalty on repeated tokens, above 1 (default 1: none)", "X", group=LANGUAGE
    )
    name: str = ""  # of the benchmark, which published figures are matched by
    command: Sequence[str] | None = None  # the command line that the report shows

    def __post_init__(self) -> None:
        for name, option in SPEC_OPTIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if option.many:
                object.__setattr__(self, name, tuple(_as_list(value)))
            if option.kind == NUMBER and not (bound := OPTIONS[option_name(name)]).holds(value):
                raise ValueError(f"{option_name(name)} {value!r}: expected {bound.words(value)}")
            if option.choices and value not in option.choices:
                raise ValueError(f"{option_name(name)} {value!r}: expected one of {', '.join(option.choices)}")

    @property
    def runs(self) -> list[Place]:
        """The runs to score."""
        return _as_list(self.run)

    @property
    def sampling(self) -> Sampling:
        """The generation settings of the language stage: greedy or beam search."""
        return Sampling.from_options(vars(self))


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def option_name(name: str) -> str:
    """A field's name as an option and as a key of YAML: with dashes."""
    return name.replace("_", "-")


SPEC_OPTIONS: dict[str, Option] = {
    one.name: one.metadata["option"] for one in fields(EvaluationSpec) if "option" in one.metadata
}
