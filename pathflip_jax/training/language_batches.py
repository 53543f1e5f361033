"""Batches of the language stage: a pure function of (seed, step), as in alignment (DESIGN section 5).

An epoch is a permutation of all conversations of the mixture, each repeated by its table's weight. The slide of a
conversation is sampled as in alignment, with its regions in stored order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pathflip_jax.data.batches.bags import StoredRegions, regions_of, wanted_slides
from pathflip_jax.data.batches.patches import PatchSampler
from pathflip_jax.data.batches.pipeline import prefetch
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.captions import split_sentences
from pathflip_jax.data.texts.conversations import Conversation, Turn, match_conversations
from pathflip_jax.inference.embedding_files import open_embeddings
from pathflip_jax.llm.prompts import Prompted, encode_conversation, insert_slide
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.runtime.sharding import ONE_PROCESS, Shards
from pathflip_jax.settings.networks import LanguageDataSettings
from pathflip_jax.training.language_objective import LanguageBatch

LENGTH_STEP = 32
_EPOCHS, _STEPS, _ORDERS = 0, 1, 2  # purpose of a random stream: the first word after the seed


class Example(NamedTuple):
    """A tokenised conversation: its tokens in each sentence order used in training, and the regions of its slides."""

    orders: tuple[Prompted, ...]
    regions: StoredRegions


def collect_examples(
    records: Records,
    mixture: Sequence[tuple[Sequence[Conversation], int]],
    tokenizer: DecoderTokenizer,
    template: str,
    slide_ids: Sequence[str] | None,
    sentence_orders: int = 1,
) -> list[Example]:
    """Examples of the slides in `slide_ids` (None = all), those of each table repeated by its weight.

    A report (an answer of several sentences, in a conversation of one turn) is trained on in `sentence_orders` orders
    of its sentences, including the original: otherwise the model memorises the reports of a small cohort.

    Conversations about other slides are omitted; a warning counts those about slides without a record. Raises
    ValueError when none is left.
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
                orders = [conversation, *_other_orders(conversation, sentence_orders - 1)]
                prompted = tuple(encode_conversation(tokenizer, order, template) for order in orders)
                found.append(Example(prompted, regions_of(records, [position[slide] for slide in slides])))
        examples += found * times
    if not examples:
        raise ValueError(
            f"none of the conversations is about any of the {len(wanted)} slides ({preview(sorted(wanted))}); check "
            "their slide and case ids"
        )
    return examples


def unigram_loss(training: Sequence[Example], held_out: Sequence[Example]) -> float:
    """Cross-entropy of held-out response tokens under the token frequencies of training responses, in nats a token.

    It is the loss of a decoder that ignores slide, question and preceding words. Each token counts once more than it
    was seen, so that one that only held-out responses have is not impossible.
    """
    counts = Counter(np.concatenate([_responses(example) for example in training]).tolist())
    tokens = np.concatenate([_responses(example) for example in held_out])
    total = counts.total() + len(counts.keys() | set(tokens.tolist()))
    return float(np.mean([np.log(total / (counts[token] + 1)) for token in tokens.tolist()]))


def _responses(example: Example) -> Int[np.ndarray, "t"]:
    """Response tokens of an example, in its original order of sentences."""
    return example.orders[0].tokens[example.orders[0].response]


def _other_orders(conversation: Conversation, number: int) -> list[Conversation]:
    """The conversation with randomly reordered sentences of its answer; empty for a single sentence."""
    (asked, answer), *more = conversation.turns
    sentences = split_sentences(answer)
    if more or len(sentences) < 2:
        return []
    rng = np.random.default_rng([_ORDERS, *conversation.conversation_id.encode()])
    texts = [" ".join(rng.permutation(sentences)) for _ in range(number)]
    return [conversation._replace(turns=(Turn(asked, text),)) for text in texts]


