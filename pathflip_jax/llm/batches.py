"""Batches of the language stage: a pure function of (seed, step), as those of alignment (DESIGN section 5).

An epoch is a permutation of all conversations of the mixture, each as often as its table says. The slide of a
conversation is drawn as for alignment, its regions in the order in which they are stored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from pathflip_jax.data.bags import Regions, regions_of, wanted_slides
from pathflip_jax.data.conversations import Conversation, match_conversations
from pathflip_jax.data.patches import PatchSampler
from pathflip_jax.data.records import Records
from pathflip_jax.data.text import some
from pathflip_jax.llm.adapter import LanguageBatch
from pathflip_jax.llm.prompts import Prompted, encode_conversation, insert_slide
from pathflip_jax.llm.tokenizer import DecoderTokenizer

LENGTH_STEP = 64
_EPOCHS, _STEPS = 0, 1  # what a random stream is for; the first word after the seed


class Example(NamedTuple):
    """A conversation ready to draw: its tokens, and the regions of its slides."""

    prompted: Prompted
    regions: Regions


def collect_examples(
    records: Records,
    mixture: Sequence[tuple[Sequence[Conversation], int]],
    tokenizer: DecoderTokenizer,
    template: str,
    slide_ids: Sequence[str] | None,
) -> list[Example]:
    """The examples of the slides in `slide_ids` (None = all): those of each table as often as it is to be seen.

    Conversations about other slides are left out, those about a slide of which there is no record with a warning that
    counts them. Raises ValueError when none is left.
    """
    infos = records.slides
    position = {info.slide_id: i for i, info in enumerate(infos)}
    wanted = wanted_slides(records, slide_ids)
    ids, cases = [info.slide_id for info in infos], [info.case_id for info in infos]
    examples: list[Example] = []
    for conversations, times in mixture:
        found = []
        for conversation in match_conversations(conversations, ids, cases):
            slides = sorted(wanted.intersection(conversation.slide_ids), key=position.get)
            if slides:
                prompted = encode_conversation(tokenizer, conversation, template)
                found.append(Example(prompted, regions_of(records, [position[slide] for slide in slides])))
        examples += found * times
    if not examples:
        raise ValueError(f"none of the conversations is about one of the {len(wanted)} slides ({some(sorted(wanted))})")
    return examples


class LanguageBatches:
    """The batches of a run; `batch(step)` can be asked in any order, from any thread.

    `length` None takes what the longest example needs. A `no_slide_share` of the examples is shown without its slide,
    so that the same model learns what can be said without one: the baseline of its scores. Of `shards` even parts of a
    batch this process makes its `own_shards`. With `fill`, the last batch of an epoch is filled up with examples that
    teach nothing, and the order is that of the examples: for validation. Raises ValueError for an example longer than
    `length`, and for sizes that do not divide.
    """

    def __init__(
        self,
        records: Records,
        examples: Sequence[Example],
        *,
        batch_size: int,
        regions: int,
        patch_slots: int | None = None,
        length: int | None = None,
        most_positions: int | None = None,
        no_slide_share: float = 0.0,
        seed: int = 0,
        shards: int = 1,
        own_shards: Sequence[int] | None = None,
        threads: int = 4,
        fill: bool = False,
    ) -> None:
        if batch_size % shards:
            raise ValueError(f"batch_size {batch_size}: expected a multiple of the {shards} devices that share a batch")
        if not 0 <= no_slide_share < 1:
            raise ValueError(f"no_slide_share {no_slide_share}: expected a share of at least 0 and below 1")
        if len(examples) < batch_size and not fill:
            raise ValueError(f"{len(examples)} conversations make no batch of {batch_size}; lower train.batch_size")
        needed = [len(e.prompted.tokens) + min(regions, len(e.regions.count)) for e in examples]  # 1 + R for 1 token
        longest = -(-max(needed) // LENGTH_STEP) * LENGTH_STEP
        self.length = length or (min(longest, most_positions) if most_positions else longest)
        if max(needed) > self.length:
            over = sum(n > self.length for n in needed)
            raise ValueError(
                f"{over} of {len(examples)} conversations are longer than {self.length} tokens with their slide, the "
                f"longest by {max(needed) - self.length}; set --config.data.length={longest} (the decoder has "
                f"{most_positions or 'any number of'} positions), fewer --config.data.regions, or take them out"
            )
        self.steps_per_epoch = -(-len(examples) // batch_size) if fill else len(examples) // batch_size
        self.batch_size = batch_size
        self._examples, self._seed, self._share, self._fill = examples, seed, no_slide_share, fill
        places = np.arange(batch_size).reshape(shards, -1)
        self._places = places[list(range(shards) if own_shards is None else own_shards)].ravel()
        self._threads, self._regions = threads, regions
        widest = max(int(example.regions.count.max()) for example in examples)
        self._patches = PatchSampler(records, regions, patch_slots or widest, threads)

    @property
    def patch_slots(self) -> int:
        """The patches of a region that a batch has room for."""
        return self._patches.patch_slots

    def load(self, on_device: bool = False) -> None:
        """Read the features of all slides into memory."""
        self._patches.load((example.regions for example in self._examples), on_device)

    def take_features(self) -> np.ndarray | None:
        """As `data.pipeline.Batches.take_features`."""
        return self._patches.take_features()

    def batch(self, step: int) -> LanguageBatch:
        """The batch of a global step: a function of (seed, step), cut to this process's sequences."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.arange(len(self._examples))
        if not self._fill:
            order = np.random.default_rng([self._seed, _EPOCHS, epoch]).permutation(len(order))
        chosen = np.resize(order[within * self.batch_size :][: self.batch_size], self.batch_size)
        real = self._places + within * self.batch_size < len(order)
        examples = [self._examples[i] for i in chosen[self._places]]
        rngs = [np.random.default_rng([self._seed, _STEPS, step, place]) for place in self._places]
        patches, patch_mask = self._patches.draw([e.regions for e in examples], rngs, in_order=True)
        shown = patch_mask.any(-1).sum(1)
        rows = [0 if rng.random() < self._share else 1 + n for rng, n in zip(rngs, shown, strict=True)]
        tokens = np.zeros((len(examples), self.length), np.int32)
        mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        for b, (example, n, teaches) in enumerate(zip(examples, rows, real, strict=True)):
            found = insert_slide(example.prompted, int(n))
            size = len(found.tokens)
            tokens[b, :size], mask[b, :size], response[b, :size] = found.tokens, True, found.response & teaches
        return LanguageBatch(patches, patch_mask, tokens, mask, response)

    def __iter__(self, start_step: int = 0) -> Iterator[LanguageBatch]:
        """Batches from `start_step` on without end, made ahead in threads."""
        steps = grain.MapDataset.range(start_step, np.iinfo(np.int32).max).map(self.batch)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(self._threads, 1))
        return iter(steps.to_iter_dataset(options))
