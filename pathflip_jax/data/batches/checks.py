"""Checks before training for unusable data: texts with unknown words, batches without negatives."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from pathflip_jax.data.batches.bags import Bag, TokenisedText
from pathflip_jax.data.batches.pipeline import Batches
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.tokenizer import TextTokenizer

REPORTED_SHARE = 0.01  # smaller fractions of unknown pieces are not reported
MOST_STEPS = 1000  # batches inspected for negatives
_SENTENCES = 500  # sentences searched for examples of unknown words
_log = logging.getLogger(__name__)


def refuse_unknown_words(bags: Sequence[Bag], tokenizer: TextTokenizer, most: float, table: object) -> None:
    """Raise ValueError if more than a fraction `most` of the texts' word pieces is unknown to the vocabulary."""
    texts = [text for bag in bags for text in bag.texts]
    share = tokenizer.unknown_share(part for text in texts for part in (text.caption[1:-1], *text.pieces))
    if share < REPORTED_SHARE:
        return
    found = (
        f"{table}: {share:.1%} of the word pieces of the texts are unknown to the vocabulary {tokenizer.folder} "
        f"({preview(_unknown_words(texts, tokenizer), 5)})"
    )
    if share > most:
        raise ValueError(
            f"{found}, more than data.max_unknown_share={most:g}: the model would read [UNK] in their place. Name the "
            "BERT folder of the texts' language as --config.data.tokenizer, or train one on these texts with `pathflip "
            f"vocabulary`; --config.data.max_unknown_share={min(share + 0.01, 1):.2f} trains anyway"
        )
    _log.warning("%s", found)


def _unknown_words(texts: Iterable[TokenisedText], tokenizer: TextTokenizer) -> list[str]:
    """Words with an unknown piece, most frequent first."""
    pairs = (pair for text in texts for pair in zip(text.words, text.pieces, strict=True))
    sentences = (sentence for sentence, ids in pairs if tokenizer.unk_id in ids)
    counts = Counter(
        word for sentence, _ in zip(sentences, range(_SENTENCES), strict=False) for word in sentence.split()
    )
    words = [word for word, _ in counts.most_common()]
    return [word for word, ids in zip(words, tokenizer.ids(words), strict=True) if tokenizer.unk_id in ids]


def require_negatives(batches: Batches) -> None:
    """Raise ValueError if no batch can hold two slides that are mutual negatives; report how many do not."""
    useless = "without negatives the model learns nothing"
    if batches.batch_size == 1:
        raise ValueError(
            f"train.batch_size=1: a batch of one slide has no negative, and {useless}; set "
            "--config.train.batch_size to 2 or more (train.accumulate splits a batch to save memory)"
        )
    if not any_unrelated(batches.related):
        raise ValueError(
            f"all {len(batches.related)} training slides ({preview('+'.join(slides) for slides in batches.slides)}) "
            f"are of one case, or have the same caption: no batch has a negative, and {useless}. Train on slides of "
            "several patients, or correct case_id and patient_id in the tables"
        )
    steps = min(batches.steps_per_epoch, MOST_STEPS)
    lone = sum(not any_unrelated(batches.related[batches.chosen(step)]) for step in range(steps))
    if lone:
        _log.warning(
            "%d of the first %d batches hold slides of one case alone, or of one caption: without negatives they "
            "contribute almost nothing to training; a larger train.batch_size makes them rarer",
            lone, steps,
        )  # fmt: skip


def any_unrelated(related: Int[np.ndarray, "n S"]) -> bool:
    """Whether any two of these slides have no id in common (`Batch.related`) and so are mutual negatives."""
    kinds = np.unique(np.sort(related, axis=1), axis=0)
    if not len(kinds) or any((kinds == number).any(axis=1).all() for number in kinds[0]):  # an id common to all
        return False
    return any(not np.isin(kinds, own).any(axis=1).all() for own in kinds)
