"""The data of a run, as its config says: batches of both splits, and facts that tell whether data are the same.

Training and validation draw from the same records and texts; the slide table says which slide is for which.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from pathflip_jax import fingerprints
from pathflip_jax.data.cases import Sources
from pathflip_jax.data.checks import any_unrelated, refuse_unknown_words
from pathflip_jax.data.pipeline import Batches, make_batches
from pathflip_jax.data.records import Records, manifest_hash
from pathflip_jax.data.storage import Place, as_path, read_bytes
from pathflip_jax.data.text import match_rows, read_slide_table, read_texts
from pathflip_jax.data.tokens import TextTokenizer

SLIDES_PER_TEXT_GROUP = (16, 8, 4, 2, 1)
_log = logging.getLogger(__name__)


class RunData(NamedTuple):
    """The batches of a run, the tokenizer of its texts, and what the config shall record of them."""

    train: Batches
    validation: Batches | None
    tokenizer: TextTokenizer
    facts: dict


def open_data(
    config: ConfigDict, shards: int = 1, own_shards: Sequence[int] | None = None, begun_groups: int = 0
) -> RunData:
    """Open records, texts and tokenizer, split the slides, and make the batches of training and validation.

    `shards` and `own_shards` as in `make_batches`. A run that began with `begun_groups` text groups keeps them where
    `shards` devices can share them out: dropout in texts is drawn for packed rows, so it stays the same. Validation is
    the same on any number of devices.
    """
    data = config.data
    records, texts, tokenizer = Records(data.records), read_texts(data.texts), TextTokenizer(data.tokenizer)
    if config.model.bert:
        _refuse_other_words(Path(config.model.bert), tokenizer)
    ids = {data.split: None, data.val_split: []}  # without a table, every slide trains
    rows: dict[str, dict[str, str]] = {}
    if data.slides:
        rows = rows_of_slides(data.slides, records)
        ids = slides_of_splits(rows, (data.split, data.val_split), data.slides, data.records)
    sources = Sources(rows, str(data.slides), str(data.records), str(data.texts))

    def batches(slide_ids: list[str] | None, batch_size: int, groups: int, seed: int, **more):
        names = ("regions", "subcaptions", "merge_sentences", "caption_length", "subcaption_length", "row_step")
        names += ("threads", "resident")
        return make_batches(
            records,
            texts,
            tokenizer,
            batch_size=batch_size,
            text_groups=groups,
            seed=seed,
            slide_ids=slide_ids,
            shards=shards,
            own_shards=own_shards,
            sources=sources,
            **({name: data[name] for name in names} | more),
        )

    size, slots = config.train.batch_size, data.patch_slots or None
    groups = data.text_groups or _groups_to_go_on_with(begun_groups, size, shards * config.train.accumulate)
    more = {"patch_slots": slots, "text_rows": tuple(data.text_rows) or None, "caption_share": data.caption_share}
    training = batches(ids[data.split], size, groups, config.train.seed, **more)
    refuse_unknown_words(training.bags, tokenizer, data.max_unknown_share, data.texts)
    validation = None
    if ids[data.val_split]:  # not every slide has a text: how many can be drawn from is known only then
        slots = {"patch_slots": training.patch_slots}
        validation = batches(ids[data.val_split], 1, shards, 0, padding=shards - 1, **slots)
        size = even_size(len(validation.slides), size)
        padding = -size % shards
        validation.resize(size, choose_groups(size + padding, shards), padding)
        if not any_unrelated(validation.related):
            _log.warning(
                "validation: its %d slides are all of one case, or of one caption, so that none is another's rival and "
                "retrieval among them is right whatever the model says; take slides of several patients",
                len(validation.slides),
            )  # fmt: skip
    facts = _facts(data, records, training.patch_slots) | {"text_groups": groups}
    means = {"texts": fingerprints.slide_texts(texts), "tokenizer": fingerprints.tokenizer(tokenizer.described)}
    facts[fingerprints.MEANINGS] = means | ({"slides": fingerprints.slide_rows(rows.values())} if data.slides else {})
    return RunData(training, validation, tokenizer, facts)


def rows_of_slides(table: str, records: Records) -> dict[str, dict[str, str]]:
    """The rows of a slide table by the slide of the records that each means; what matches otherwise is logged."""
    rows, notes = match_rows(read_slide_table(table), [slide.slide_id for slide in records.slides], table)
    for note in notes:
        _log.warning("%s", note)
    return rows


def slides_of_splits(
    rows: Mapping[str, Mapping[str, str]], splits: tuple[str, str], table: str, name: str
) -> dict[str, list[str]]:
    """The slides of each split that the records (called `name`) hold. ValueError where the first split has none."""
    ids = {split: [slide for slide, row in rows.items() if row["split"] == split] for split in splits}
    if not ids[splits[0]]:
        raise ValueError(
            f"{table}: no slide of split {splits[0]!r} is in {name}; check the columns slide_id and split, or name "
            "another with --config.data.split"
        )
    return ids


def _refuse_other_words(bert: Path, tokenizer: TextTokenizer) -> None:
    """Weights for a larger vocabulary would fit when their table is cut, and every word would mean another."""
    named = any((bert / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    if named and bert.resolve() != tokenizer.folder.resolve():
        words = TextTokenizer(bert).vocab_size
        if words != tokenizer.vocab_size:
            raise ValueError(
                f"{bert}: the weights of config.model.bert are for a vocabulary of {words} words, config.data.tokenizer"
                f"={tokenizer.folder} has {tokenizer.vocab_size}; name one folder for both"
            )


def _facts(data: ConfigDict, records: Records, patch_slots: int) -> dict:
    """What a later reader of the run must know of its data, and hashes that tell whether it is still the same."""
    manifest = read_manifest(data.records)
    files = {name: [as_path(data[name])] for name in ("texts", "slides") if data[name]}
    files["tokenizer"] = [
        path for name in ("vocab.txt", "tokenizer.json") for path in as_path(data.tokenizer).glob(name)
    ]
    hashes = {name: _hash(paths) for name, paths in files.items()}
    cut = {name: manifest[name] for name in ("cut", "edge_um", "edge_px")}
    facts = {"encoder": records.encoder, "feature_dim": records.feature_dim, "patch_slots": patch_slots}
    return facts | cut | {"hashes": hashes | {"records": manifest_hash(data.records)}}


def read_manifest(records: str) -> dict:
    """What the records say of themselves: how they were cut, their hash. Raises where they are not finished."""
    path = as_path(records) / "manifest.json"
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file, so the records are not finished; run the command that writes them once more"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and run the command that writes the records") from None


def choose_groups(batch_size: int, pieces: int) -> int:
    """How many text groups to cut a batch into, so that every device has whole groups of every microbatch.

    Sixteen slides to a group where possible: larger groups pack tighter, smaller ones spread over more devices. Raises
    ValueError where the batch does not divide.
    """
    for slides in SLIDES_PER_TEXT_GROUP:
        if batch_size % slides == 0 and batch_size // slides % pieces == 0:
            return batch_size // slides
    raise ValueError(
        f"a batch of {batch_size} slides cannot be cut evenly into {pieces} (devices x train.accumulate); set "
        f"--config.train.batch_size to a multiple of {pieces}"
    )


def _groups_to_go_on_with(begun: int, batch_size: int, pieces: int) -> int:
    """The text groups that a run began with, where they divide; else those of a run that begins here."""
    if begun and batch_size % begun == 0 and begun % pieces == 0:
        return begun
    groups = choose_groups(batch_size, pieces)
    if begun and jax.process_index() == 0:
        print(
            f"the run began with {begun} text groups, which {pieces} pieces (devices x train.accumulate) cannot share; "
            f"it goes on with {groups}: the same batches, other dropout in texts",
            file=sys.stderr,
        )
    return groups


def even_size(slides: int, most: int) -> int:
    """The batch size, `most` or below, that cuts all slides into as few even batches.

    Batches of `most` leave out up to a whole batch less one: much of a small validation split.
    """
    return slides // -(-slides // most)


def _hash(paths: list[Place]) -> str:
    return hashlib.sha256(b"".join(read_bytes(path) for path in paths)).hexdigest()
