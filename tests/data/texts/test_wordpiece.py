"""Vocabularies learnt from texts."""

import numpy as np
import pytest

from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece


def test_a_vocabulary_learnt_from_texts(tmp_path):
    texts = ["The tumor is tumorous, 1.8 cm.", "Tumors of the gland; glands & glandular tissue.", "Café H&E."] * 3
    train_wordpiece(texts, tmp_path / "a", 80)
    train_wordpiece(reversed(texts), tmp_path / "b", 80)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    vocabulary = (tmp_path / "a" / "vocab.txt").read_text().split()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(vocabulary) <= 80
    assert {"tumor", "gland"} <= set(vocabulary)
    tokenizer = TextTokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == len(vocabulary) + 1
    assert vocabulary.index("[UNK]") not in np.concatenate(tokenizer.ids(texts))
    (tmp_path / "a" / "tokenizer.json").unlink()  # vocab.txt alone says the same
    for x, y in zip(TextTokenizer(tmp_path / "a").ids(texts), tokenizer.ids(texts), strict=True):
        assert x.tolist() == y.tolist()
    with pytest.raises(ValueError, match="special tokens; increase it"):
        train_wordpiece(texts, tmp_path / "c", 20)
    with pytest.raises(ValueError, match="no words"):
        train_wordpiece([" "], tmp_path / "c", 20)


def test_the_pairs_that_occur_most_are_merged_first(tmp_path):
    """Pinned: hash seeds and versions of tokenizers must not renumber the vocabulary of a run."""
    train_wordpiece(["the tumor of the gland", "tumors of glands, 1.8 cm"], tmp_path, 60)
    learnt = [token for token in (tmp_path / "vocab.txt").read_text().split()[5:] if len(token.lstrip("#")) > 1]
    assert " ".join(learnt) == "##an ##and ##he ##land ##mo ##mor ##umor gland of the tumor"
