"""Tokenisation of texts with any Hugging Face BERT vocabulary (DESIGN section 5).

Only the `tokenizers` package is used: importing the tokenizer classes of transformers imports torch if it is installed,
and `BertTokenizerFast(vocab_file=...)` silently turns every word into [UNK].
"""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pathflip_jax.data.storage.files import Place, as_path, make_folder, read_bytes
from pathflip_jax.data.storage.json_values import json_object

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Names of a setting in tokenizer.json, and in tokenizer_config.json.
_NORMALIZER = (
    ("lowercase", "do_lower_case"),
    ("strip_accents", "strip_accents"),
    ("handle_chinese_chars", "tokenize_chinese_chars"),
)
_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
_AT_ONCE = 4096  # texts encoded together
_WORD = re.compile(r"[^ \n\r\t]+")  # split at the white space common to every BERT; BERT drops some rarer kinds
_log = logging.getLogger(__name__)


class TextTokenizer:
    """WordPiece tokenizer of a Hugging Face BERT folder, with an additional id for [DEC].

    Reads `tokenizer.json`, or `vocab.txt` with the `do_lower_case` of tokenizer_config.json or config.json.
    `vocab_size` includes [DEC], as does the word table of the released model. `truncated` counts the texts truncated by
    `encode` since the tokenizer was created.
    """

    def __init__(self, folder: str | Place) -> None:
        self.folder = as_path(folder)
        self._tokenizer = _load(self.folder)
        self._tokenizer.no_truncation()  # tokenizer.json may set both; truncations must be counted here
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL[:4] if token not in vocabulary]
        if missing:
            raise ValueError(
                f"{self.folder}: the vocabulary of {len(vocabulary)} tokens lacks {', '.join(missing)}; "
                "a BERT folder is needed (vocab.txt or tokenizer.json of a BertTokenizer)"
            )
        self.unk_id, self.cls_id, self.sep_id = (vocabulary[token] for token in SPECIAL[1:4])
        last = max(vocabulary.values())
        if last >= 2**31 - 1:
            raise ValueError(
                f"{self.folder}: the vocabulary has a token of id {last}; copy the tokenizer's files again"
            )
        self.vocab_size = last + 1 if "[DEC]" in vocabulary else last + 2
        parts = json.loads(self._tokenizer.to_str())
        kinds = [(parts[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
        #: Whether the ids of two texts joined by a space are the concatenation of their ids. BERT splits at white
        #: space first, so its texts can be tokenised once, sentence by sentence.
        self.concatenates = kinds == ["BertNormalizer", "BertPreTokenizer"]
        added = (str(token.content) for token in self._tokenizer.get_added_tokens_decoder().values())
        self._word_by_word = self.concatenates and not any(re.search(r"\s", token) for token in added)

    @property
    def described(self) -> dict:
        """Description of the tokenizer as a tokenizer.json, whichever file it was read from."""
        return json.loads(self._tokenizer.to_str())

    def ids(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        """Ids of texts without [CLS] and [SEP], of any length.

        Reports repeat their words: if texts can be tokenised word by word, each distinct word is tokenised once, in a
        fraction of the time and memory of encoding whole texts.
        """
        if not self._word_by_word:
            return self._encoded(texts)
        known = dict.fromkeys(word for text in texts for word in _WORD.findall(text))
        known |= zip(known, (ids.tolist() for ids in self._encoded(list(known))), strict=True)
        found = ([*chain.from_iterable(map(known.__getitem__, _WORD.findall(text)))] for text in texts)
        return [np.array(ids, np.int32) for ids in found]

    def unknown_share(self, pieces: Iterable[Int[np.ndarray, "T"]]) -> float:
        """Fraction of [UNK] among the word pieces of texts, as from `ids`; 0 without pieces."""
        unknown = total = 0
        for ids in pieces:
            unknown += int(np.count_nonzero(ids == self.unk_id))
            total += len(ids)
        return unknown / total if total else 0.0

    def _encoded(self, texts: Sequence[str]) -> list[Int[np.ndarray, "T"]]:
        found = []
        for start in range(0, len(texts), _AT_ONCE):  # an encoding is many times larger than its ids
            part = list(texts[start : start + _AT_ONCE])
            encodings = self._tokenizer.encode_batch_fast(part, add_special_tokens=False)
            found += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return found

    def wrap(self, ids: Int[np.ndarray, "T"], max_length: int) -> Int[np.ndarray, "t"]:
        """[CLS] ids [SEP], at most `max_length` in total: a longer text is truncated, but keeps its [SEP]."""
        kept = ids[: max_length - 2]
        wrapped = np.empty(len(kept) + 2, np.int32)
        wrapped[0], wrapped[1:-1], wrapped[-1] = self.cls_id, kept, self.sep_id
        return wrapped

    def encode(self, texts: Sequence[str], max_length: int) -> list[Int[np.ndarray, "t"]]:
        """Ids of each text with [CLS] and [SEP], at most `max_length` (3 or more).

        Truncated texts are counted in a warning: nothing is truncated silently.
        """
        if max_length < 3:
            raise ValueError(f"max_length {max_length} leaves no room between [CLS] and [SEP]; use at least 3")
        found = self.ids(texts)
        long = [len(ids) + 2 for ids in found if len(ids) + 2 > max_length]
        if long:
            _log.warning(
                "%d of %d texts are longer than %d tokens (the longest has %d) and are truncated",
                len(long), len(found), max_length, max(long),
            )  # fmt: skip
        return [self.wrap(ids, max_length) for ids in found]

    def save(self, folder: str | Place) -> None:
        """Write a BERT folder (without weights) from which the same tokenizer can be loaded."""
        folder = as_path(folder)
        make_folder(folder)
        for name in _FILES:
            if (self.folder / name).is_file() and folder.resolve() != self.folder.resolve():
                (folder / name).write_bytes(read_bytes(self.folder / name))
        if not (folder / "tokenizer.json").exists():
            (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


def _read_json(path: Place) -> dict:
    return json_object(path, read_bytes(path)) if path.is_file() else {}


def _load(folder: Place) -> Tokenizer:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; a Hugging Face BERT folder is needed (with vocab.txt or tokenizer.json)"
        )
    settings = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer(folder / "tokenizer.json", settings)
    if not (folder / "vocab.txt").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder}: neither tokenizer.json nor vocab.txt in it (found {found}); copy the tokenizer's files there"
        )
    try:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / 'vocab.txt'}: not UTF-8 (byte {error.start}); copy the file again") from error
    vocabulary = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    settings = _read_json(folder / "config.json") | settings
    if "do_lower_case" not in settings and sum(re.match(r"[A-Z][a-z]", word) is not None for word in vocabulary) > 100:
        _log.warning(
            '%s: the vocabulary has capitals, but no file says "do_lower_case": false; texts are lower-cased, as '
            "transformers does. Add a tokenizer_config.json that sets it if the weights were trained on cased text",
            folder,
        )
    return bert_tokenizer(vocabulary, **_normalizing(settings, folder))


def _normalizing(settings: dict, folder: Path) -> dict[str, bool | None]:
    """Text normalisation settings of a folder."""
    found = {ours: settings[theirs] for ours, theirs in _NORMALIZER if theirs in settings}
    wrong = [f"{name} {value!r:.40}" for name, value in found.items() if not isinstance(value, bool | None)]
    if wrong:
        raise ValueError(
            f"{folder}: its settings say {', '.join(wrong)}, expected true or false; copy the folder again"
        )
    return found


def _read_tokenizer(path: Place, settings: dict) -> Tokenizer:
    """Tokenizer from tokenizer.json; tokenizer_config.json takes precedence on normalisation, as in transformers."""
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error}); copy the file again") from error
    normalizer = json.loads(tokenizer.to_str())["normalizer"]
    if normalizer and normalizer.pop("type") == "BertNormalizer":
        normalizer |= _normalizing(settings, path.parent)
        tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    return tokenizer


def bert_tokenizer(vocabulary: dict[str, int], **normalizer) -> Tokenizer:
    """BERT's WordPiece tokenizer with a vocabulary; `normalizer` are options of its BertNormalizer."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)  # lower-cases unless told otherwise
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    if "[SEP]" in vocabulary and "[CLS]" in vocabulary:
        tokenizer.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
    return tokenizer
