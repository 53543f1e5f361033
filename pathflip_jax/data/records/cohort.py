"""The cohort: what all slides that one model learns from have in common (DESIGN section 5).

The majority says what that is, never the slide that happens to come first; where there is no majority, nobody does.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.records.columns import SlideInfo, column
from pathflip_jax.data.storage.failures import preview

# Two slides' patches are of one physical size within this: nominal and measured mpp differ by up to 10 percent, while
# patches of 224 and 256 pixels differ by 14.
SIZE_TOLERANCE = 0.1
PIECE = 4096  # slides of which Python objects are made at a time
_APART = "one cohort has one: write the others to a folder of their own"
_ANEW = (
    "one cohort has one physical size: extract the others anew, or write them to a folder of their own; an mpp that is "
    "wrong in a file is given by the column mpp of the slide table"
)


class Traits(NamedTuple):
    """What a slide shares with its cohort, and how to name the slide: its id and its file.

    An empty `encoder`, a `patch_size` (level-0 pixels) or an `mpp` of 0 is unknown.
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
        """The edge of a patch in micrometres; 0 where it is unknown."""
        return self.patch_size * self.mpp


_SHARED = Traits._fields[2:]


class Vote(NamedTuple):
    """The value that most slides have, and how many of how many."""

    value: Any
    count: int
    voters: int


class Undecided(ValueError):
    """No value is held by more than half of the slides."""


def traits_of(info: SlideInfo) -> Traits:
    """The traits of a slide in records."""
    return Traits(info.slide_id, str(info.shard), *(getattr(info, name) for name in _SHARED))


@dataclass(frozen=True)
class Cohort:
    """What the majority of some slides has: by name, and `size`, the edge of a patch in `unit` (um or px).

    `size` is None where no slide knows its own; `pixels` are the level-0 sizes of the slides that have it.
    """

    common: dict[str, Vote]
    size: Vote | None
    unit: str
    pixels: frozenset[int]

    def objection(self, slide: Traits) -> str:
        """Why a slide does not belong to the cohort, "" where it does. An encoder without a name agrees with any."""
        for name, vote in self.common.items():
            here = getattr(slide, name)
            if here != vote.value and not (name == "encoder" and "" in (here, vote.value)):
                return f"slide {slide.slide_id} has {name} {here!r}, {_share(vote)} have {vote.value!r}; {_APART}"
        return self.size_objection(slide)

    def size_objection(self, slide: Traits) -> str:
        """Why a slide's patches are not of the cohort's physical size; "" where they are, or where it is unknown.

        Micrometres are compared, and pixels where an mpp is unknown.
        """
        if not slide.patch_size or self.size is None:
            return ""
        if self.unit == "um" and slide.mpp:
            same, here, there = _same(slide.patch_um, self.size.value), slide.patch_um, f"{self.size.value:g} um"
        else:
            same = any(_same(slide.patch_size, size) for size in self.pixels)
            here, there = slide.patch_size, f"{preview(sorted(self.pixels))} px (an mpp is not known)"
        found = f"slide {slide.slide_id} has patches of {here:g}, {_share(self.size)} of {there}"
        return "" if same else f"{found}; {_ANEW}"

    def pixels_of(self, mpp: float) -> int:
        """The patch size of the cohort in level-0 pixels of a slide of this mpp; 0 where that is unknown."""
        if self.size is None:
            return 0
        if self.unit == "um" and mpp:
            return round(self.size.value / mpp)
        return min(self.pixels) if len(self.pixels) == 1 else 0


