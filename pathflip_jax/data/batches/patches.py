"""Sampling of a batch's patches: regions of every bag, and patches of oversized regions (DESIGN section 5)."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float16, Int32

from pathflip_jax.data.batches.bags import StoredRegions
from pathflip_jax.data.batches.batch_memory import BatchMemory
from pathflip_jax.data.records.records import Records


class PatchSampler:
    """Sampler of up to R regions of a bag and up to S patches of each, both without replacement.

    Features are read from the records at each draw, or once (`load`): then draws return them from memory, or as row
    numbers of the features on the devices.
    """

    def __init__(self, records: Records, regions: int, patch_slots: int, ahead: int) -> None:
        self.regions, self.patch_slots = regions, patch_slots
        self._records = records
        self._memory = BatchMemory(keep=ahead + 2)  # prefetched batches, the one in use and the previous one
        self._features: np.ndarray | None = None
        self._on_device = False
        self._first_row: np.ndarray | None = None

    def load(self, bags: Iterable[StoredRegions], on_device: bool = False) -> None:
        """Read the features of these bags into memory, after one row of zeros for padding."""
        self._on_device = on_device
        used = sorted({int(i) for bag in bags for i in bag.record})
        sizes = [self._records.slides[i].num_patches for i in used]
        ends = 1 + np.cumsum([0, *sizes])
        self._first_row = np.zeros(max(used) + 1, np.int64)
        self._first_row[used] = ends[:-1]
        self._features = np.empty((ends[-1], self._records.feature_dim), self._records.dtype)
        self._features[0] = 0
        for i, start, stop in zip(used, ends, ends[1:], strict=False):  # bounds the temporary copy to one slide
            self._features[start:stop] = self._records.read(i).features

    def take_features(self) -> np.ndarray | None:
        """Hand over, once, the features [N, F] that draws refer to by row; None if draws return features."""
        if not self._on_device:
            return None
        features, self._features = self._features, None
        return features

    def draw(
        self, bags: Sequence[StoredRegions], rngs: Sequence[np.random.Generator], *, in_order: bool = False
    ) -> tuple[Float16[np.ndarray, "B R S F"] | Int32[np.ndarray, "B R S"], Bool[np.ndarray, "B R S"]]:
        """Patches of each bag, or their row numbers on the devices, and the mask of filled slots.

        Regions are in the order of the draw, or in stored order (`in_order`).
        """
        R, S = self.regions, self.patch_slots
        chosen = [rng.permutation(len(bag.count))[:R] for bag, rng in zip(bags, rngs, strict=True)]
        if in_order:
            chosen = [np.sort(regions) for regions in chosen]
        mask = np.zeros((len(bags), R, S), bool)
        index = np.zeros((len(bags), R, S), np.int64)  # index of the patch in its region
        for b, (bag, regions, rng) in enumerate(zip(bags, chosen, rngs, strict=True)):
            counts = bag.count[regions]
            mask[b, : len(regions)] = np.arange(S) < counts[:, None]
            index[b, : len(regions)] = np.arange(S)
            large = np.flatnonzero(counts > S)
            if len(large):
                keys = rng.random((len(large), counts.max()))
                keys[np.arange(counts.max()) >= counts[large, None]] = 2.0  # beyond the region's patches
                index[b, large] = np.sort(np.argpartition(keys, S - 1, axis=1)[:, :S], axis=1)
        if self._first_row is not None:
            return self._loaded(bags, chosen, index, mask), mask
        patches = self._memory.allocate((*mask.shape, self._records.feature_dim), self._records.dtype)
        for b, (bag, regions) in enumerate(zip(bags, chosen, strict=True)):
            for record in np.unique(bag.record[regions]):
                rows = np.flatnonzero(bag.record[regions] == record)
                counts = bag.count[regions[rows]].tolist()
                out = [patches[b, r, :n] if n <= S else None for r, n in zip(rows, counts, strict=True)]
                read = self._records.read_regions(int(record), bag.region[regions[rows]].tolist(), out)
                for r, features in zip(rows, read, strict=True):
                    if len(features) > S:
                        np.take(features, index[b, r], axis=0, out=patches[b, r], mode="clip")  # no copy of `out`
                    patches[b, r, len(features) :] = 0
            patches[b, len(regions) :] = 0
        return patches, mask

    def _loaded(self, bags: Sequence[StoredRegions], chosen: list[np.ndarray], index: np.ndarray, mask: np.ndarray):
        """Sampled patches from memory, or their row numbers on the devices."""
        for b, (bag, regions) in enumerate(zip(bags, chosen, strict=True)):
            first = self._first_row[bag.record[regions]] + bag.start[regions]
            index[b, : len(regions)] += first[:, None]
        index[~mask] = 0
        if self._on_device:
            return index.astype(np.int32)
        patches = self._memory.allocate((*index.shape, self._features.shape[1]), self._features.dtype)
        return np.take(self._features, index, axis=0, out=patches, mode="clip")  # "clip": no copy of `out`
