"""Data of a run from its settings: batches of both splits, and facts that identify the data on resume.

Training and validation draw from the same records and texts; the slide table assigns slides to splits.
"""

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pathflip_jax.data.batches.checks import any_unrelated, refuse_unknown_words
from pathflip_jax.data.batches.pipeline import Batches, BatchSize, Cohort, make_batches
from pathflip_jax.data.records.manifest import CUT
from pathflip_jax.data.records.records import Records, manifest_hash
from pathflip_jax.data.records.splits import NO_VALIDATION, SlideTable, count_splits, describe, read_matched_table
from pathflip_jax.data.storage.files import Place, as_path, read_bytes
from pathflip_jax.data.texts.cases import Sources
from pathflip_jax.data.texts.split_files import one_fold
from pathflip_jax.data.texts.text import read_texts
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.runtime.sharding import ONE_PROCESS, Shards
from pathflip_jax.settings.kinds import AlignmentSettings
from pathflip_jax.settings.sections import AlignmentDataSettings, DataSettings
from pathflip_jax.training import fingerprints

COUNTS = "splits"  # key of the split counts among the facts
SLIDES_PER_TEXT_GROUP = (16, 8, 4, 2, 1)
_log = logging.getLogger(__name__)


class RunData(NamedTuple):
    """Batches of a run, its tokenizer, and the facts that config.json records about the data."""

    train: Batches
    validation: Batches | None
    tokenizer: TextTokenizer
    facts: dict


def open_data(settings: AlignmentSettings, shards: Shards = ONE_PROCESS, begun_groups: int = 0) -> RunData:
    """Open records, texts and tokenizer, split the slides, and make the batches of training and validation.

    A run that began with `begun_groups` text groups keeps them if they divide over the devices, so that dropout in
    texts, which is drawn for packed rows, stays the same. Validation is the same on any number of devices.
    """
    data, setup = settings.data, settings.train
    records, texts, tokenizer = Records(data.records), read_texts(data.texts), TextTokenizer(data.tokenizer)
    if settings.model.bert:
        _require_same_vocabulary(Path(settings.model.bert), tokenizer)
    split = split_slides(data, records, begun=begun_groups > 0)
    sources = Sources(split.table.rows if split.table else {}, str(data.slides), str(data.records), str(data.texts))
    cohort = Cohort(records, texts, tokenizer, split.training, sources)
    pieces = shards.count * setup.accumulate
    groups = data.text_groups or _groups_to_resume_with(begun_groups, setup.batch_size, pieces)
    size = BatchSize(setup.batch_size, groups)
    training = make_batches(cohort, data, size, seed=setup.seed, shards=shards)
    refuse_unknown_words(training.bags, tokenizer, data.max_unknown_share, data.texts)
    validation = None
    if split.validation:
        held_out = cohort._replace(slide_ids=split.validation)
        plain = replace(data, patch_slots=training.patch_slots, text_rows=(), caption_share=1.0)
        validation = _validation_batches(held_out, plain, setup.batch_size, shards)
    facts = _facts(data, records, training.patch_slots) | {"text_groups": groups}
    means = {"texts": fingerprints.slide_texts(texts), "tokenizer": fingerprints.tokenizer(tokenizer.described)}
    table = {"slides": fingerprints.slide_rows(split.table.rows.values())} if split.table else {}
    facts[fingerprints.MEANINGS] = means | table
    slides = [[bag.slides for bag in one.bags for _ in bag.texts] if one else None for one in (training, validation)]
    facts[COUNTS] = count_slides(data, records, split, slides)
    return RunData(training, validation, tokenizer, facts)


def _validation_batches(cohort: Cohort, data: AlignmentDataSettings, most: int, shards: Shards) -> Batches:
    """All slides of a cohort in the fewest equal batches of up to `most`, padded for the devices."""
    # Not every slide has a text: the number of usable slides is known only once batches exist.
    batches = make_batches(cohort, data, BatchSize(1, shards.count, shards.count - 1), shards=shards)
    size = even_size(len(batches.slides), most)
    padding = -size % shards.count
    batches.resize(BatchSize(size, choose_groups(size + padding, shards.count), padding))
    if not any_unrelated(batches.related):
        _log.warning(
            "validation: all %d slides share one case or one caption, so there are no negatives, and retrieval among "
            "them is always correct; use slides of several patients",
            len(batches.slides),
        )  # fmt: skip
    return batches


class SplitSlides(NamedTuple):
    """Slide table, if there is one, with the training slides (None: all) and the validation slides."""

    table: SlideTable | None
    training: list[str] | None
    validation: list[str]