def elect(slides: Sequence[Traits], times: Sequence[int] = ()) -> Cohort:
    """What the majority of slides has. Raises Undecided, with counts and names, where more than half share no value.

    An encoder without a name does not vote, nor does an unknown size, nor one in pixels where others are in um. With
    `times`, a slide speaks for as many as that which are like it.
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
    value, count = _commonest(sizes)
    vote = Vote(value, count, len(sizes))
    _check_majority(vote, f"patches in {unit} of", voters)
    pixels = frozenset(slide.patch_size for size, slide in voters if _same(size, value))
    return Cohort(common, vote, unit, pixels)


def check_cohort(slides: Sequence[SlideInfo]) -> None:
    """Refuse slides that no one model can train on together (DESIGN section 5).

    Raises ValueError naming the slides that differ from the majority in encoder, feature width or dtype, region cut or
    physical patch size, or a slide that is there twice.
    """
    ids = column(slides, "slide_id")
    if len(set(ids)) < len(ids):
        _refuse_twins(slides)
    if not len(slides) or _is_one(slides):
        return
    found = [traits_of(info) for info in slides]
    cohort = elect(found)
    odd = [(slide, text) for slide in found if (text := cohort.objection(slide))]
    others = f" (and {preview(slide.slide_id for slide, _ in odd[1:])})" if odd[1:] else ""
    raise ValueError(f"{odd[0][0].where}: {odd[0][1]}{others}")


def _refuse_twins(slides: Sequence[SlideInfo]) -> None:
    seen: dict[str, Any] = {}
    for info in slides:
        if info.slide_id in seen:
            other = f" and {seen[info.slide_id]}" if seen[info.slide_id] != info.shard else ""
            cure = "take one away; two files of one slide need two ids"
            raise ValueError(f"{info.shard}{other}: slide {info.slide_id} is there twice; {cure}")
        seen[info.slide_id] = info.shard


def _is_one(slides: Sequence[SlideInfo]) -> bool:
    """Whether slides are one cohort. Few of them differ in what they share, so one of each kind is looked at."""
    kinds: Counter[tuple] = Counter()
    columns = [column(slides, name) for name in _SHARED]
    for first in range(0, len(slides), PIECE):
        parts = (own[first : first + PIECE] for own in columns)
        kinds.update(zip(*(part.tolist() if isinstance(part, np.ndarray) else part for part in parts), strict=True))
    found = [Traits("", "", *kind) for kind in kinds]
    try:
        cohort = elect(found, list(kinds.values()))
    except Undecided:
        return False
    return not any(map(cohort.objection, found))


def _share(vote: Vote) -> str:
    return f"{vote.count} of {vote.voters} slides"


def _same(here: float, there: float) -> bool:
    return abs(here - there) <= SIZE_TOLERANCE * there


def _commonest(sizes: Float[np.ndarray, "n"]) -> tuple[float, int]:
    """The size that most of these are the same as, and how many; the one that occurs most often where several are."""
    ordered = np.sort(sizes)
    values, counts = np.unique(ordered, return_counts=True)
    low = np.searchsorted(ordered, values * (1 - SIZE_TOLERANCE) - 1e-9, "left")
    high = np.searchsorted(ordered, values * (1 + SIZE_TOLERANCE) + 1e-9, "right")
    best = max(range(len(values)), key=lambda i: (high[i] - low[i], counts[i], -values[i]))
    return float(values[best]), int(high[best] - low[best])


def _check_majority(vote: Vote, name: str, voters: Sequence[tuple[Any, Traits]]) -> None:
    """Raise Undecided, with who has what, for a vote that is no majority."""
    if 2 * vote.count > vote.voters or not voters:
        return
    sides: dict[Any, list[Traits]] = {}
    for value, slide in voters:
        sides.setdefault(f"{value:g}" if isinstance(value, float) else repr(value), []).append(slide)
    listed = "; ".join(
        f"{len(own)} with {name} {value} ({preview(slide.slide_id for slide in own)})"
        for value, own in sorted(sides.items(), key=lambda side: -len(side[1]))
    )
    cure = _ANEW if name.startswith("patches") else _APART
    raise Undecided(f"{voters[0][1].where}: no majority among {vote.voters} slides: {listed}; {cure}")
