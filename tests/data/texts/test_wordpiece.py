"""Vocabularies learnt from texts, and transformers reading them."""

from pathlib import Path

import numpy as np
import pytest

from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece

TEXTS = [
    "The tumor is 1.8 cm. It is pT2b; H&E.",
    "Émile's naïve Größe µm - İstanbul ΑΣ 染色",
    "a\u0301 b \u200b zero \x00 nul \t tab\u00a0nbsp",
    "[SEP] x [UNK] [MASK]",
    "x" * 150,
    "",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A small cased and accented vocabulary, a line a token."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the The tumor Tumor is 1 8 . ; cm pT ##2 ##b É ##mile é e ##´ ' s H & 染 色"
    letters = [chr(i) for i in range(97, 123)]
    return [*dict.fromkeys([*words.split(), *letters, *(f"##{letter}" for letter in letters)])]


def assert_ids_of_transformers(folder: Path, texts, max_length=384):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    ours = TextTokenizer(folder).encode(texts, max_length)
    for text, ids in zip(texts, ours, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs(text, truncation=True, max_length=max_length)["input_ids"], text


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
    with pytest.raises(ValueError, match="ask for more"):
        train_wordpiece(texts, tmp_path / "c", 20)
    with pytest.raises(ValueError, match="no words"):
        train_wordpiece([" "], tmp_path / "c", 20)


def test_the_pairs_that_occur_most_are_merged_first(tmp_path):
    """Pinned: hash seeds and versions of tokenizers must not renumber the vocabulary of a run."""
    train_wordpiece(["the tumor of the gland", "tumors of glands, 1.8 cm"], tmp_path, 60)
    learnt = [token for token in (tmp_path / "vocab.txt").read_text().split()[5:] if len(token.lstrip("#")) > 1]
    assert " ".join(learnt) == "##an ##and ##he ##land ##mo ##mor ##umor gland of the tumor"


def test_a_learnt_vocabulary_is_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    train_wordpiece(TEXTS[:3] * 2, tmp_path, 150)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).vocab_size == TextTokenizer(tmp_path).vocab_size - 1
    assert_ids_of_transformers(tmp_path, TEXTS, 64)