def split_slides(data: DataSettings, records: Records, begun: bool = False) -> SplitSlides:
    """Split of the records' slides by the slide table; without one every slide is for training.

    Inexact matches are logged. Raises ValueError for a split without slides; a run that `begun` without validation,
    when that was not an error, continues without.
    """
    validates = (data.val_split or "").lower() not in NO_VALIDATION
    if not data.slides:
        return SplitSlides(None, None, [])
    table, notes = read_matched_table(one_fold(data.slides, data.fold), data.records, records)
    for note in notes:
        _log.warning("%s", note)
    training = table.require(data.split, "name another with --config.data.split")
    if not validates or (begun and not table.slides(data.val_split)):
        return SplitSlides(table, training, [])
    if data.val_split == data.split:
        _log.warning(
            "data.val_split=%s is the training split: its scores do not estimate performance on new slides", data.split
        )
    cure = "name another with --config.data.val_split; --config.data.val_split= trains without validation"
    return SplitSlides(table, training, table.require(data.val_split, cure))


def count_slides(data: DataSettings, records: Records, split: SplitSlides, texts: Sequence[list | None]) -> dict:
    """Counts of each split; `texts` are the slides of each text of training and of validation."""
    names = (data.split if split.table else "all", data.val_split)
    given = {name: own for name, own in zip(names, texts, strict=True) if own is not None}
    return count_splits(split.table, records, given)


def report_counts(facts: Mapping[str, Any], validates: bool) -> None:
    """Report the sizes of the training and validation splits on stderr, once for all processes."""
    if jax.process_index() == 0:
        print(describe(facts[COUNTS], validates), file=sys.stderr)


def _require_same_vocabulary(bert: Path, tokenizer: TextTokenizer) -> None:
    """Raise ValueError for a different vocabulary: a truncated word table would load, with all words mismatched."""
    named = any((bert / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    if named and bert.resolve() != tokenizer.folder.resolve():
        words = TextTokenizer(bert).vocab_size
        if words != tokenizer.vocab_size:
            raise ValueError(
                f"{bert}: the weights of config.model.bert have a vocabulary of {words} words, but "
                f"config.data.tokenizer={tokenizer.folder} has {tokenizer.vocab_size}; name the same folder for both"
            )


def _facts(data: AlignmentDataSettings, records: Records, patch_slots: int) -> dict:
    """Facts about the data for later readers of the run, with hashes that detect changes."""
    files = {name: [as_path(path)] for name in ("texts", "slides") if (path := getattr(data, name))}
    files["tokenizer"] = [
        path for name in ("vocab.txt", "tokenizer.json") for path in as_path(data.tokenizer).glob(name)
    ]
    hashes = {name: _hash(paths) for name, paths in files.items()}
    facts = {"encoder": records.encoder, "feature_dim": records.feature_dim, "patch_slots": patch_slots}
    return facts | record_facts(records) | {"hashes": hashes | {"records": manifest_hash(records)}}


def record_facts(records: Records) -> dict:
    """Region cut and recipe, if known, of records, for the facts of a run. FileNotFoundError for unfinished records."""
    if records.manifest is None:
        raise FileNotFoundError(
            f"{records.where}/manifest.json: no such file, so the records are not finished; run the command that "
            "writes them again"
        )
    recipe = {"recipe": records.recipe.to_dict()} if records.recipe else {}
    return {name: records.manifest.facts[name] for name in CUT} | recipe


def choose_groups(batch_size: int, pieces: int) -> int:
    """Number of text groups per batch, such that every device has whole groups of every microbatch.

    Sixteen slides per group if possible: larger groups pack more tightly, smaller ones shard over more devices. Raises
    ValueError if the batch does not divide.
    """
    for slides in SLIDES_PER_TEXT_GROUP:
        if batch_size % slides == 0 and batch_size // slides % pieces == 0:
            return batch_size // slides
    raise ValueError(
        f"a batch of {batch_size} slides cannot be divided evenly into {pieces} parts (devices x train.accumulate); "
        f"set --config.train.batch_size to a multiple of {pieces}"
    )


def _groups_to_resume_with(begun: int, batch_size: int, pieces: int) -> int:
    """Number of text groups that a run began with, if they divide; else that of a new run on these devices."""
    if begun and batch_size % begun == 0 and begun % pieces == 0:
        return begun
    groups = choose_groups(batch_size, pieces)
    if begun and jax.process_index() == 0:
        print(
            f"the run began with {begun} text groups, which cannot be divided into {pieces} parts (devices x "
            f"train.accumulate); it resumes with {groups}: the batches stay the same, dropout in texts changes",
            file=sys.stderr,
        )
    return groups


def even_size(slides: int, most: int) -> int:
    """Batch size up to `most` that divides all slides into the fewest equal batches.

    Batches of exactly `most` slides would omit up to `most` - 1 slides, a large part of a small validation split.
    """
    return slides // -(-slides // most)


def _hash(paths: list[Place]) -> str:
    return hashlib.sha256(b"".join(read_bytes(path) for path in paths)).hexdigest()
