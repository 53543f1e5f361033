"""Training batches: a pure function of (seed, step), independent of the number of processes (DESIGN section 5).

An epoch is a permutation of all bags (a slide, or the slides of a case that share a text), drawn from the seed and the
epoch number, and divided into whole batches; the remainder, less than a batch, is dropped, and differs from epoch to
epoch. Regions, patches and subcaptions are drawn from (seed, step, index in the batch). So a run resumes on another
number of processes with the same batches. grain prefetches in threads.
"""

import logging
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import grain
import jax
import numpy as np
from jaxtyping import Bool, Float, Float16, Int32

from pathflip_jax.data.batches.bags import Bag, TokenisedText, collect_bags, regions_of
from pathflip_jax.data.batches.packing import (
    PackedText,
    PackingOverflowError,
    TextRows,
    enough_rows,
    pack,
    place,
    row_lengths,
)
from pathflip_jax.data.batches.patches import PatchSampler
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.captions import draw_given, draw_merges
from pathflip_jax.data.texts.cases import NO_TABLE, Sources
from pathflip_jax.data.texts.text import SlideText
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.runtime.sharding import ONE_PROCESS, Shards
from pathflip_jax.settings.sections import AlignmentDataSettings

_SIMULATED_GROUPS, _SIMULATED_SLIDES = 256, 8192
_EPOCHS, _STEPS, _ROWS = 0, 1, 2  # purpose of a random stream: the first word after the seed
_log = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")


class Batch(NamedTuple):
    """Input of a training step. With several processes each holds its own slides and groups, in order.

    Text group g packs the texts of slides g*B/G to (g+1)*B/G - 1 into rows of a few lengths, each [G, P, L].
    `text_index` is the index of each text's [CLS] in the concatenated rows of its group: column 0 the caption, then the
    K subcaptions. Slides with an id in common in `related` (a case, a caption) are not negatives of each other;
    subcaptions of equal `wording` have the same text.
    `slide` is an index into `Batches.slides`. If the features are on the device, `patches` are row numbers of
    `Batches.take_features`, and `look_up` replaces them by the features.
    """

    patches: Float16[np.ndarray, "B R S F"] | Int32[np.ndarray, "B R S"]
    patch_mask: Bool[np.ndarray, "B R S"]
    text_rows: tuple[TextRows, ...]
    text_index: Int32[np.ndarray, "B 1+K"]
    related: Int32[np.ndarray, "B S"]
    slide: Int32[np.ndarray, "B"]
    wording: Int32[np.ndarray, "B K"] | None = None


class Cohort(NamedTuple):
    """Source of batches: records, texts and their tokenizer, for the slides in `slide_ids` (None: all).

    `sources` adds the slide table, which assigns slides to patients, as records and texts do.
    """

    records: Records
    texts: Sequence[SlideText]
    tokenizer: TextTokenizer
    slide_ids: Sequence[str] | None = None
    sources: Sources = NO_TABLE


class BatchSize(NamedTuple):
    """Number of slides of a global batch, and of the groups in which their texts are packed.

    Each batch ends with `padding` additional repeated slides, so that few slides divide over many devices; their
    results are to be discarded.
    """

    slides: int
    text_groups: int = 1
    padding: int = 0

    @property
    def padded(self) -> int:
        """Number of slides of a batch, including padding."""
        return self.slides + self.padding

    def require_whole_groups(self, shards: int) -> None:
        """Raise ValueError if a device would not hold whole groups of slides."""
        if self.padded % self.text_groups or self.text_groups % shards:
            raise ValueError(
                f"batch_size {self.padded}, text_groups {self.text_groups}, {shards} shards: each must be a multiple "
                "of the next, so that every device holds whole groups of slides"
            )


