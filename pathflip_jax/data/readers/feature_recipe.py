"""Recipe of patch features, from pixels to numbers, and the comparison of two recipes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Source = Literal["", "prepare", "import"]
SIZE_TOLERANCE = 0.1  # nominal and measured mpp differ by up to 10 percent, patches of 224 and 256 pixels by 14
SAME = 1e-3  # relative difference within which two stated numbers are the same
SRGB, AS_STORED = "srgb", "as stored"  # colours of patches: converted by the slide's ICC profile, or not
_SHOWN = 12  # digits of a hash in messages


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """Encoder, weights, transform and patches that features were made with; empty values and 0 are unknown.

    `weights` is the SHA-256 of the weights, `encoder_version` that of an encoder without weights. `transform` has the
    facts `resize`, `crop`, `filter`, `mean` and `std`. `patch_size` pixels at `mpp` are the patches as the encoder saw
    them, `patch_um` their edge in micrometres. `colours` is SRGB or AS_STORED; `prepare` leaves the latter out, as the
    versions before it do. `source` is the command that states the facts. Raises ValueError for values of another kind.
    """

    encoder: str = ""
    encoder_version: str = ""
    weights: str = ""
    transform: Mapping[str, Any] = field(default_factory=dict)
    pooling: str = ""
    precision: str = ""
    feature_dim: int = 0
    patch_size: int = 0
    mpp: float = 0.0
    patch_um: float = 0.0
    colours: str = ""
    source: Source = ""

    def __post_init__(self) -> None:
        for name in ("encoder", "encoder_version", "weights", "pooling", "precision", "source"):
            self._require(name, isinstance(getattr(self, name), str), "a text")
        self._require("colours", self.colours in ("", SRGB, AS_STORED), f"{SRGB}, {AS_STORED}, or nothing for unknown")
        self._require("source", self.source in get_args(Source), "prepare or import")
        for name in ("feature_dim", "patch_size"):
            value = getattr(self, name)
            self._require(name, type(value) is int and 0 <= value < 2**20, "a whole number, or 0 for unknown")
        for name, most in (("mpp", 1e3), ("patch_um", 2**20 * 1e3)):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0 <= value < most, "a number, or 0 for unknown")
        facts = self.transform
        known = isinstance(facts, Mapping) and all(isinstance(name, str) and _is_fact(x) for name, x in facts.items())
        self._require("transform", known, "an object of numbers, texts and lists of numbers")
        object.__setattr__(self, "transform", {name: _listed(value) for name, value in facts.items()})
        object.__setattr__(self, "patch_um", self.patch_um or self.patch_size * self.mpp)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} {getattr(self, name)!r:.60}: expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Known facts as JSON values."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, values: Any) -> "FeatureRecipe":
        """Inverse of `to_dict`. Raises ValueError for anything else."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a {type(values).__name__}, expected an object with named facts")
        if unknown := values.keys() - {own.name for own in fields(cls)}:
            raise ValueError(f"a fact {min(map(str, unknown))!r:.60} unknown to this version")
        return cls(**values)


def objection(one: FeatureRecipe | None, other: FeatureRecipe | None) -> str:
    """Sentence that names every fact in which two recipes differ, with the values of both; "" if there is none.

    A fact that one side does not know is no objection, nor is the precision: features of half precision agree with
    those of float32 to three digits. Encoders are compared by name as it is spelled.
    """
    found = list(_differences(one, other)) if one and other else []
    return f"they differ in {', '.join(found)}" if found else ""


def _differences(one: FeatureRecipe, other: FeatureRecipe) -> Iterator[str]:
    names = {"encoder": "encoder", "encoder_version": "version of the encoder", "weights": "weights"}
    names |= {"feature_dim": "width", "pooling": "pooling"}
    for name, words in names.items():
        here, there = getattr(one, name), getattr(other, name)
        if here and there and here != there:
            yield f"{words} ({_shown(name, here)}, not {_shown(name, there)})"
    for name in sorted(one.transform.keys() & other.transform.keys()):
        here, there = one.transform[name], other.transform[name]
        if not _is_same(here, there):
            yield f"{name} of the transform ({_text(here)}, not {_text(there)})"
    here, there = _colours(one), _colours(other)
    if here and there and here != there:
        yield f"colours of the patches ({here}, not {there})"
    if not _have_same_patches(one, other):
        yield f"patches ({patch_words(one)}, not {patch_words(other)})"


def _colours(recipe: FeatureRecipe) -> str:
    return recipe.colours or (AS_STORED if recipe.source == "prepare" else "")


def _have_same_patches(one: FeatureRecipe, other: FeatureRecipe) -> bool:
    if one.patch_size and other.patch_size and one.patch_size != other.patch_size:
        return False
    if one.mpp and other.mpp:
        return math.isclose(one.mpp, other.mpp, rel_tol=SAME)
    return is_same_size(one.patch_um, other.patch_um)


def is_same_size(one: float, other: float) -> bool:
    """Whether two edges in micrometres are the same within `SIZE_TOLERANCE`, or one is unknown."""
    return not one or not other or abs(one - other) <= SIZE_TOLERANCE * max(one, other) * (1 + 1e-9)


def patch_words(recipe: FeatureRecipe) -> str:
    """Size of a recipe's patches: in pixels at a resolution, else as far as it is known."""
    if recipe.patch_size and recipe.mpp:
        return f"{recipe.patch_size} px at {recipe.mpp:g} um per px"
    return f"{recipe.patch_um:g} um" if recipe.patch_um else f"{recipe.patch_size} px"


def _shown(name: str, value: Any) -> str:
    return f"{value[:_SHOWN]}…" if name == "weights" and len(value) > _SHOWN else str(value)


def _text(value: Any) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, list) else str(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # NaN is not


def _is_fact(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and all(map(_is_number, value))
    return numbers or isinstance(value, str) or _is_number(value)


def _is_same(here: Any, there: Any) -> bool:
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(_is_same, here, there))
    return math.isclose(here, there, rel_tol=SAME) if _is_number(here) and _is_number(there) else here == there
