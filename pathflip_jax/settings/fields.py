"""Settings as dataclass fields, whose metadata holds help text, bounds and compatibility with earlier versions.

All code that handles settings by name (checks, the command line, resuming, runs of earlier versions) reads this
metadata, so that adding a setting takes one line.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

CURRENT_VALUE = object()  # value of `before` for settings without effect on training: older runs take the current value
COUNT = 2**31 - 1  # steps and other counts are 32-bit
LARGEST_SIZE = 2**24  # of a model dimension
_IN_ALL_VERSIONS = object()  # default of `before`


class Range(NamedTuple):
    """Numbers from `least` to `most`; `open_least` and `open_most` exclude the end points.

    `besides` holds at most one further accepted value, below the range or None, and `meaning` states its effect.
    """

    least: float
    most: float = math.inf
    whole: bool = False
    open_least: bool = False
    open_most: bool = False
    besides: tuple = ()
    meaning: str = ""

    def holds(self, value: object) -> bool:
        """Whether a value is accepted."""
        if value is None:
            return None in self.besides
        if not isinstance(value, int if self.whole else int | float) or isinstance(value, bool):
            return False
        if value in self.besides:
            return True
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return above and below and math.isfinite(value)  # NaN fails every comparison

    def words(self, value: object = None) -> str:
        """Description of the accepted values, for a message about this value."""
        ends = [f"{'above' if self.open_least else 'of at least'} {self.least:.10g}"]
        if self.most not in (math.inf, COUNT) or (isinstance(value, int | float) and value > self.most):
            ends.append(f"{'below' if self.open_most else 'at most'} {self.most:.10g}")
        besides = f", or {self.besides[0]} {self.meaning}" if self.besides else ""
        return f"a {'whole ' if self.whole else 'finite '}number {' and '.join(ends)}{besides}"


class Words(NamedTuple):
    """One of a fixed set of values."""

    choices: tuple[str | bool, ...]

    def holds(self, value: object) -> bool:
        """Whether a value is accepted."""
        return value in self.choices

    def words(self, value: object = None) -> str:
        """Description of the accepted values, for a message about this value."""
        return "one of " + ", ".join(str(choice) or '""' for choice in self.choices)


class Unrestricted(NamedTuple):
    """Any value of the type; `reason` describes it in messages."""

    reason: str
    optional: bool = False  # None is accepted, and means ""

    def holds(self, value: object) -> bool:
        """Whether a value is accepted."""
        return value is not None or self.optional

    def words(self, value: object = None) -> str:
        """Description of the accepted values, for a message about this value."""
        return f'{self.reason}, or "" for none'


Bounds = Range | Words | Unrestricted


def whole(least: int, most: int = COUNT, *, zero: str = "", minus: str = "", none: str = "") -> Range:
    """Integers from `least` to `most`, and one special value: `zero`, `minus` (-1) or `none` states its effect."""
    value, meaning = next(((v, text) for v, text in ((0, zero), (-1, minus), (None, none)) if text), (0, ""))
    return Range(least, most, True, besides=(value,) if meaning else (), meaning=meaning)


def share(most_itself: bool = False, zero: bool = True) -> Range:
    """Fractions and probabilities: from 0 (exclusive without `zero`) up to 1, inclusive with `most_itself`."""
    return Range(0, 1, open_least=not zero, open_most=not most_itself)


def above_zero(most: float = math.inf) -> Range:
    """Positive numbers."""
    return Range(0, most, open_least=True)


PATH = Unrestricted("a file, a folder or a URL")
NAME = Unrestricted("a name")  # checked when the run starts
FLAG = Words((False, True))
FLOATS = Words(("float32", "bfloat16"))
LAYERS, WIDTH, LENGTH = whole(1, 1024), whole(1, LARGEST_SIZE), whole(1, 2**20)
SAMPLE_SIZE = whole(1, 10**6)
SEED = whole(0, 2**32 - 1)
RATE, WEIGHT, SCALE = Range(0, 1), Range(0, 1e6), above_zero(1e6)


class Setting(NamedTuple):
    """Metadata of a setting, beyond its name, type and default.

    `required` describes the expected value of a setting that must not be empty. `may_change`: a run may be resumed with
    another value. `before` is the value that reproduces the behaviour of versions without the setting, or
    `CURRENT_VALUE`; settings present in all versions have none. `exists`: the path must exist; `local`: on a local
    disk. `divides` and `at_most` name settings that this one must divide or must not exceed. `cure` is appended to the
    message about a value out of bounds.
    """

    bounds: Bounds
    help: str
    required: str = ""
    may_change: bool = False
    before: Any = _IN_ALL_VERSIONS
    exists: bool = False
    local: bool = False
    divides: tuple[str, ...] = ()
    at_most: str = ""
    cure: str = ""

    @property
    def is_new(self) -> bool:
        """Whether earlier versions lacked the setting."""
        return self.before is not _IN_ALL_VERSIONS

    def objection(self, name: str, value: object, default: object = None) -> str:
        """Error message for an invalid value of the setting, with the cure; "" if the value is valid."""
        parts = value if isinstance(value, tuple | list) else (value,)
        if all(self.bounds.holds(part) for part in parts):
            return ""
        such_as = f", such as --config.{name}={default}" if default not in (None, "", ()) else ""
        return f"{name}={value}: expected {self.bounds.words(value)}{such_as}{self.cure}"


def setting(default: Any, bounds: Bounds, help: str, **more: Any) -> Any:
    """Dataclass field for a section of settings; `more` as in `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(bounds, help, **more)})


@dataclass(frozen=True)
class Section:
    """A section of related settings. Raises ValueError that names every setting out of bounds."""

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
    """Settings of a section, by name."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(section)}


def types_of(section: type) -> dict[str, type]:
    """Type of each setting of a section, without the None of optional ones."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = next(option for option in options if option is not types.NoneType)
    return found


def plain_values(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a section, with lists converted to tuples, and integers to floats for float settings."""
    of = types_of(section)

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if of.get(name) is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        return value

    return {name: plain(name, value) for name, value in values.items()}