def make_batches(
    cohort: Cohort, data: AlignmentDataSettings, size: BatchSize, *, seed: int = 0, shards: Shards = ONE_PROCESS
) -> "Batches":
    """Batches of bags of a cohort, sampled according to `data`; `size` overrides its text groups.

    If `data.patch_slots` is 0, every region has as many slots as the largest one; if `data.text_rows` is empty, the
    number of rows is measured on groups drawn as in training. A `caption_share` below 1 replaces the caption by that
    fraction of its sentences, redrawn each time and in any order: otherwise the model memorises the reports of a small
    cohort. `resident` reads all features once: "host" keeps them in this process's memory, "device" leaves them to be
    put on the devices (`Batches.take_features`), so that a batch holds row numbers only. Raises ValueError for slides
    without records, for texts that match none, if two sources name different patients of a slide, and for sizes that do
    not divide.
    """
    size.require_whole_groups(shards.count)
    records, texts, tokenizer, slide_ids, sources = cohort
    bags = collect_bags(records, texts, tokenizer, slide_ids, data.caption_length, data.subcaption_length, sources)
    if len(bags) < size.slides:
        raise ValueError(
            f"{len(bags)} slides (or cases) have a text, too few for a batch of {size.slides}; lower batch_size"
        )
    if not data.patch_slots:
        widest = max(int(np.diff(records.slides[place].region_rows).max()) for bag in bags for place in bag.places)
        data = replace(data, patch_slots=widest)
    batches = Batches(cohort, bags, data, size, seed, shards)
    batches.set_text_rows(data.text_rows)
    if data.resident:
        batches.load(on_device=data.resident == "device")
    return batches


def prefetch(batch: Callable[[int], BatchT], start_step: int, threads: int) -> Iterator[BatchT]:
    """`batch(step)` of every step from `start_step` on, computed ahead of time in so many threads."""
    steps = grain.MapDataset.range(start_step, np.iinfo(np.int32).max).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))


def look_up(batch: Batch, features: jax.Array | None) -> Batch:
    """Batch with row numbers replaced by their `features` [N, F]; unchanged if `features` is None."""
    return batch if features is None else batch._replace(patches=features[batch.patches])


