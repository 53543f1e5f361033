"""Cohort properties that all slides of one training set must share (DESIGN section 5).

The majority decides them, never the slide that happens to come first; without a majority they are undecided.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.readers.feature_recipe import SIZE_TOLERANCE
from pathflip_jax.data.records.columns import SlideInfo, column
from pathflip_jax.data.storage.failures import preview

PIECE = 4096  # slides converted to Python objects at a time
_SEPARATE = "all slides of a cohort must share it: write the others to a separate folder"
_SAME_SIZE = (
    "all slides of a cohort must share it: extract the others again, or write them to a separate folder; if an "
    "mpp is wrong in a file, give the right one in the column mpp of the slide table"
)


class Traits(NamedTuple):
    """Properties that a slide must share with its cohort, and the slide's id and file for messages.

    An empty `encoder`, and a `patch_size` (level-0 pixels) or `mpp` of 0, are unknown.
    """

    slide_id: str
    where: str
    encoder: str
    feature_dim: int
    feature_dtype: str
    cut: str
    patch_size: int
    mpp: float

    @property
    def patch_um(self) -> float:
        """Edge of a patch in micrometres; 0 if unknown."""
        return self.patch_size * self.mpp


_SHARED = Traits._fields[2:]


class Vote(NamedTuple):
    """Most frequent value, its count, and the number of votes."""

    value: Any
    count: int
    voters: int


class NoMajorityError(ValueError):
    """No value is held by more than half of the slides."""


def traits_of(info: SlideInfo) -> Traits:
    """Traits of a slide in records."""
    return Traits(info.slide_id, str(info.shard), *(getattr(info, name) for name in _SHARED))


@dataclass(frozen=True)
class Cohort:
    """Majority properties of some slides: votes by name, and `size`, the edge of a patch in `unit` (um or px).

    `size` is None if it is unknown for all slides; `pixels` are the level-0 sizes of the slides that have it.
    """

    common: dict[str, Vote]
    size: Vote | None
    unit: str
    pixels: frozenset[int]

    def objection(self, slide: Traits) -> str:
        """Objection to a slide in the cohort, else "". An unnamed encoder agrees with any."""
        for name, vote in self.common.items():
            here = getattr(slide, name)
            if here != vote.value and not (name == "encoder" and "" in (here, vote.value)):
                return f"slide {slide.slide_id} has {name} {here!r}, {_share(vote)} have {vote.value!r}; {_SEPARATE}"
        return self.size_objection(slide)

    def size_objection(self, slide: Traits) -> str:
        """Objection to a slide whose patches differ from the cohort's physical size; "" if equal or unknown.

        Sizes are compared in micrometres, or in pixels if an mpp is unknown.
        """
        if not slide.patch_size or self.size is None:
            return ""
        if self.unit == "um" and slide.mpp:
            same = _same(slide.patch_um, self.size.value)
            here, there = f"{slide.patch_um:g} um", f"{self.size.value:g} um"
        else:
            same = any(_same(slide.patch_size, size) for size in self.pixels)
            here, there = f"{slide.patch_size} px", f"{preview(sorted(self.pixels))} px (an mpp is not known)"
        found = f"slide {slide.slide_id} has patches of {here}, {_share(self.size)} have {there}"
        return "" if same else f"{found}; {_SAME_SIZE}"

    def pixels_of(self, mpp: float) -> int:
        """Patch size of the cohort in level-0 pixels of a slide of this mpp; 0 if unknown."""
        if self.size is None:
            return 0
        if self.unit == "um" and mpp:
            return round(self.size.value / mpp)
        return min(self.pixels) if len(self.pixels) == 1 else 0


def majority_cohort(slides: Sequence[Traits], times: Sequence[int] = ()) -> Cohort:
    """Majority properties of slides. Raises NoMajorityError, with counts and names, if no value is that of over half.

    Unnamed encoders do not vote, nor do unknown sizes, nor sizes in pixels if others are in um. With `times`, each
    slide represents that many identical ones.
    """
    times = times or [1] * len(slides)
    common = {}
    for name in ("encoder", "feature_dim", "feature_dtype", "cut"):
        voters = [(getattr(slide, name), slide) for slide in slides if name != "encoder" or slide.encoder]
        counts: Counter[Any] = Counter()
        for slide, count in zip(slides, times, strict=True):
            if name != "encoder" or slide.encoder:
                counts[getattr(slide, name)] += count
        value, count = max(counts.items(), key=lambda item: (item[1], str(item[0])), default=("", 0))
        common[name] = Vote(value, count, counts.total())
        _check_majority(common[name], name, voters)
    sized = [(slide, count) for slide, count in zip(slides, times, strict=True) if slide.patch_size]
    measured = [(slide, count) for slide, count in sized if slide.mpp]
    if not sized:
        return Cohort(common, None, "px", frozenset())
    unit = "um" if measured else "px"
    voters = [(slide.patch_um if measured else float(slide.patch_size), slide) for slide, _ in measured or sized]
    sizes = np.repeat([size for size, _ in voters], [count for _, count in measured or sized])
    value, count = _most_frequent(sizes)
    vote = Vote(value, count, len(sizes))
    _check_majority(vote, f"patch size in {unit}", voters)
    pixels = frozenset(slide.patch_size for size, slide in voters if _same(size, value))
    return Cohort(common, vote, unit, pixels)


def check_cohort(slides: Sequence[SlideInfo]) -> None:
    """Refuse slides that cannot be used to train one model (DESIGN section 5).

    Raises ValueError naming the slides that differ from the majority in encoder, feature width or dtype, region cut or
    physical patch size, or a duplicate slide.
    """
    ids = column(slides, "slide_id")
    if len(set(ids)) < len(ids):
        _refuse_duplicates(slides)
    if not len(slides) or _is_uniform(slides):
        return
    found = [traits_of(info) for info in slides]
    cohort = majority_cohort(found)
    odd = [(slide, text) for slide in found if (text := cohort.objection(slide))]
    others = f" (and {preview(slide.slide_id for slide, _ in odd[1:])})" if odd[1:] else ""
    raise ValueError(f"{odd[0][0].where}: {odd[0][1]}{others}")


def _refuse_duplicates(slides: Sequence[SlideInfo]) -> None:
    seen: dict[str, Any] = {}
    for info in slides:
        if info.slide_id in seen:
            other = f" and {seen[info.slide_id]}" if seen[info.slide_id] != info.shard else ""
            cure = "remove one of them; two files of one slide need two ids"
            raise ValueError(f"{info.shard}{other}: slide {info.slide_id} occurs twice; {cure}")
        seen[info.slide_id] = info.shard


def _is_uniform(slides: Sequence[SlideInfo]) -> bool:
    """Whether slides form one cohort, checked on one slide of each distinct combination of properties."""
    kinds: Counter[tuple] = Counter()
    columns = [column(slides, name) for name in _SHARED]
    for first in range(0, len(slides), PIECE):
        parts = (own[first : first + PIECE] for own in columns)
        kinds.update(zip(*(part.tolist() if isinstance(part, np.ndarray) else part for part in parts), strict=True))
    found = [Traits("", "", *kind) for kind in kinds]
    try:
        cohort = majority_cohort(found, list(kinds.values()))
    except NoMajorityError:
        return False
    return not any(map(cohort.objection, found))


def _share(vote: Vote) -> str:
    return f"{vote.count} of {vote.voters} slides"


def _same(here: float, there: float) -> bool:
    return abs(here - there) <= SIZE_TOLERANCE * there


def _most_frequent(sizes: Float[np.ndarray, "n"]) -> tuple[float, int]:
    """Size within tolerance of the most others, and their count; ties go to the most frequent size."""
    ordered = np.sort(sizes)
    values, counts = np.unique(ordered, return_counts=True)
    low = np.searchsorted(ordered, values * (1 - SIZE_TOLERANCE) - 1e-9, "left")
    high = np.searchsorted(ordered, values * (1 + SIZE_TOLERANCE) + 1e-9, "right")
    best = max(range(len(values)), key=lambda i: (high[i] - low[i], counts[i], -values[i]))
    return float(values[best]), int(high[best] - low[best])


def _check_majority(vote: Vote, name: str, voters: Sequence[tuple[Any, Traits]]) -> None:
    """Raise NoMajorityError, listing values and slides, for a vote without a majority."""
    if 2 * vote.count > vote.voters or not voters:
        return
    sides: dict[Any, list[Traits]] = {}
    for value, slide in voters:
        sides.setdefault(f"{value:g}" if isinstance(value, float) else repr(value), []).append(slide)
    listed = "; ".join(
        f"{len(own)} with {name} {value} ({preview(slide.slide_id for slide in own)})"
        for value, own in sorted(sides.items(), key=lambda side: -len(side[1]))
    )
    cure = _SAME_SIZE if name.startswith("patch size") else _SEPARATE
    raise NoMajorityError(f"{voters[0][1].where}: no majority among {vote.voters} slides: {listed}; {cure}")
