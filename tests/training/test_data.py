"""Training data of a run: splits, batch sizes divisible over devices, and errors about unsuitable data."""

import json
import re
import shutil

import numpy as np
import pytest

from pathflip_jax.convert.versions import unknown_settings
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.records.recipe import write_recipe
from pathflip_jax.runtime.sharding import Shards
from pathflip_jax.training import fingerprints, settings
from pathflip_jax.training.data import choose_groups, even_size, open_data, report_counts


@pytest.fixture
def config(tiny_cohort):
    """Settings by their dotted names -> the config of a small run on the tiny cohort."""

    def with_settings(**changes):
        given = {"data.regions": 2, "data.patch_slots": 4, "train.batch_size": 4} | changes
        options = [f"--config.{name}={value}" for name, value in given.items()]
        return settings.parse(["--config=demo:smoke", *tiny_cohort.settings(), *options, "--workdir=w"])[0]

    return with_settings


def test_each_split_of_the_slide_table_has_its_batches(config):
    data = open_data(config())
    assert data.train.slides == [(f"S{i:02d}",) for i in range(12)]
    assert data.validation.slides == [(f"S{i:02d}",) for i in range(12, 18)]
    assert data.train.steps_per_epoch == 3 and data.train.batch(0).patches.shape == (4, 2, 4, 16)
    assert data.validation.steps_per_epoch == 2 and data.validation.batch(0).patches.shape == (3, 2, 4, 16)
    assert data.tokenizer.vocab_size > 5 and data.facts["encoder"] == "tiny" and data.facts["feature_dim"] == 16


def test_a_fold_of_a_published_task_is_trained_on(config, task_of_folds):
    chosen, plain = (open_data(config(**more)) for more in ({"data.slides": task_of_folds, "data.fold": "0"}, {}))
    assert chosen.train.slides == plain.train.slides and chosen.validation.slides == plain.validation.slides
    other = open_data(config(**{"data.slides": task_of_folds, "data.fold": "fold_1"}))
    assert other.validation.slides == [(f"S{i:02d}",) for i in range(18, 24)]
    assert other.facts["meanings"]["slides"] != chosen.facts["meanings"]["slides"]
    with pytest.raises(ValueError, match=r"2 folds \(fold_0, fold_1\): choose one with --fold \(training: data.fold\)"):
        open_data(config(**{"data.slides": task_of_folds}))


def test_the_lists_of_a_clam_split_are_trained_on(config, tmp_path):
    path = tmp_path / "splits_0.csv"
    path.write_text(",train,val,test\n0,S00.svs,S12,S18\n1,S01,S13,S19\n2,S02,,\n3,S03,,\n")
    data = open_data(config(**{"data.slides": path}))
    assert data.train.slides == [("S00",), ("S01",), ("S02",), ("S03",)] and len(data.validation.slides) == 2


def test_a_run_remembers_the_recipe_of_its_records(config, tiny_cohort, tmp_path):
    assert "recipe" not in open_data(config()).facts  # nothing is known of it
    folder = shutil.copytree(tiny_cohort.records, tmp_path / "records")
    write_recipe(folder, FeatureRecipe(encoder="tiny", weights="34cd" * 16, patch_size=64, mpp=0.5))
    facts = open_data(config(**{"data.records": folder})).facts
    known = {"encoder": "tiny", "weights": "34cd" * 16, "patch_size": 64, "mpp": 0.5, "patch_um": 32.0}
    assert facts["recipe"] == known and not unknown_settings({"data": facts}, ["data"])


def test_without_a_slide_table_all_slides_train(config):
    data = open_data(config(**{"data.slides": ""}))
    assert len(data.train.slides) == 24 and data.validation is None


def test_what_is_wrong_with_the_texts_is_said_once_a_split(config, tiny_cohort, tmp_path, caplog):
    rows = [json.loads(line) for line in tiny_cohort.texts.read_text().splitlines()]
    rows = [row for row in rows if row["slide_id"] not in ("S03", "S13", "S14")]
    texts = tmp_path / "reports.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(config(**{"data.texts": texts, "data.caption_length": 20}), Shards(2))
    assert len(data.train.slides) == 11 and len(data.validation.slides) == 4
    said = [record.getMessage() for record in caplog.records]
    for split, bags in (("training", 11), ("validation", 4)):
        long = [message for message in said if f" of {bags} captions are longer than 20 tokens" in message]
        assert len(long) == 1, (split, said)
    left_out = sorted(message for message in said if "are left out" in message)
    assert left_out == [
        "1 of 12 slides have no text and are left out (S03)",
        "2 of 6 slides have no text and are left out (S13, S14)",
    ]
    assert len(said) == len(set(said)) + 1  # of the whole table, which both splits are matched with


