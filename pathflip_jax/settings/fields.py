"""A setting as a field of a dataclass: its default, and beside it all else that is known of it.

Whatever acts on settings by name (checks, the command line, resuming, runs of earlier versions) reads it here, so that
adding a setting takes one line.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

AS_NOW = object()  # it makes no difference to what a run learns: a run that began without it takes today's value
COUNT = 2**31 - 1  # steps and the like are counted in 32 bits
LARGEST_SIZE = 2**24  # of a dimension of a model
_THERE = object()  # in every version


class Range(NamedTuple):
    """Numbers from `least` to `most`; `open_least` and `open_most` leave the end itself out.

    `besides` is a value below the range that stands for something else, `meaning`; None is one that may be given too.
    """

    least: float
    most: float = math.inf
    whole: bool = False
    open_least: bool = False
    open_most: bool = False
    besides: tuple = ()
    meaning: str = ""

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        if value is None:
            return None in self.besides
        if not isinstance(value, int if self.whole else int | float) or isinstance(value, bool):
            return False
        if value in self.besides:
            return True
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return above and below and math.isfinite(value)  # of NaN nothing is true

    def words(self, value: object = None) -> str:
        """What is expected, for a message about this value."""
        ends = [f"{'above' if self.open_least else 'of at least'} {self.least:.10g}"]
        if self.most not in (math.inf, COUNT) or (isinstance(value, int | float) and value > self.most):
            ends.append(f"{'below' if self.open_most else 'at most'} {self.most:.10g}")
        besides = f", or {self.besides[0]} {self.meaning}" if self.besides else ""
        return f"a {'whole ' if self.whole else 'finite '}number {' and '.join(ends)}{besides}"


class Words(NamedTuple):
    """One of some words."""

    choices: tuple[str | bool, ...]

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        return value in self.choices

    def words(self, value: object = None) -> str:
        """What is expected, for a message about this value."""
        return "one of " + ", ".join(str(choice) or '""' for choice in self.choices)


class Free(NamedTuple):
    """Any value of its type, for a reason."""

    reason: str
    optional: bool = False  # None stands for ""

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        return value is not None or self.optional

    def words(self, value: object = None) -> str:
        """What is expected, for a message about this value."""
        return f"{self.reason}; leave it empty for none"


Bounds = Range | Words | Free


def whole(least: int, most: int = COUNT, *, zero: str = "", minus: str = "", none: str = "") -> Range:
    """Whole numbers from `least` on; `zero`, `minus` (-1) and `none` say what these stand for, where they may be."""
    value, meaning = next(((v, text) for v, text in ((0, zero), (-1, minus), (None, none)) if text), (0, ""))
    return Range(least, most, True, besides=(value,) if meaning else (), meaning=meaning)


def share(most_itself: bool = False, zero: bool = True) -> Range:
    """Shares and probabilities: from 0 (without `zero` above it) to below 1, or to 1 itself."""
    return Range(0, 1, open_least=not zero, open_most=not most_itself)


def above_zero(most: float = math.inf) -> Range:
    """Numbers above 0."""
    return Range(0, most, open_least=True)


PATH = Free("a file, a folder or a URL")
NAME = Free("checked where its names are known")
FLAG = Words((False, True))
FLOATS = Words(("float32", "bfloat16"))
LAYERS, WIDTH, LENGTH = whole(1, 1024), whole(1, LARGEST_SIZE), whole(1, 2**20)
DRAWN = whole(1, 10**6)
SEED = whole(0, 2**32 - 1)
RATE, WEIGHT, SCALE = Range(0, 1), Range(0, 1e6), above_zero(1e6)


class Setting(NamedTuple):
    """All that is known of a setting besides its name, type and default.

    `help` says what it is for. `required` says what belongs there, where a run needs one. `may_change`: a run may
    resume with another value. `before` is the value that means what versions without the setting did, or `AS_NOW`; a
    setting of all versions has none. `exists`: the path that it names must be there; `local`: and on a local disk.
    `divides` and `at_most` name settings that it must divide, or not exceed. `cure` ends the message about a value out
    of bounds.
    """

    bounds: Bounds
    help: str
    required: str = ""
    may_change: bool = False
    before: Any = _THERE
    exists: bool = False
    local: bool = False
    divides: tuple[str, ...] = ()
    at_most: str = ""
    cure: str = ""

    @property
    def is_new(self) -> bool:
        """Whether earlier versions lacked it."""
        return self.before is not _THERE

    def objection(self, name: str, value: object, default: object = None) -> str:
        """Why the setting cannot have this value, with the cure; "" where it can."""
        parts = value if isinstance(value, tuple | list) else (value,)
        if all(self.bounds.holds(part) for part in parts):
            return ""
        such_as = f", such as --config.{name}={default}" if default not in (None, "", ()) else ""
        return f"{name}={value}: expected {self.bounds.words(value)}{such_as}{self.cure}"


def setting(default: Any, bounds: Bounds, help: str, **more: Any) -> Any:
    """A field of a section of settings; `more` as in `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(bounds, help, **more)})


@dataclass(frozen=True)
class Section:
    """Settings that belong together. Raises ValueError, naming each that is out of its bounds."""

    section: ClassVar[str]

    def __post_init__(self):
        known = settings_of(type(self))
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        faults = [
            found.objection(f"{self.section}.{name}", getattr(self, name), usual[name]) for name, found in known.items()
        ]
        if any(faults):
            raise ValueError("; ".join(filter(None, faults)))


def settings_of(section: type) -> dict[str, Setting]:
    """The settings of a section, by name."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(section)}


def types_of(section: type) -> dict[str, type]:
    """The type of each setting of a section, but for None, which some may be."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = next(option for option in options if option is not types.NoneType)
    return found


def plain_values(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a section: lists become tuples, and whole numbers floats where the setting is one."""
    of = types_of(section)

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if of.get(name) is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        return value

    return {name: plain(name, value) for name, value in values.items()}
