"""Training of WordPiece vocabularies."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from pathflip_jax.data.texts.tokenizer import SPECIAL, bert_tokenizer


def train_wordpiece(texts: Iterable[str], folder: str | Path, vocab_size: int = 2000) -> None:
    """Train a lower-cased WordPiece vocabulary on texts and write it as a BERT folder without weights.

    vocab.txt, tokenizer.json, tokenizer_config.json and config.json are what transformers expects. The same texts
    give the same files byte for byte: the trainer of `tokenizers` numbers tokens in hash order, so it is not used.
    Few texts may hold fewer pieces than `vocab_size`. Raises ValueError when the letters alone do not fit.
    """
    splitter = bert_tokenizer({"[UNK]": 0})
    words: Counter[str] = Counter()
    for text in texts:
        words.update(w for w, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text)))
    if not words:
        raise ValueError("no words to learn a vocabulary from: all texts are empty")
    tokens = _learn_pieces(words, vocab_size - len(SPECIAL))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *tokens])}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    bert_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    config = {"model_type": "bert", "vocab_size": len(vocabulary), "max_position_embeddings": 512, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _learn_pieces(words: Counter[str], size: int) -> list[str]:
    """At most `size` word pieces: the letters, then the most frequent pairs, merged one after the other.

    Byte-pair counts decide, as in the trainer of `tokenizers`; ties go to the first in alphabetical order.
    """
    split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in sorted(words)}
    letters = sorted({piece for pieces in split.values() for piece in pieces})
    if len(letters) > size:
        raise ValueError(
            f"vocab_size {size + len(SPECIAL)} is too small for the {len(letters)} letters of the texts and the "
            f"{len(SPECIAL)} special tokens; increase it"
        )
    counts: Counter[tuple[str, str]] = Counter()
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, pieces in split.items():
        for pair in zip(pieces, pieces[1:], strict=False):
            counts[pair] += words[word]
            holders[pair].add(word)
    tokens = dict.fromkeys(letters)
    while len(tokens) < size and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        merged = best[0] + best[1].removeprefix("##")
        tokens[merged] = None
        for word in holders.pop(best):
            old = split[word]
            for pair in zip(old, old[1:], strict=False):
                counts[pair] -= words[word]
                holders[pair].discard(word)
            new = []
            for piece in old:
                if new and (new[-1], piece) == best:
                    new[-1] = merged
                else:
                    new.append(piece)
            split[word] = new
            for pair in zip(new, new[1:], strict=False):
                counts[pair] += words[word]
                holders[pair].add(word)
        counts = +counts  # drops pairs that no longer occur
    return list(tokens)