@pytest.mark.parametrize(
    "setting, value, message",
    [
        (
            "data.split",
            "nightly",
            r"no slide is in split 'nightly'; the splits are test \(6\), train \(12\), val \(6\)",
        ),
        ("train.batch_size", 400, "too few for a batch of 400"),
        ("data.split", "training", "did you mean train"),
        ("data.val_split", "vla", "did you mean val.*val_split= trains without validation"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named(config, setting, value, message):
    with pytest.raises(ValueError, match=message):
        open_data(config(**{setting: value}))


def test_weights_for_other_words_are_refused(config, tiny_cohort, tmp_path):
    words = (tiny_cohort.vocabulary / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "more"]) + "\n")
    message = f"a vocabulary of {len(words) + 2} words, but config.data.tokenizer={tiny_cohort.vocabulary} has"
    with pytest.raises(ValueError, match=f"{message} {len(words) + 1}; name the same folder"):
        open_data(config(**{"model.bert": tmp_path}))
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert open_data(config(**{"model.bert": tmp_path})).tokenizer.vocab_size == len(words) + 1


def test_records_that_are_not_finished_are_refused(config, tiny_cohort):
    records = tiny_cohort.copy_records()
    (records / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json: no such file, so the records are not finished"):
        open_data(config(**{"data.records": records}))


def test_groups_divide_over_devices_and_microbatches():
    assert choose_groups(64, 1) == 4 and choose_groups(64, 32) == 32 and choose_groups(64, 64) == 64
    assert choose_groups(6, 1) == 3 and choose_groups(7, 7) == 7
    with pytest.raises(ValueError, match="batch of 6 slides cannot be divided evenly into 4 parts"):
        choose_groups(6, 4)


def test_even_batches_leave_out_less_than_a_slide_for_each_batch():
    assert (even_size(6, 4), even_size(100, 32), even_size(3, 64)) == (3, 25, 3)
    for slides in range(1, 70):
        for most in range(1, 80):
            size = even_size(slides, most)
            assert 0 < size <= min(most, slides) and slides - slides // size * size < -(-slides // most)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_validation_is_the_same_on_any_number_of_devices(config, shards):
    """Six slides: fewer than eight devices, and no multiple of four."""
    sizes = {"train.batch_size": 8, "data.subcaptions": 2}
    one, many = (open_data(config(**sizes), Shards(count)).validation for count in (1, shards))
    assert one.steps_per_epoch == many.steps_per_epoch == 1 and one.batch_size == many.batch_size == 6
    expected, found = one.batch(0), many.batch(0)
    assert len(expected.related) == 6 and len(found.related) % shards == 0
    for name in ("patches", "patch_mask", "related", "slide", "wording"):
        assert np.array_equal(getattr(found, name)[:6], getattr(expected, name)), name
    assert texts(found)[:18] == texts(expected) and len(texts(expected)) == 18


def texts(batch, sep=3):
    """The token ids of each slide's texts, from [CLS] to [SEP]."""
    tokens = np.concatenate([rows.tokens.reshape(len(rows.tokens), -1) for rows in batch.text_rows], axis=1)
    group = len(batch.related) // len(tokens)
    rows = [(tokens[slide // group], place) for slide, places in enumerate(batch.text_index) for place in places]
    return [row[place : place + row[place:].tolist().index(sep) + 1].tolist() for row, place in rows]


def test_a_run_keeps_its_text_groups_where_devices_can_share_them(config, capsys):
    assert open_data(config(), Shards(4)).facts["text_groups"] == 4
    assert open_data(config()).facts["text_groups"] == 1
    assert open_data(config(), begun_groups=4).facts["text_groups"] == 4 and capsys.readouterr().err == ""
    assert open_data(config(), Shards(4), begun_groups=2).facts["text_groups"] == 4
    assert "began with 2 text groups, which cannot be divided into 4 parts" in capsys.readouterr().err


def test_the_patients_of_the_slide_table_are_read(config, tiny_cohort, tmp_path):
    """Records and texts name 22 patients; the table joins them two by two, but for one that it says nothing of."""
    lines = tiny_cohort.slides.read_text().splitlines()
    lines[0] += ",case_id"
    rows = [line.split(",") for line in lines[1:]]
    for number, row in enumerate(rows):
        row += [row[1]]
        row[1] = "" if number == 0 else f"Group {number // 4}"
    table = tmp_path / "slides.csv"
    table.write_text("\n".join([lines[0], *map(",".join, rows)]) + "\n")
    cases = open_data(config(**{"data.slides": table})).train.related[:, 0].tolist()
    assert cases == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]  # slide 0 has the case of slide 1
    assert open_data(config()).train.related[:, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]


def test_a_slide_table_of_other_patients_is_refused_by_name(config, tiny_cohort, tmp_path):
    table = tmp_path / "other.csv"
    table.write_text(tiny_cohort.slides.read_text().replace("S03,P03", "S03,P99"))
    with pytest.raises(ValueError) as error:
        open_data(config(**{"data.slides": table}))
    said = str(error.value)
    assert f"slide S03 belongs to P99 in {table}, but to P03 in" in said
    assert "must agree: correct case_id or patient" in said


def test_texts_may_name_a_patient_that_only_the_slide_table_knows(config, tiny_cohort, tmp_path):
    table, texts = tmp_path / "slides.csv", tmp_path / "reports.jsonl"
    lines = tiny_cohort.slides.read_text().splitlines()
    rows = [f"{line},{line.split(',')[1]}" for line in lines[1:]]
    rows = [row.replace(f"S0{i},P0{i}", f"S0{i},Q{i // 2}") for i, row in enumerate(rows)]
    table.write_text("\n".join([f"{lines[0]},case_id", *rows]) + "\n")
    named = [{"patient_id": "q1"}, {"patient_id": "q2"}, {"slide_id": "S12"}]
    captions = ["Fat is seen.", "No mucin is present.", "Necrosis is extensive."]
    rows = [name | {"caption": caption} for name, caption in zip(named, captions, strict=True)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(config(**{"data.slides": table, "data.texts": texts, "train.batch_size": 2}))
    assert data.train.slides == [("S02", "S03"), ("S04", "S05")]


def test_texts_in_words_that_the_vocabulary_lacks_are_refused_and_an_option_overrules(config, tiny_cohort, tmp_path):
    rows = [json.loads(line) for line in tiny_cohort.texts.read_text().splitlines()]
    texts = tmp_path / "reports.jsonl"
    texts.write_text("".join(json.dumps(row | {"caption": f"Железа {i}. Fat."}) + "\n" for i, row in enumerate(rows)))
    with pytest.raises(ValueError, match="reports.jsonl: [0-9.]+% of the word pieces.*max_unknown_share"):
        open_data(config(**{"data.texts": texts, "data.max_unknown_share": 0.01}))
    open_data(config(**{"data.texts": texts, "data.max_unknown_share": 1.0}))


def test_a_validation_without_rivals_is_said(config, tiny_cohort, tmp_path, caplog):
    rows = [json.loads(line) for line in tiny_cohort.texts.read_text().splitlines()]
    for row in rows[12:18]:
        row["caption"] = "Fat is seen."
    texts = tmp_path / "reports.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_data(config(**{"data.texts": texts}))
    assert "1 captions occur verbatim in several cases (6 of 6 slides" in caplog.text
    assert "validation: all 6 slides share one case or one caption" in caplog.text


def test_tables_saved_anew_are_the_same_data(config, tiny_cohort, tmp_path):
    slides, texts = tmp_path / "slides.csv", tmp_path / "reports.jsonl"
    lines = tiny_cohort.slides.read_text().splitlines()
    slides.write_bytes("\r\n".join([f"site,{lines[0]}", *(f"x,{line}" for line in lines[1:])]).encode("utf-8-sig"))
    texts.write_bytes(tiny_cohort.texts.read_bytes().rstrip().replace(b"\n", b"\r\n"))
    before, now = (open_data(config(**more)).facts for more in ({}, {"data.slides": slides, "data.texts": texts}))
    assert before["hashes"]["slides"] != now["hashes"]["slides"] and before["meanings"] == now["meanings"]
    then, today = fingerprints.same_data(before, now)
    assert then == today


def test_readers_of_a_run_know_all_that_it_says_of_its_data(config, tiny_cohort):
    assert unknown_settings({"data": open_data(config(**{"data.slides": tiny_cohort.slides})).facts}) == []


def test_what_is_missing_is_counted_by_split(config, tiny_cohort, tmp_path, capsys):
    """Of the table's training slides three have no record and one no text; three slides of the records have no row."""
    table, texts = tmp_path / "slides.csv", tmp_path / "reports.jsonl"
    lines = tiny_cohort.slides.read_text().replace("S02,P02", "X02,P02").replace("S03,P03", "X03,P03").splitlines()
    table.write_text("\n".join([*lines[:-1], "X99,P99,,train"]) + "\n")
    rows = tiny_cohort.texts.read_text().splitlines()
    texts.write_text("\n".join(row for row in rows if '"S04"' not in row) + "\n")
    facts = open_data(config(**{"data.slides": table, "data.texts": texts})).facts
    counts = facts["splits"]
    assert counts["train"] == {"slides": 10, "patients": 8, "texts": 9, "no_text": 1, "no_record": 3}
    assert counts["val"]["slides"] == counts["val"]["texts"] == 6 and counts["test"]["slides"] == 5
    assert counts["not_in_table"] == 3
    report_counts(facts, validates=True)
    assert capsys.readouterr().err == (
        "data: train 10 slides of 8 patients, 9 texts (3 more have no record, 1 have no text); val 6 slides of 5 "
        "patients, 6 texts; test 5 slides of 4 patients; 3 slides of the records are not in the table\n"
    )


def test_validation_is_left_out_where_that_is_asked_for_and_said(config, capsys):
    for nothing in ("", "none", "None"):
        data = open_data(config(**{"data.val_split": nothing}))
        assert data.validation is None
    report_counts(data.facts, validates=False)
    assert "; no validation" in capsys.readouterr().err


def test_a_split_without_records_is_an_error_but_not_of_a_run_that_began_so(config, tiny_cohort, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text(re.sub("S(.*val)", r"X\1", tiny_cohort.slides.read_text()))
    given = config(**{"data.slides": table})
    with pytest.raises(ValueError, match="none of the 6 slides of split 'val' .* is among the 24 slides of"):
        open_data(given)
    assert open_data(given, begun_groups=1).validation is None
