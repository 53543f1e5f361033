"""Bags: slides of a cohort with their texts, tokenised once, for sampling in training (DESIGN section 5).

A bag is a slide, or the slides of a case that share one text: their regions count as one slide's. Bags of one case
share a case id, and those with the same caption an id for it, so that the losses do not treat them as each other's
negatives.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.captions import plain, split_sentences
from pathflip_jax.data.texts.cases import NO_TABLE, Sources, bag_keys, slides_of_case
from pathflip_jax.data.texts.identity import connected, patient_keys
from pathflip_jax.data.texts.text import SlideText, match_texts
from pathflip_jax.data.texts.tokenizer import TextTokenizer

_AT_ONCE = 4096  # texts
_log = logging.getLogger(__name__)


class SentenceTokens(Sequence[np.ndarray]):
    """Token ids of a text's sentences, concatenated in one array: separate small arrays would be mostly headers."""

    __slots__ = ("_ids", "_ends")

    def __init__(self, pieces: Sequence[np.ndarray]) -> None:
        self._ids = np.concatenate([np.zeros(0, np.int32), *pieces])
        self._ends = np.cumsum([0, *map(len, pieces)], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        number = range(len(self))[number]  # IndexError out of range
        return self._ids[self._ends[number] : self._ends[number + 1]]

    @property
    def shortest(self) -> int:
        """Length of the shortest sentence."""
        return int(np.diff(self._ends).min())


class TokenisedText(NamedTuple):
    """A tokenised text for sampling: the ids of the caption, and of its sentences or its given subcaptions.

    `caption` includes [CLS] and [SEP], `pieces` do not, so that merging them is concatenation. `written` is the text
    itself.
    """

    caption: np.ndarray
    pieces: SentenceTokens
    written: SlideText

    @property
    def words(self) -> list[str]:
        """Sentences, or subcaptions given with the caption, whose ids are `pieces`; split again on each access."""
        return _sentences(self.written)

    @property
    def given(self) -> bool:
        """Whether subcaptions came with the caption."""
        return bool(self.written.subcaptions)


def _sentences(text: SlideText) -> list[str]:
    return list(text.subcaptions or split_sentences(text.caption))


class StoredRegions(NamedTuple):
    """Regions of the slides of a bag: their location in the records and their patch counts."""

    record: np.ndarray  # [regions] index of the region's slide in the records
    region: np.ndarray  # [regions] index of the region in that slide
    start: np.ndarray  # [regions] index of its first patch in that slide
    count: np.ndarray  # [regions] number of its patches


class Bag(NamedTuple):
    """Slides that are sampled as one, with their texts; `places` are the slides' indices in the records.

    `related` holds ids of the case and of captions that bags of other cases share: bags with an id in common are not
    negatives of each other.
    """

    slides: tuple[str, ...]
    related: tuple[int, ...]
    texts: list[TokenisedText]
    places: tuple[int, ...]


def regions_of(records: Records, places: Sequence[int]) -> StoredRegions:
    """Regions of the slides at these indices of the records, slide by slide."""
    rows = [np.asarray(records.slides[i].region_rows) for i in places]
    return StoredRegions(
        np.repeat(places, [len(row) - 1 for row in rows]),
        np.concatenate([np.arange(len(row) - 1) for row in rows]),
        np.concatenate([row[:-1] for row in rows]),
        np.concatenate([np.diff(row) for row in rows]),
    )


def wanted_slides(records: Records, slide_ids: Sequence[str] | None) -> set[str]:
    """Slides to sample from: these, or all of the records. ValueError for one without a record or without patches."""
    patches = dict(zip(records.slides.column("slide_id"), records.slides.column("num_patches"), strict=True))
    wanted = set(patches) if slide_ids is None else set(slide_ids)
    missing = sorted(wanted - set(patches))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} slides have no record ({preview(missing)}); the records hold "
            f"{preview(patches)}; prepare or import them, or remove them from the slide table"
        )
    empty = sorted(slide for slide in wanted if patches[slide] == 0)
    if empty:
        raise ValueError(f"{len(empty)} slides have no patches ({preview(empty)}); remove them from the slide table")
    return wanted


