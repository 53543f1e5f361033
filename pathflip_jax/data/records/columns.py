"""Columnar storage of a cohort's slides: among a million, objects are created only for those accessed.

`Slides` is a sequence of slides that keeps one list or array per attribute, and the regions of all slides of a shard
in one block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import index as whole_number
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Int, UInt32

from pathflip_jax.data.storage.files import Place

DTYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class _Derived:
    """Derived attributes of a slide."""

    @property
    def num_regions(self) -> int:
        """Number R of regions."""
        return len(self.region_crc32c)

    @property
    def row_bytes(self) -> int:
        """Bytes of one patch's features."""
        return self.feature_dim * DTYPES[self.feature_dtype].itemsize


@dataclass(frozen=True, eq=False)
class SlideInfo(_Derived):
    """Index entry of a slide: its record without features and coordinates, and the location of those.

    `region_rows` [R+1], `region_grid` [R, 2] (column, row; -1 in `scan`), `region_crc32c` [R] as in the record.
    """

    slide_id: str
    case_id: str
    encoder: str
    feature_dtype: str
    feature_dim: int
    num_patches: int
    patch_size: int
    mpp: float
    width: int
    height: int
    features_offset: int
    coords_offset: int
    coords_bytes: int
    coords_crc32c: int
    region_rows: Int[np.ndarray, "R+1"] = field(repr=False)
    region_grid: Int[np.ndarray, "R 2"] = field(repr=False)
    region_crc32c: Int[np.ndarray, "R"] = field(repr=False)
    shard: Place = field(default=Path())

    @property
    def cut(self) -> str:
        """Region cut, `grid` or `scan`."""
        return "scan" if (self.region_grid == -1).all() else "grid"


ARRAYS = {"region_rows": np.dtype("<i8"), "region_grid": np.dtype("<i4"), "region_crc32c": np.dtype("<u4")}
SCALARS = [f.name for f in fields(SlideInfo) if f.name not in ARRAYS and f.name != "shard"]
TEXTS = ("slide_id", "case_id", "encoder", "feature_dtype")
NUMBERS = {name: np.dtype(np.int64) for name in SCALARS if name not in TEXTS} | {
    "mpp": np.dtype(np.float64),
    "patch_size": np.dtype(np.int32),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "coords_crc32c": np.dtype(np.uint32),
}
CUTS = ("grid", "scan")
KNOWN = {*SCALARS, *ARRAYS, "shard", "cut"}
_COUNTED = (*NUMBERS, "cut", "first", "regions")


class ShardRegions(NamedTuple):
    """Regions of all slides of a shard, concatenated, in the smallest sufficient integer types."""

    count: Int[np.ndarray, "n"]  # patches of each region
    grid: Int[np.ndarray, "n 2"]
    crc32c: UInt32[np.ndarray, "n"]

    @classmethod
    def of(cls, count: np.ndarray, grid: np.ndarray, crc32c: np.ndarray) -> "ShardRegions":
        """Compact copy of these arrays: most cohorts have fewer than 2**15 regions in a row of a slide."""
        short = np.dtype(np.int16)
        fits = not len(grid) or (grid.min() >= np.iinfo(short).min and grid.max() <= np.iinfo(short).max)
        count = count.astype(np.min_scalar_type(int(count.max(initial=0))))
        return cls(count, grid.astype(short if fits else np.int32), crc32c.astype(np.uint32))


class SlideView(_Derived):
    """View of a slide in `Slides`, with the attributes of `SlideInfo`, each looked up on access."""

    __slots__ = ("_at", "_slides")

    def __init__(self, slides: "Slides", at: int) -> None:
        self._slides, self._at = slides, at

    def __getattr__(self, name: str) -> Any:
        if name not in KNOWN:
            raise AttributeError(f"a slide of records has no {name!r}")
        return self._slides.value(name, self._at)

    def __repr__(self) -> str:
        return f"SlideView(slide_id={self.slide_id!r}, case_id={self.case_id!r}, shard={str(self.shard)!r})"