class Batches:
    """Batches of a run; `batch(step)` may be called in any order, from any thread.

    `slides[i]` are the slides of bag i, `related[i]` its ids (`Batch.related`). `counts` records how often texts did
    not fit: "shortened" merges lost sentences to stay below `subcaption_length`, "cut" single sentences were truncated,
    "overflows" groups did not fit in `text_rows`, so that "redrawn" of their subcaptions became single sentences. A
    batch that is made twice is counted twice.
    """

    def __init__(
        self,
        cohort: Cohort,
        bags: list[Bag],
        data: AlignmentDataSettings,
        size: BatchSize,
        seed: int = 0,
        shards: Shards = ONE_PROCESS,
    ) -> None:
        self.bags = bags
        self.slides = [bag.slides for bag in bags]
        widest = max(len(bag.related) for bag in bags)  # shorter ones are padded with the case id
        filled = [[*bag.related, *bag.related[:1] * (widest - len(bag.related))] for bag in bags]
        self.related = np.array(filled, np.int32)  # [bags, S]
        self.steps_per_epoch = len(bags) // size.slides
        self.patch_slots = data.patch_slots
        self.row_lengths = row_lengths(data.row_step, max(data.caption_length, data.subcaption_length))
        self.text_rows: tuple[int, ...] = ()
        self.counts: Counter[str] = Counter()
        self._records, self._tokenizer = cohort.records, cohort.tokenizer
        self._data, self._size, self._seed, self._shards = data, size, seed, shards
        self._lock = threading.Lock()
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)  # of the most recent epoch
        self._patches = PatchSampler(cohort.records, data.regions, data.patch_slots, data.threads)

    @property
    def batch_size(self) -> int:
        """Number of slides of a global batch, without padding."""
        return self._size.slides

    def take_features(self) -> np.ndarray | None:
        """Hand over, once, the features [N, F] that batches refer to by row; None if batches hold features."""
        return self._patches.take_features()

    def load(self, on_device: bool = False) -> None:
        """Read the features of all bags into memory, after one row of zeros for padding."""
        self._patches.load((regions_of(self._records, bag.places) for bag in self.bags), on_device)

    def sample_features(self, bags: int = 256, regions: int = 4) -> Float[np.ndarray, "N F"]:
        """Patch features of some regions of some bags, both evenly spaced: the same in every process."""
        chosen = self.bags[:: -(-len(self.bags) // bags)]
        places = {place: self._records.slides[place].num_regions for bag in chosen for place in bag.places}
        parts = [
            self._records.read_regions(place, range(0, count, -(-count // regions))) for place, count in places.items()
        ]
        return np.concatenate([part for read in parts for part in read]).astype(np.float32)

    def resize(self, size: BatchSize) -> None:
        """Change the batch size for the same bags, for a size that depends on their number.

        Texts are not tokenised again and features not loaded again; `text_rows` is measured again. Raises ValueError
        for sizes that do not divide.
        """
        size.require_whole_groups(self._shards.count)
        self._size, self.steps_per_epoch = size, len(self.bags) // size.slides
        self.set_text_rows()

    def set_text_rows(self, text_rows: Sequence[int] = ()) -> None:
        """Set the number of rows of each of `row_lengths` in a text group: as given, or enough for simulated groups.

        Raises ValueError when the longest captions would not fit with the shortest subcaptions: a batch of these
        could not be packed at all.
        """
        size, widths = self._size.padded // self._size.text_groups, self.row_lengths
        least = sorted((self._least(bag) for bag in self.bags), key=sum, reverse=True)[:size]
        least = [length for lengths in least for length in lengths]
        if not text_rows:
            rng = np.random.default_rng([self._seed, _ROWS])
            groups = max(16, min(_SIMULATED_GROUPS, _SIMULATED_SLIDES // size))
            drawn = [least, *(self._simulated_lengths(size, rng) for _ in range(groups))]
            text_rows = enough_rows(drawn, widths)
        elif len(text_rows) != len(widths):
            raise ValueError(
                f"text_rows {tuple(text_rows)} has {len(text_rows)} numbers; there are rows of {len(widths)} lengths: "
                f"{widths}"
            )
        else:
            try:
                place(least, widths, text_rows)
            except PackingOverflowError as error:
                raise ValueError(
                    f"text_rows {tuple(text_rows)} is too few for {size} slides with the longest captions: {error}"
                ) from None
        self.text_rows = tuple(text_rows)

    def _least(self, bag: Bag) -> list[int]:
        """Shortest possible lengths of a bag's texts, for the longest of its captions."""
        options = []
        for text in bag.texts:
            shortest = min(text.pieces.shortest + 2, self._data.subcaption_length)
            options.append([self._longest_caption(text)] + [shortest] * self._data.subcaptions)
        return max(options, key=sum)

    def _longest_caption(self, text: TokenisedText) -> int:
        """Length of the longest caption that can be drawn."""
        if not self._draws_captions(text):
            return len(text.caption)
        longest = sorted(map(len, text.pieces), reverse=True)[: self._caption_sentences(text)]
        return min(sum(longest) + 2, self._data.caption_length)

    def _simulated_lengths(self, size: int, rng: np.random.Generator) -> list[int]:
        lengths = []
        for i in rng.permutation(len(self.bags))[:size]:
            text = self.bags[i].texts[rng.integers(len(self.bags[i].texts))]
            lengths.append(len(self._caption(text, rng)))
            lengths += [len(self._subcaption(text, merge)) for merge in self._merges(text, rng)]
        return lengths

    def chosen(self, step: int) -> np.ndarray:
        """Bag indices of the global batch of a step, without padding."""
        epoch, within = divmod(step, self.steps_per_epoch)
        known_epoch, order = self._order
        if known_epoch != epoch:
            order = np.random.default_rng([self._seed, _EPOCHS, epoch]).permutation(len(self.bags))
            self._order = epoch, order  # a single assignment, as other threads do the same
        return order[within * self.batch_size :][: self.batch_size]

    def batch(self, step: int) -> Batch:
        """Batch of a global step, a function of (seed, step), restricted to this process's slides, in order."""
        places = self._shards.rows(self._size.padded)
        chosen = np.resize(self.chosen(step), self._size.padded)[places]
        bags = [self.bags[i] for i in chosen]
        rngs = [np.random.default_rng([self._seed, _STEPS, step, place]) for place in places]
        patches, mask = self._patches.draw([regions_of(self._records, bag.places) for bag in bags], rngs)
        size = self._size.padded // self._size.text_groups
        groups = [self._pack(bags[g : g + size], rngs[g : g + size]) for g in range(0, len(places), size)]
        packed, wording = zip(*groups, strict=True)
        rows = jax.tree.map(lambda *groups: np.stack(groups), *(group.rows for group in packed))
        index = np.stack([group.cls_index for group in packed])
        index = index.reshape(len(places), 1 + self._data.subcaptions)
        wording = np.concatenate(wording)
        return Batch(patches, mask, rows, index, self.related[chosen], chosen.astype(np.int32), wording)

    def __iter__(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless batches from `start_step` on, prefetched in threads."""
        return prefetch(self.batch, start_step, self._data.threads)

    def _merges(self, text: TokenisedText, rng: np.random.Generator) -> list[tuple[int, ...]]:
        n, k = len(text.pieces), self._data.subcaptions
        return draw_given(n, k, rng) if text.given else draw_merges(n, k, rng, self._data.merge_sentences)

    def _caption(self, text: TokenisedText, rng: np.random.Generator) -> np.ndarray:
        """Ids of the caption, or of a fraction of its sentences; captions with given subcaptions stay complete."""
        if not self._draws_captions(text):
            return text.caption
        kept = rng.permutation(len(text.pieces))[: self._caption_sentences(text)]
        return self._tokenizer.wrap(np.concatenate([text.pieces[i] for i in kept]), self._data.caption_length)

    def _draws_captions(self, text: TokenisedText) -> bool:
        return self._data.caption_share < 1 and not text.given and self._tokenizer.concatenates

    def _caption_sentences(self, text: TokenisedText) -> int:
        return round(self._data.caption_share * len(text.pieces)) or 1

    def _subcaption(self, text: TokenisedText, merge: tuple[int, ...], counts: Counter | None = None) -> np.ndarray:
        """Ids of a merge with [CLS] and [SEP], without its last sentences if it is too long."""
        room = self._data.subcaption_length - 2
        kept = len(merge)
        while kept > 1 and sum(len(text.pieces[i]) for i in merge[:kept]) > room:
            kept -= 1
        if kept > 1 and not self._tokenizer.concatenates:
            words = text.words
            ids = self._tokenizer.ids([" ".join(words[i] for i in merge[:kept])])[0]
        else:
            ids = text.pieces[merge[0]] if kept == 1 else np.concatenate([text.pieces[i] for i in merge[:kept]])
        if counts is not None:
            counts["shortened"] += kept < len(merge)
            counts["cut"] += len(ids) > room
        return self._tokenizer.wrap(ids, self._data.subcaption_length)

    def _pack(self, bags: list[Bag], rngs: list[np.random.Generator]) -> tuple[PackedText, Int32[np.ndarray, "n K"]]:
        """Packed texts of a group, and a wording id of each subcaption.

        If texts need too many rows, the longest become single sentences. The id is a hash: different wordings collide
        with a probability of 2**-32 per pair.
        """
        counts: Counter[str] = Counter()
        found: list[np.ndarray] = []
        drawn: list[tuple[TokenisedText, tuple[int, ...]] | None] = []  # None: a caption, never shortened
        for bag, rng in zip(bags, rngs, strict=True):
            text = bag.texts[rng.integers(len(bag.texts)) if len(bag.texts) > 1 else 0]
            merges = self._merges(text, rng)
            found += [self._caption(text, rng), *(self._subcaption(text, merge, counts) for merge in merges)]
            drawn += [None, *((text, merge) for merge in merges)]
        while True:
            try:
                packed = pack(found, self.row_lengths, self.text_rows)
                break
            except PackingOverflowError:
                counts["overflows"] |= 1
                if not self._shorten(found, drawn):
                    raise
                counts["redrawn"] += 1
        self._count(counts)
        wording = np.array([zlib.crc32(ids.tobytes()) for ids in found], np.uint32).view(np.int32)
        return packed, wording.reshape(len(bags), -1)[:, 1:]

    def _shorten(self, found: list[np.ndarray], drawn: list) -> bool:
        """Replace the longest subcaption of a group by its shortest sentence, or that by the text's shortest one."""
        for i in sorted((i for i, source in enumerate(drawn) if source), key=lambda i: -len(found[i])):
            text, merge = drawn[i]
            sentence = min(merge if len(merge) > 1 else range(len(text.pieces)), key=lambda j: len(text.pieces[j]))
            if merge != (sentence,):
                drawn[i], found[i] = (text, (sentence,)), self._subcaption(text, (sentence,))
                return True
        return False

    def _count(self, counts: Counter[str]) -> None:
        with self._lock:
            for name, explanation in (
                ("shortened", "merged subcaptions longer than subcaption_length lose their last sentences"),
                ("overflows", "texts of a group that do not fit in text_rows are redrawn as single sentences"),
            ):
                if counts[name] and not self.counts[name]:
                    _log.warning("%s; further cases are counted, but not logged", explanation)
            self.counts.update(counts)