def collect_bags(
    records: Records,
    texts: Sequence[SlideText],
    tokenizer: TextTokenizer,
    slide_ids: Sequence[str] | None,
    caption_length: int,
    subcaption_length: int,
    sources: Sources = NO_TABLE,
) -> list[Bag]:
    """Bags of the slides in `slide_ids` (None = all), in the order of the records.

    Records and texts assign slides to cases and patients, as does the slide table of `sources`. Slides without a text
    are omitted, with a warning that counts them. Raises ValueError for slides without a record or without patches, when
    no slide has a text, and if two of the sources assign a slide to different patients.
    """
    infos = records.slides
    position = {info.slide_id: i for i, info in enumerate(infos)}
    wanted = wanted_slides(records, slide_ids)
    grouped: dict[tuple[str, ...], list[SlideText]] = {}
    of_case = slides_of_case(sources.rows.values())
    texts = [text if text.slide_ids else replace(text, slide_ids=of_case(text.case_id)) for text in texts]
    for text in match_texts(texts, [info.slide_id for info in infos], [info.case_id for info in infos]):
        slides = tuple(sorted(wanted.intersection(text.slide_ids), key=position.get))
        if slides:
            grouped.setdefault(slides, []).append(text)
    if not grouped:
        raise ValueError(
            f"none of the {len(wanted)} slides ({preview(sorted(wanted))}) has a text; check that the text table names "
            "these slides or their cases"
        )
    silent = sorted(wanted.difference(*grouped))
    if silent and slide_ids is not None:  # otherwise matching has reported it
        _log.warning("%d of %d slides have no text and are left out (%s)", len(silent), len(wanted), preview(silent))
    members = sorted(grouped, key=lambda slides: [position[slide] for slide in slides])
    cases = _cases(members, grouped, {info.slide_id: info.case_id for info in infos}, sources)
    captions = _shared_captions(members, grouped, cases)
    flat = [text for slides in members for text in grouped[slides]]
    ready = iter(_tokenise(flat, tokenizer, caption_length, subcaption_length))
    bags = []
    for slides, case, shared in zip(members, cases, captions, strict=True):
        places = tuple(position[slide] for slide in slides)
        bags.append(Bag(slides, (case, *shared), [next(ready) for _ in grouped[slides]], places))
    return bags


def _cases(members, grouped, case_of: Mapping[str, str], sources: Sources = NO_TABLE) -> list[int]:
    """Case id of each bag, equal for bags that share a slide, a case or a patient by any source.

    Two bags may be linked to one patient through a slide of the table that is in neither.
    """
    table = [patient_keys(row["slide_id"], row["case_id"], row["patient_id"]) for row in sources.rows.values()]
    return connected([*bag_keys(members, grouped, case_of, sources), *table])[: len(members)]


def _shared_captions(members, grouped, cases: Sequence[int]) -> list[list[int]]:
    """Ids, for each bag and above those of cases, of its captions that a bag of another case shares."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for number, slides in enumerate(members):
        for caption in dict.fromkeys(plain(text.caption) for text in grouped[slides]):
            holders[caption].append(number)
    shared = {caption: bags for caption, bags in holders.items() if len({cases[bag] for bag in bags}) > 1}
    found: list[list[int]] = [[] for _ in members]
    for number, bags in enumerate(shared.values(), max(cases) + 1):
        for bag in bags:
            found[bag].append(number)
    if shared:
        most_frequent = max(shared, key=lambda caption: len(shared[caption]))
        _log.warning(
            "%d captions occur verbatim in several cases (%d of %d slides; %d have %r): these slides are not negatives "
            "of each other",
            len(shared), sum(map(bool, found)), len(members), len(shared[most_frequent]), most_frequent[:60],
        )  # fmt: skip
    return found


def _tokenise(
    texts: Sequence[SlideText], tokenizer: TextTokenizer, caption_length: int, subcaption_length: int
) -> list[TokenisedText]:
    """Tokenise every text once, and report once how many captions and sentences are too long."""
    found: list[TokenisedText] = []
    long = {"captions": _TooLong(caption_length), "sentences": _TooLong(subcaption_length)}
    for start in range(0, len(texts), _AT_ONCE):  # bounds the temporary memory
        part = texts[start : start + _AT_ONCE]
        captions, words = tokenizer.ids([text.caption for text in part]), [_sentences(text) for text in part]
        pieces = tokenizer.ids([sentence for sentences in words for sentence in sentences])
        long["captions"].count(captions)
        long["sentences"].count(pieces)
        upcoming = iter(pieces)
        for text, caption, sentences in zip(part, captions, words, strict=True):
            own = SentenceTokens([next(upcoming) for _ in sentences])
            found.append(TokenisedText(tokenizer.wrap(caption, caption_length), own, text))
    for what, seen in long.items():
        if seen.over:
            _log.warning(
                "%d of %d %s are longer than %d tokens (the longest has %d) and are truncated",
                seen.over, seen.total, what, seen.most, seen.longest,
            )  # fmt: skip
    return found


@dataclass
class _TooLong:
    """Counter of texts with more than `most` tokens, including [CLS] and [SEP]."""

    most: int
    over: int = 0
    total: int = 0
    longest: int = 0

    def count(self, texts: Sequence[np.ndarray]) -> None:
        lengths = [len(ids) + 2 for ids in texts]
        self.over += sum(length > self.most for length in lengths)
        self.total += len(lengths)
        self.longest = max(self.longest, *lengths, 0)
