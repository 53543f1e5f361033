"""Training batches: a pure function of (seed, step), whatever the number of processes (DESIGN section 5).

An epoch is a permutation of all bags (a slide, or the slides of a case that share a text), drawn from the seed and
the number of the epoch, and cut into whole batches; what is left over, less than a batch, waits for another epoch,
where another permutation leaves out others. Regions, patches and subcaptions come from (seed, step, place in the
batch). So a run resumes on another number of processes with the same batches. grain reads ahead, in threads.
"""

import logging
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Bool, Float16, Int32

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
_EPOCHS, _STEPS, _ROWS = 0, 1, 2  # what a random stream is for; the first word after the seed
_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What a step sees. With several processes each holds its own slides and groups, in their order.

    Text group g packs the texts of slides g*B/G to (g+1)*B/G - 1 into rows of a few lengths, each [G, P, L]. With all
    rows of a group laid end to end, `text_index` is the place of each text's [CLS]: column 0 the caption, then the K
    subcaptions. Slides that share a number in `related` (a case, a caption) are no negatives of each other;
    subcaptions of equal `wording` read the same.
    `slide` is a number in `Batches.slides`. Where the features are on the device, `patches` are rows of
    `Batches.take_features`, and `look_up` puts the features in their place.
    """

    patches: Float16[np.ndarray, "B R S F"] | Int32[np.ndarray, "B R S"]
    patch_mask: Bool[np.ndarray, "B R S"]
    text_rows: tuple[TextRows, ...]
    text_index: Int32[np.ndarray, "B 1+K"]
    related: Int32[np.ndarray, "B S"]
    slide: Int32[np.ndarray, "B"]
    wording: Int32[np.ndarray, "B K"] | None = None


class Cohort(NamedTuple):
    """What batches are drawn from: records, texts and their tokenizer; of the slides in `slide_ids` (None: of all).

    `sources` brings the slide table, which says whose slides are, beside records and texts.
    """

    records: Records
    texts: Sequence[SlideText]
    tokenizer: TextTokenizer
    slide_ids: Sequence[str] | None = None
    sources: Sources = NO_TABLE


class BatchSize(NamedTuple):
    """Slides of a batch over all processes, and the groups that their texts are packed in.

    `padding` more slides, repeated ones, end each batch: for few slides that must divide over many devices; what comes
    of them is to be cut off.
    """

    slides: int
    text_groups: int = 1
    padding: int = 0

    @property
    def padded(self) -> int:
        """The slides of a batch, its padding among them."""
        return self.slides + self.padding

    def require_whole_groups(self, shards: int) -> None:
        """Raise ValueError where a device would not hold whole groups of slides."""
        if self.padded % self.text_groups or self.text_groups % shards:
            raise ValueError(
                f"batch_size {self.padded}, text_groups {self.text_groups}, {shards} shards: each must be a multiple "
                "of the next, so that every device holds whole groups of slides"
            )


def make_batches(
    cohort: Cohort, data: AlignmentDataSettings, size: BatchSize, *, seed: int = 0, shards: Shards = ONE_PROCESS
) -> "Batches":
    """Batches of bags of a cohort, drawn as `data` says; `size` takes the place of its text groups.

    Where `data.patch_slots` is 0, a region has as many as the largest; where `data.text_rows` is empty, the texts of a
    group are measured, by drawing them as training will. A `caption_share` below 1 shows that share of a report's
    sentences in place of the caption, drawn anew each time and in any order: a small cohort's reports are else learned
    by heart. `resident` reads all features once: "host" keeps them in this process's memory, "device" leaves them to be
    put on the devices (`Batches.take_features`), so that a batch brings row numbers alone. Raises ValueError for slides
    of which there are no records, for texts that match none, where two sources name different patients of a slide, and
    for sizes that do not divide.
    """
    size.require_whole_groups(shards.count)
    records, texts, tokenizer, slide_ids, sources = cohort
    bags = collect_bags(records, texts, tokenizer, slide_ids, data.caption_length, data.subcaption_length, sources)
    if len(bags) < size.slides:
        raise ValueError(f"{len(bags)} slides (or cases) with a text make no batch of {size.slides}; lower batch_size")
    if not data.patch_slots:
        widest = max(int(np.diff(records.slides[place].region_rows).max()) for bag in bags for place in bag.places)
        data = replace(data, patch_slots=widest)
    batches = Batches(cohort, bags, data, size, seed, shards)
    batches.set_text_rows(data.text_rows)
    if data.resident:
        batches.load(on_device=data.resident == "device")
    return batches


def look_up(batch: Batch, features: jax.Array | None) -> Batch:
    """The batch with its features in place of their rows in `features` [N, F]; as it is without."""
    return batch if features is None else batch._replace(patches=features[batch.patches])


class Batches:
    """The batches of a run; `batch(step)` can be asked in any order, from any thread.

    `slides[i]` are the slides of bag i, `related[i]` its numbers (`Batch.related`). `counts` says how often texts did
    not fit: "shortened" merges lost sentences to stay below `subcaption_length`, "cut" single sentences lost their end,
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
        widest = max(len(bag.related) for bag in bags)  # a shorter one is filled up with its case
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
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)  # of the epoch that was asked for last
        self._patches = PatchSampler(cohort.records, data.regions, data.patch_slots, data.threads)

    @property
    def batch_size(self) -> int:
        """The slides of a batch of all processes, without padding."""
        return self._size.slides

    def take_features(self) -> np.ndarray | None:
        """Hand over the features [N, F] that batches name rows of, once; None where batches bring features."""
        return self._patches.take_features()

    def load(self, on_device: bool = False) -> None:
        """Read the features of all bags into memory, behind one row of zeros that stands for padding."""
        self._patches.load((regions_of(self._records, bag.places) for bag in self.bags), on_device)

    def resize(self, size: BatchSize) -> None:
        """Make batches of another size from the same bags: for a size that their number decides.

        Texts are not tokenised again and features not loaded again; `text_rows` is measured anew. Raises ValueError
        for sizes that do not divide.
        """
        size.require_whole_groups(self._shards.count)
        self._size, self.steps_per_epoch = size, len(self.bags) // size.slides
        self.set_text_rows()

    def set_text_rows(self, text_rows: Sequence[int] = ()) -> None:
        """Fix how many rows of each of `row_lengths` a text group has: as given, or enough for simulated groups.

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
        """The lengths of a bag's texts at their shortest, for the longest of its captions."""
        options = []
        for text in bag.texts:
            shortest = min(text.pieces.shortest + 2, self._data.subcaption_length)
            options.append([len(text.caption)] + [shortest] * self._data.subcaptions)
        return max(options, key=sum)

    def _simulated_lengths(self, size: int, rng: np.random.Generator) -> list[int]:
        lengths = []
        for i in rng.permutation(len(self.bags))[:size]:
            text = self.bags[i].texts[rng.integers(len(self.bags[i].texts))]
            lengths.append(len(text.caption))
            lengths += [len(self._subcaption(text, merge)) for merge in self._merges(text, rng)]
        return lengths

    def chosen(self, step: int) -> np.ndarray:
        """The numbers of the bags in the batch of a global step, of all processes, without padding."""
        epoch, within = divmod(step, self.steps_per_epoch)
        held, order = self._order
        if held != epoch:
            order = np.random.default_rng([self._seed, _EPOCHS, epoch]).permutation(len(self.bags))
            self._order = epoch, order  # in one assignment: other threads are at it, too
        return order[within * self.batch_size :][: self.batch_size]

    def batch(self, step: int) -> Batch:
        """The batch of a global step: a function of (seed, step), cut to this process's slides, in their order."""
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
        """Batches from `start_step` on without end, made ahead in threads."""
        steps = grain.MapDataset.range(start_step, np.iinfo(np.int32).max).map(self.batch)
        options = grain.ReadOptions(num_threads=self._data.threads, prefetch_buffer_size=max(self._data.threads, 1))
        return iter(steps.to_iter_dataset(options))

    def _merges(self, text: TokenisedText, rng: np.random.Generator) -> list[tuple[int, ...]]:
        n, k = len(text.pieces), self._data.subcaptions
        return draw_given(n, k, rng) if text.given else draw_merges(n, k, rng, self._data.merge_sentences)

    def _caption(self, text: TokenisedText, rng: np.random.Generator) -> np.ndarray:
        """The ids of the whole caption, or of a share of its sentences; one with given subcaptions stays whole."""
        if self._data.caption_share == 1 or text.given or not self._tokenizer.concatenates:
            return text.caption
        kept = rng.permutation(len(text.pieces))[: round(self._data.caption_share * len(text.pieces)) or 1]
        return self._tokenizer.wrap(np.concatenate([text.pieces[i] for i in kept]), self._data.caption_length)

    def _subcaption(self, text: TokenisedText, merge: tuple[int, ...], counts: Counter | None = None) -> np.ndarray:
        """The ids of a merge with [CLS] and [SEP]: without its last sentences where it is too long."""
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
        """The texts of a group, packed, and a number for the wording of each subcaption.

        Where texts need too many rows, the longest become single sentences. The number is a hash: other words have
        another one, but for one pair in 2**32.
        """
        counts: Counter[str] = Counter()
        found: list[np.ndarray] = []
        drawn: list[tuple[TokenisedText, tuple[int, ...]] | None] = []  # None: a caption, which stays whole
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
        """Replace the longest subcaption of a group by its shortest sentence, or that by the shortest of the text."""
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
                    _log.warning("%s; counted, and not said again", explanation)
            self.counts.update(counts)
