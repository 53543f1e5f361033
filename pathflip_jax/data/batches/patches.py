"""The patches of a batch: regions drawn of every bag, and patches of a region that has too many (DESIGN section 5)."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float16, Int32

from pathflip_jax.data.batches.bags import StoredRegions
from pathflip_jax.data.batches.batch_memory import BatchMemory
from pathflip_jax.data.records.records import Records


class PatchSampler:
    """Draws up to R regions of a bag and up to S patches of each, both without replacement.

    Features come from the records at each draw, or were read once (`load`): then from memory, or as the numbers of
    rows that the devices hold.
    """

    def __init__(self, records: Records, regions: int, patch_slots: int, ahead: int) -> None:
        self.regions, self.patch_slots = regions, patch_slots
        self._records = records
        self._memory = BatchMemory(keep=ahead + 2)  # those made ahead, the one in use and the one before
        self._features: np.ndarray | None = None
        self._on_device = False
        self._first_row: np.ndarray | None = None

    def load(self, bags: Iterable[StoredRegions], on_device: bool = False) -> None:
        """Read the features of these bags into memory, behind one row of zeros that stands for padding."""
        self._on_device = on_device
        used = sorted({int(i) for bag in bags for i in bag.record})
        sizes = [self._records.slides[i].num_patches for i in used]
        ends = 1 + np.cumsum([0, *sizes])
        self._first_row = np.zeros(max(used) + 1, np.int64)
        self._first_row[used] = ends[:-1]
        self._features = np.empty((ends[-1], self._records.feature_dim), self._records.dtype)
        self._features[0] = 0
        for i, start, stop in zip(used, ends, ends[1:], strict=False):  # one slide is there twice, never all of them
            self._features[start:stop] = self._records.read(i).features

    def take_features(self) -> np.ndarray | None:
        """Hand over the features [N, F] that draws name rows of, once; None where draws bring features."""
        if not self._on_device:
            return None
        features, self._features = self._features, None
        return features

    def draw(
        self, bags: Sequence[StoredRegions], rngs: Sequence[np.random.Generator], *, in_order: bool = False
    ) -> tuple[Float16[np.ndarray, "B R S F"] | Int32[np.ndarray, "B R S"], Bool[np.ndarray, "B R S"]]:
        """The patches of each bag, or their rows on the devices, and which slots hold one.

        Regions come in the order in which they were drawn, or as they are stored (`in_order`).
        """
        R, S = self.regions, self.patch_slots
        chosen = [rng.permutation(len(bag.count))[:R] for bag, rng in zip(bags, rngs, strict=True)]
        if in_order:
            chosen = [np.sort(regions) for regions in chosen]
        mask = np.zeros((len(bags), R, S), bool)
        index = np.zeros((len(bags), R, S), np.int64)  # the patch's number in its region
        for b, (bag, regions, rng) in enumerate(zip(bags, chosen, rngs, strict=True)):
            counts = bag.count[regions]
            mask[b, : len(regions)] = np.arange(S) < counts[:, None]
            index[b, : len(regions)] = np.arange(S)
            large = np.flatnonzero(counts > S)
            if len(large):
                keys = rng.random((len(large), counts.max()))
                keys[np.arange(counts.max()) >= counts[large, None]] = 2.0  # no such patch
                index[b, large] = np.sort(np.argpartition(keys, S - 1, axis=1)[:, :S], axis=1)
        if self._first_row is not None:
            return self._held(bags, chosen, index, mask), mask
        patches = self._memory.lend((*mask.shape, self._records.feature_dim), self._records.dtype)
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

    def _held(self, bags: Sequence[StoredRegions], chosen: list[np.ndarray], index: np.ndarray, mask: np.ndarray):
        """The same patches out of memory, or their rows on the devices."""
        for b, (bag, regions) in enumerate(zip(bags, chosen, strict=True)):
            first = self._first_row[bag.record[regions]] + bag.start[regions]
            index[b, : len(regions)] += first[:, None]
        index[~mask] = 0
        if self._on_device:
            return index.astype(np.int32)
        patches = self._memory.lend((*index.shape, self._features.shape[1]), self._features.dtype)
        return np.take(self._features, index, axis=0, out=patches, mode="clip")  # "clip": no copy of `out`
