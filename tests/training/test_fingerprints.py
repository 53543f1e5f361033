"""Fingerprints of tables and tokenizers depend on their content, not on its formatting."""

import json

import pytest

from pathflip_jax.data.texts.conversations import read_conversations
from pathflip_jax.data.texts.text import read_slide_table, read_texts
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece
from pathflip_jax.training import fingerprints

TABLE = b"slide_id,patient_id,split\na,p,train\nb,q,val\n"
TEXTS = b'{"slide_id": "a", "caption": "Fat, seen."}\n{"slide_id": "b", "caption": "No mucin.\\nNone."}\n'


def slides(path, content):
    path.write_bytes(content)
    return fingerprints.slide_rows(read_slide_table(path))


def texts(path, content):
    path.write_bytes(content)
    return fingerprints.slide_texts(read_texts(path)), fingerprints.conversations([(read_conversations(path), 1)])


@pytest.mark.parametrize(
    "content",
    [TABLE.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + TABLE, TABLE.rstrip(), TABLE.replace(b"a,", b'"a",'),
     b"slide_id,patient_id,split,site\na,p,train,x\nb,q,val,y\n", b"split;slide_id;patient_id\nval;b;q\ntrain;a;p\n",
     TABLE.decode().encode("utf-16"), TABLE.replace(b"val", b"validation")],
)  # fmt: skip
def test_a_slide_table_written_otherwise_is_the_same(tmp_path, content):
    assert slides(tmp_path / "a.csv", content) == slides(tmp_path / "b.csv", TABLE)


@pytest.mark.parametrize("word", [(b"a,p", b"c,p"), (b"b,q", b"b,p"), (b"val", b"test"), (b"train", b"")])
def test_a_slide_table_that_says_another_thing_is_another(tmp_path, word):
    assert slides(tmp_path / "a.csv", TABLE.replace(*word)) != slides(tmp_path / "b.csv", TABLE)


@pytest.mark.parametrize(
    "content",
    [TEXTS.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + TEXTS, TEXTS.rstrip(), TEXTS.replace(b": ", b":"),
     b'caption,slide_id,more\n"Fat, seen.",a,\n"No mucin.\r\nNone.",b,1\n', TEXTS.replace(b"Fat", b"\\u0046at")],
)  # fmt: skip
def test_texts_written_otherwise_are_the_same(tmp_path, content):
    assert texts(tmp_path / "a", content) == texts(tmp_path / "b", TEXTS)


@pytest.mark.parametrize("content", [TEXTS.replace(b"Fat", b"fat"), TEXTS.splitlines()[0], TEXTS.replace(b"b", b"c")])
def test_other_texts_are_others(tmp_path, content):
    assert not set(texts(tmp_path / "a", content)) & set(texts(tmp_path / "b", TEXTS))


def test_conversations_of_two_tables_are_not_those_of_one(tmp_path):
    (tmp_path / "a").write_bytes(TEXTS)
    one, other = read_conversations(tmp_path / "a")
    assert fingerprints.conversations([([one, other], 1)]) != fingerprints.conversations([([one], 1), ([other], 1)])


def test_a_tokenizer_is_its_words_and_how_it_cuts(tmp_path):
    train_wordpiece(["fat mucin stroma"], tmp_path / "a", vocab_size=60)
    expected = fingerprints.tokenizer(TextTokenizer(tmp_path / "a").described)
    path = tmp_path / "a/tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"padding": None}, indent=4).replace("\n", "\r\n"))
    assert fingerprints.tokenizer(TextTokenizer(tmp_path / "a").described) == expected
    path.unlink()  # vocab.txt says the same
    assert fingerprints.tokenizer(TextTokenizer(tmp_path / "a").described) == expected
    (tmp_path / "a/tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert fingerprints.tokenizer(TextTokenizer(tmp_path / "a").described) != expected


def test_a_run_that_hashed_bytes_alone_goes_on_by_those():
    now = {"seed": 0, "hashes": {"slides": "bytes", "records": "r"}, "meanings": {"slides": "means"}}
    then, today = fingerprints.same_data({"seed": 0, "hashes": {"slides": "bytes", "records": "r"}}, now)
    assert then == today
    then, today = fingerprints.same_data({"seed": 0, "hashes": {"slides": "others", "records": "r"}}, now)
    assert then["hashes"]["slides"] == "others" and today["hashes"]["slides"] == "bytes"


@pytest.mark.parametrize(("written", "said", "same"), [("x", "means", True), ("bytes", "y", True), ("x", "y", False)])
def test_data_are_the_same_by_their_bytes_or_by_what_they_say(written, said, same):
    now = {"hashes": {"slides": "bytes", "records": "r"}, "meanings": {"slides": "means"}}
    run = {"hashes": {"slides": written, "records": "r"}, "meanings": {"slides": said}}
    then, today = fingerprints.same_data(run, now)
    assert (then == today) is same


def test_a_slide_table_that_is_no_longer_named_is_a_difference():
    run = {"hashes": {"slides": "a", "texts": "t"}, "meanings": {"slides": "b", "texts": "u"}}
    then, today = fingerprints.same_data(run, {"hashes": {"texts": "t"}, "meanings": {"texts": "u"}})
    assert then != today
