"""`pathflip vocabulary`: a vocabulary of one split, without false warnings about the others."""

import json

import pytest

from pathflip_jax import cli


@pytest.fixture
def tables(tmp_path):
    """Ten slides of ten patients in two splits, and reports keyed by patient."""
    rows = [f"S{i},{i}.0,{'train' if i < 6 else 'test'}" for i in range(10)]
    (tmp_path / "slides.csv").write_text("\n".join(["slide_id,patient_id,split", *rows]))
    texts = [
        {"case_id": i, "caption": f"A tumor of the {'breast' if i < 6 else 'kidney'} number {i}."} for i in range(10)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return tmp_path


def run(tables, *options):
    named = [str(tables / "texts.jsonl"), "--slides", str(tables / "slides.csv"), "--out", str(tables / "words")]
    return cli.main(["vocabulary", *named, *options])


def test_texts_of_other_splits_are_left_out_and_not_called_lost(tables, capsys, caplog):
    assert run(tables, "--split", "train") == 0
    assert "from 6 texts" in capsys.readouterr().out and not caplog.records
    words = (tables / "words" / "vocab.txt").read_text().split()
    assert "breast" in words and "kidney" not in words


def test_a_split_without_texts_is_an_error(tables, capsys):
    texts = (tables / "texts.jsonl").read_text().splitlines()
    (tables / "texts.jsonl").write_text("\n".join(texts[:6]))
    assert run(tables, "--split", "test") == cli.WRONG_INPUT
    assert "no text belongs to a slide of split 'test' (S6, S7, S8 and 1 more)" in capsys.readouterr().err
    assert run(tables, "--split", "val") == cli.WRONG_INPUT and "no slide is in split 'val'" in capsys.readouterr().err
