"""Slides of millions of patches: features that are read a block of rows at a time, and never stand in memory whole."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage import blocks


class StoredFeatures:
    """The features [N, F] of a slide of records, read when rows of them are asked for, every region's CRC checked.

    An array as far as readers of slides need one: shape, dtype, length and rows by number, slice or index array. NumPy
    functions that want all of it get all of it.
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
        """The number of features of all patches together."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """What all of it would take in memory."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self), dtype=np.int64)[rows]  # as NumPy understands it, with its errors
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
        """Runs of these regions that have about a block's bytes each."""
        sizes = (self._starts[regions + 1] - self._starts[regions]) * self.shape[1] * self.dtype.itemsize
        run = (np.cumsum(sizes) - sizes) // blocks.BLOCK
        cuts = [0, *(np.flatnonzero(np.diff(run)) + 1).tolist(), len(regions)]
        yield from zip(cuts, cuts[1:], strict=False)


def open_slide(records: Records, position: int) -> SlideFeatures:
    """A slide of records as `Records.read` gives it; of a large one the features stay on disk (`StoredFeatures`)."""
    info = records.slides[position]
    if info.num_patches * info.row_bytes <= blocks.LARGE:
        return records.read(position)
    place = (info.patch_size, info.mpp, info.width, info.height)
    features = StoredFeatures(records, position)
    try:
        return SlideFeatures(info.slide_id, info.case_id, features, records.coords(position), *place, info.encoder)
    except ValueError as error:
        raise ValueError(f"{info.shard}: {error}") from None