class EmbeddedSlides:
    """Precomputed slide embeddings (`pathflip embed --regions`): draws rows [slide; regions] instead of patches.

    `found` holds the rows of each slide and of all its regions, by the slide's index in the records.
    """

    def __init__(self, found: Mapping[int, Float[np.ndarray, "n D"]], regions: int) -> None:
        self.regions, self.patch_slots = regions, 0
        self._found = found

    def load(self, bags: Iterable[StoredRegions], on_device: bool = False) -> None:
        """No-op: the embeddings are already in memory."""

    def take_features(self) -> None:
        """No-op: features are not needed."""

    def draw(
        self, bags: Sequence[StoredRegions], rngs: Sequence[np.random.Generator], *, in_order: bool = True
    ) -> tuple[Float[np.ndarray, "B 1+R D"], Bool[np.ndarray, "B 1+R"]]:
        """Rows of the slide and of up to R of its regions, in stored order, and the mask of real rows."""
        width = next(iter(self._found.values())).shape[1]
        rows = np.zeros((len(bags), 1 + self.regions, width), np.float32)
        mask = np.zeros(rows.shape[:2], bool)
        for b, (bag, rng) in enumerate(zip(bags, rngs, strict=True)):
            own = self._found[int(bag.record[0])]
            chosen = np.sort(rng.permutation(len(own) - 1)[: self.regions])
            rows[b, 0], rows[b, 1 : 1 + len(chosen)] = own[0], own[1 + chosen]
            mask[b, : 1 + len(chosen)] = True
        return rows, mask


def read_embeddings(path: str | Path, records: Records, examples: Sequence[Example], run: str, run_hash: str):
    """Rows of the examples' slides, by index in the records, from a file of `pathflip embed --regions`.

    Raises ValueError for a file of a run other than the aligner, a file without regions or lacking a slide, and for
    examples about several slides, which the file embeds individually.
    """
    table, about = open_embeddings(path)
    if about.get("checkpoint_hash") != run_hash:
        raise ValueError(
            f"{path}: its embeddings are from the run {about.get('checkpoint')}, expected the current weights of "
            f"{run}; embed again"
        )
    if not about.get("regions"):
        raise ValueError(f"{path}: contains no region embeddings; embed with --regions")
    several = sum(len(set(example.regions.record.tolist())) > 1 for example in examples)
    if several:
        raise ValueError(
            f"{path}: {several} conversations are about several slides together, but each slide was embedded on its "
            "own; leave data.embeddings unset, so that the slides of a conversation are embedded together"
        )
    at = {slide: row for row, slide in enumerate(table["slide_id"].to_pylist())}
    places = sorted({int(example.regions.record[0]) for example in examples})
    names = [records.slides[place].slide_id for place in places]
    missing = [name for name in names if name not in at]
    if missing:
        raise ValueError(f"{path}: {len(missing)} slides are missing from it ({preview(missing)}); embed them too")
    found = {}
    for place, name in zip(places, names, strict=True):
        row = table.slice(at[name], 1)
        own = np.array(row["embedding"][0].as_py(), np.float32)
        regions = row["regions"].combine_chunks().flatten().flatten().to_numpy().reshape(-1, len(own))
        found[place] = np.concatenate([own[None], regions])
    return found


