"""Fingerprints of data: hashes of the content that training uses from tables and tokenizer, not of their bytes.

A slide table that gained a column, or that was saved with other line endings, quotes or a byte order mark, is the same
table. Runs of versions that hashed only bytes are compared by those hashes (`same_data`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pathflip_jax.data.texts.conversations import Conversation
from pathflip_jax.data.texts.text import SlideText

HASHES, MEANINGS = "hashes", "meanings"  # in section data of config.json: hashes of file bytes, and of their content
END = Conversation("", (), "", ())  # end of a table
_SLIDE_COLUMNS = ("slide_id", "case_id", "patient_id", "split")
_TOKENIZER_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")


def slide_rows(rows: Iterable[Mapping[str, str]]) -> str:
    """Hash the identity and split of each slide, independent of the order of rows."""
    return _hash(sorted([row[name] for name in _SLIDE_COLUMNS] for row in rows))


def slide_texts(texts: Iterable[SlideText]) -> str:
    """Hash the texts of slides, in order: a slide may have several, of which one is drawn by index."""
    return _hash([text.slide_ids, text.case_id, text.caption, text.subcaptions] for text in texts)


def conversations(mixture: Iterable[tuple[Sequence[Conversation], int]]) -> str:
    """Hash conversations, table by table."""
    return _hash([talk.slide_ids, talk.case_id, talk.turns] for talks, _ in mixture for talk in [*talks, END])


def tokenizer(described: Mapping[str, Any]) -> str:
    """Hash a tokenizer by its tokenizer.json: vocabulary and segmentation, not special tokens or padding."""
    return _hash([described.get(name) for name in _TOKENIZER_PARTS])


def same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sections `data` of config.json, normalised for comparison.

    A file is unchanged if its bytes or its content are: runs of earlier versions recorded only the bytes.
    """
    before, now = dict(before), dict(now)
    meant, means = before.pop(MEANINGS, None) or {}, now.pop(MEANINGS, None) or {}
    then, today = before.get(HASHES) or {}, now.get(HASHES) or {}
    for name in meant.keys() & means.keys():
        if name not in then or name not in today or then[name] != today[name]:
            then, today = then | {name: meant[name]}, today | {name: means[name]}
    return before | {HASHES: then}, now | {HASHES: today}


def _hash(parts: Iterable[Any]) -> str:
    """SHA-256 of plain values, with normalised line endings."""
    found = hashlib.sha256()
    for part in parts:
        line = json.dumps(part, ensure_ascii=False, sort_keys=True).replace("\\r\\n", "\\n")
        found.update(f"{line}\n".encode())
    return found.hexdigest()