class Slides(Sequence):
    """Slides of one or more shards: a sequence of `SlideView`, with one column per attribute.

    `texts` and `numbers` are columns by attribute name. Among the numbers, `shard_number` is an index into `shards`,
    and `first` and `regions` select a slide's regions among those of its shard in `held`; `cut` is true for `scan`.
    """

    def __init__(
        self,
        shards: Sequence[Place],
        texts: dict[str, list[str]],
        numbers: dict[str, np.ndarray],
        regions: Sequence[ShardRegions],
    ) -> None:
        self.shards, self.held = shards, regions
        self._columns: dict[str, list[str] | np.ndarray] = {**texts, **numbers}

    def __len__(self) -> int:
        return len(self._columns["slide_id"])

    def __getitem__(self, at: int | slice) -> "SlideView | list[SlideView]":
        if isinstance(at, slice):
            return [SlideView(self, i) for i in range(*at.indices(len(self)))]
        at = whole_number(at)
        if not -len(self) <= at < len(self):
            raise IndexError(f"slide {at} of {len(self)}")
        return SlideView(self, at % len(self))

    def __iter__(self) -> Iterator[SlideView]:
        return (SlideView(self, at) for at in range(len(self)))

    def column(self, name: str) -> Sequence:
        """Column of an attribute, in the order of the slides: a list of texts or an array of numbers."""
        if name == "cut":
            return [CUTS[cut] for cut in self._columns["cut"].tolist()]
        return self._columns[name]

    def value(self, name: str, at: int) -> Any:
        """Attribute of one slide, in the form of `SlideInfo`."""
        found = self._columns.get(name)
        if name == "cut":
            return CUTS[found.item(at)]
        if found is not None:
            return found[at] if isinstance(found, list) else found.item(at)
        shard = self._columns["shard_number"].item(at)
        if name == "shard":
            return self.shards[shard]
        first, size = self._columns["first"].item(at), self._columns["regions"].item(at)
        held = self.held[shard]
        if name == "region_crc32c":
            return held.crc32c[first : first + size]
        if name == "region_grid":
            return held.grid[first : first + size].astype(ARRAYS[name])
        rows = np.zeros(size + 1, ARRAYS[name])
        np.cumsum(held.count[first : first + size], out=rows[1:])
        return rows

    @property
    def largest_region(self) -> int:
        """Number of patches of the fullest region."""
        return max((int(held.count.max(initial=0)) for held in self.held), default=0)

    def without_regions(self) -> "Slides":
        """Copy without the regions."""
        texts = {name: self._columns[name] for name in TEXTS}
        numbers = {name: column for name, column in self._columns.items() if name not in TEXTS}
        return Slides(self.shards, texts, numbers, [])

    @classmethod
    def of(cls, shard: Place, infos: Sequence[SlideInfo]) -> "Slides":
        """Slides of a shard from index entries, as made by its writer or by a scan of the shard."""
        columns = {name: column(infos, name) for name in SCALARS}
        columns |= {name: np.array(columns[name], dtype) for name, dtype in NUMBERS.items()}
        count = [np.zeros(0, np.int64), *(np.diff(info.region_rows) for info in infos)]
        grid = [np.zeros((0, 2), np.int32), *(info.region_grid for info in infos)]
        crcs = [np.zeros(0, np.uint32), *(info.region_crc32c for info in infos)]
        sizes = np.array([info.num_regions for info in infos], np.int64)
        return cls.of_shard(shard, columns, sizes, ShardRegions(*map(np.concatenate, (count, grid, crcs))), {})

    @classmethod
    def of_shard(
        cls,
        shard: Place,
        columns: dict[str, list[str] | np.ndarray],
        sizes: Int[np.ndarray, "n"],
        regions: ShardRegions,
        names: dict[str, str],
    ) -> "Slides":
        """Slides of a shard from validated columns, region counts per slide, and regions.

        `names` interns texts, so that those shared by slides are stored once.
        """
        share = names.setdefault
        texts = {name: [share(text, text) for text in columns[name]] for name in ("encoder", "feature_dtype")}
        pairs = zip(columns["slide_id"], columns["case_id"], strict=True)
        texts["slide_id"] = columns["slide_id"]
        texts["case_id"] = [slide if case == slide else share(case, case) for slide, case in pairs]
        numbers = {name: columns[name].astype(dtype) for name, dtype in NUMBERS.items()}
        first = np.cumsum(sizes) - sizes
        numbers["regions"], numbers["first"] = sizes.astype(np.int32), first
        scan = (regions.grid == -1).all(1)
        numbers["cut"] = np.logical_and.reduceat(scan, first) if len(first) else np.zeros(0, bool)
        numbers["shard_number"] = np.zeros(len(sizes), np.int32)
        return cls([shard], texts, numbers, [ShardRegions.of(*regions)])

    @classmethod
    def joined(cls, parts: Sequence["Slides"]) -> "Slides":
        """Concatenated slides of several shards, one part per shard; consumes the parts to save memory."""
        if not parts:
            return cls(
                [],
                {name: [] for name in TEXTS},
                {name: np.zeros(0, np.int32) for name in (*_COUNTED, "shard_number")},
                [],
            )
        numbers = {"shard_number": np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])}
        texts = {name: [text for part in parts for text in part._columns.pop(name)] for name in TEXTS}
        numbers |= {name: np.concatenate([part._columns.pop(name) for part in parts]) for name in _COUNTED}
        shards = [part.shards[0] for part in parts]
        return cls(shards, texts, numbers, [held for part in parts for held in part.held])


def column(slides: Sequence[SlideInfo] | Slides, name: str) -> Sequence:
    """Column of an attribute, for any sequence of slides."""
    return slides.column(name) if isinstance(slides, Slides) else [getattr(info, name) for info in slides]
