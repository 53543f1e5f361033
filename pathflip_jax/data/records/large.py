"""Slides of millions of patches: features read in blocks of rows and never completely in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage import blocks


class StoredFeatures:
    """Lazily read features [N, F] of a slide in records, with every region's CRC checked.

    Array-like as far as users of slides need it: shape, dtype, length and rows by number, slice or index array. NumPy
    functions that convert it to an array read all of it.
    """

    ndim = 2

    def __init__(self, records: Records, position: int) -> None:
        info = records.slides[position]
        self.shape, self.dtype = (info.num_patches, info.feature_dim), records.dtype
        self._records, self._position, self._starts = records, position, np.asarray(info.region_rows)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of elements, N * F."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self), dtype=np.int64)[rows]  # NumPy's indexing rules and errors
        flat = rows.ravel()
        found = np.empty((len(flat), self.shape[1]), self.dtype)
        order = np.argsort(flat, kind="stable")
        wanted, first = np.unique(np.searchsorted(self._starts, flat[order], side="right") - 1, return_index=True)
        bounds = [*first.tolist(), len(flat)]
        for start, stop in self._together(wanted):
            read = self._records.read_regions(self._position, wanted[start:stop])
            for number, part in enumerate(read, start):
                own = order[bounds[number] : bounds[number + 1]]
                found[own] = part[flat[own] - self._starts[wanted[number]]]
        return found.reshape(*rows.shape, self.shape[1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("features on disk have no array that could be shared; copy them")
        found = self[:]
        return found if dtype is None else found.astype(dtype, copy=False)

    def _together(self, regions: np.ndarray) -> Iterator[tuple[int, int]]:
        """Runs of these regions of about one block's bytes each."""
        sizes = (self._starts[regions + 1] - self._starts[regions]) * self.shape[1] * self.dtype.itemsize
        run = (np.cumsum(sizes) - sizes) // blocks.BLOCK
        cuts = [0, *(np.flatnonzero(np.diff(run)) + 1).tolist(), len(regions)]
        yield from zip(cuts, cuts[1:], strict=False)


def open_slide(records: Records, position: int) -> SlideFeatures:
    """Slide of records as from `Records.read`; features of a large one stay on disk (`StoredFeatures`)."""
    info = records.slides[position]
    if info.num_patches * info.row_bytes <= blocks.LARGE:
        return records.read(position)
    place = (info.patch_size, info.mpp, info.width, info.height)
    features, coords, recipe = StoredFeatures(records, position), records.coords(position), records.recipe
    try:
        return SlideFeatures(info.slide_id, info.case_id, features, coords, *place, info.encoder, recipe=recipe)
    except ValueError as error:
        raise ValueError(f"{info.shard}: {error}") from None