def _sequence_length(examples: Sequence[Example], regions: int, given: int, most_positions: int | None) -> int:
    """Sequence length in tokens: as given, or that of the longest example including its slide's region tokens."""
    tokens = [max(len(order.tokens) for order in example.orders) for example in examples]
    shown = [min(regions, len(example.regions.count)) for example in examples]
    needed = [sum(pair) for pair in zip(tokens, shown, strict=True)]  # IMAGE_ID is already one of the 1 + R
    longest = -(-max(needed) // LENGTH_STEP) * LENGTH_STEP
    length = given or (min(longest, most_positions) if most_positions else longest)
    if max(needed) > length:
        over = sum(n > length for n in needed)
        raise ValueError(
            f"{over} of {len(examples)} conversations are longer than {length} tokens with the regions of their slide, "
            f"the longest by {max(needed) - length} tokens; set --config.data.length={longest} (the decoder has "
            f"{most_positions or 'any number of'} positions), set fewer --config.data.regions, or remove these "
            "conversations"
        )
    return length


class LanguageBatches:
    """Batches of a run; `batch(step)` may be called in any order, from any thread.

    `slides` samples the input of a slide. If `data.length` is 0, sequences are as long as the longest example, at most
    `most_positions`. A fraction `no_slide_share` of the examples omits the slide, so that the same model learns a
    text-only baseline for its scores. Without a `seed`, for validation, examples come in order, and the last batch of
    an epoch is padded with examples without response tokens. Raises ValueError for an example longer than `length`, and
    for sizes that do not divide.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        slides: PatchSampler | EmbeddedSlides,
        data: LanguageDataSettings,
        batch_size: int,
        *,
        seed: int | None = 0,
        shards: Shards = ONE_PROCESS,
        most_positions: int | None = None,
    ) -> None:
        if batch_size % shards.count:
            raise ValueError(
                f"batch_size {batch_size}: expected a multiple of the {shards.count} devices that share a batch"
            )
        fill = seed is None
        if len(examples) < batch_size and not fill:
            raise ValueError(
                f"{len(examples)} conversations are too few for a batch of {batch_size}; lower train.batch_size"
            )
        self.length = _sequence_length(examples, slides.regions, data.length, most_positions)
        self.steps_per_epoch = -(-len(examples) // batch_size) if fill else len(examples) // batch_size
        self.batch_size = batch_size
        self._examples, self._slides, self._data, self._seed, self._fill = examples, slides, data, seed or 0, fill
        self._places = shards.rows(batch_size)

    @property
    def patch_slots(self) -> int:
        """Patch slots per region of a batch; 0 with precomputed embeddings."""
        return self._slides.patch_slots

    def slides_of_examples(self, records: Records) -> list[tuple[str, ...]]:
        """Slides of each example."""
        places = [dict.fromkeys(example.regions.record.tolist()) for example in self._examples]
        return [tuple(records.slides[place].slide_id for place in own) for own in places]

    def load(self, on_device: bool = False) -> None:
        """Read the features of all slides into memory."""
        self._slides.load((example.regions for example in self._examples), on_device)

    def take_features(self) -> np.ndarray | None:
        """See `data.batches.pipeline.Batches.take_features`."""
        return self._slides.take_features()

    def batch(self, step: int) -> LanguageBatch:
        """Batch of a global step, a function of (seed, step), restricted to this process's sequences."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.arange(len(self._examples))
        if not self._fill:
            order = np.random.default_rng([self._seed, _EPOCHS, epoch]).permutation(len(order))
        chosen = np.resize(order[within * self.batch_size :][: self.batch_size], self.batch_size)
        real = self._places + within * self.batch_size < len(order)
        examples = [self._examples[i] for i in chosen[self._places]]
        rngs = [np.random.default_rng([self._seed, _STEPS, step, place]) for place in self._places]
        patches, patch_mask = self._slides.draw([e.regions for e in examples], rngs, in_order=True)
        shown = 1 + patch_mask.any(-1).sum(1) if patch_mask.ndim == 3 else patch_mask.sum(1)
        rows = [0 if rng.random() < self._data.no_slide_share else n for rng, n in zip(rngs, shown, strict=True)]
        tokens = np.zeros((len(examples), self.length), np.int32)
        mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        for b, (example, n, teaches) in enumerate(zip(examples, rows, real, strict=True)):
            order = example.orders[0 if self._fill else rngs[b].integers(len(example.orders))]
            found = insert_slide(order, int(n))
            size = len(found.tokens)
            tokens[b, :size], mask[b, :size], response[b, :size] = found.tokens, True, found.response & teaches
        return LanguageBatch(patches, patch_mask, tokens, mask, response)

    def __iter__(self, start_step: int = 0) -> Iterator[LanguageBatch]:
        """Endless batches from `start_step` on, prefetched in threads."""
        return prefetch(self.batch, start_step, self._data.threads)
