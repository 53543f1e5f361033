"""`pathflip doctor` checks records, slide table, texts and vocabulary against each other as training does."""

import json

import pytest

from pathflip_jax.commands.data_checks import examine_data
from pathflip_jax.commands.findings import logged_warnings
from pathflip_jax.data.texts.split_files import one_fold


@pytest.fixture
def look(tiny_cohort):
    """Findings by state for the tiny cohort, with any input replaced."""

    def examine(**other):
        parts = {"records": tiny_cohort.records, "slides": tiny_cohort.slides, "texts": tiny_cohort.texts}
        parts |= {"tokenizer": tiny_cohort.vocabulary} | other
        found = examine_data(*(parts[name] for name in ("records", "slides", "texts", "tokenizer")))
        assert all(finding.state == "ok" or finding.cure or finding.state == "fault" for finding in found)
        return {state: [tuple(f[:2]) for f in found if f.state == state] for state in ("ok", "note", "fault")}

    return examine


def _table(tiny_cohort, tmp_path, change):
    """Slide table with its rows changed by `change(slide, row)`, which returns None to drop a row."""
    head, *lines = tiny_cohort.slides.read_text().splitlines()
    rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
    kept = [row for row in (change(row["slide_id"], row) for row in rows) if row is not None]
    path = tmp_path / "slides.csv"
    path.write_text("\n".join([head, *(",".join(row.values()) for row in kept)]) + "\n")
    return path


def test_a_fold_of_a_task_is_checked(look, task_of_folds):
    found = look(slides=one_fold(task_of_folds, "0"))
    assert ("slides", "24 slides of 20 patients; split: train 12, val 6, test 6") in found["ok"]
    found = look(slides=task_of_folds)
    assert any("split: none 24; the table has 2 folds (fold_0, fold_1): choose one" in text for _, text in found["ok"])


def _texts(tmp_path, rows):
    path = tmp_path / "reports.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_cohort_without_fault(look):
    found = look()
    assert found["fault"] == [] and found["note"] == []
    assert [name for name, _ in found["ok"]] == ["records", "slides", "slides", "texts", "tokenizer"]
    said = "\n".join(text for _, text in found["ok"])
    assert "24 slides of 20 patients; split: train 12, val 6, test 6" in said and "24 of them with a slide in" in said
    assert "0.0% of the word pieces of the texts are unknown" in said


def test_texts_keyed_by_patient_match_as_in_training(look, tmp_path):
    rows = [{"case_id": f"P{number:02d}", "caption": f"tumor cells {number}."} for number in range(24)]
    found = look(texts=_texts(tmp_path, rows), tokenizer=None)
    assert found["fault"] == [] and any("24 texts, 20 of them" in text for _, text in found["ok"])
    assert any("match no slide" in text for _, text in found["note"])


def test_texts_keyed_by_a_patient_that_the_slide_table_alone_names(look, tiny_cohort, tmp_path):
    slides = _table(tiny_cohort, tmp_path, lambda slide, row: row | {"patient_id": f"K{row['patient_id']}"})
    texts = _texts(tmp_path, [{"case_id": f"KP{number:02d}", "caption": f"cells {number}."} for number in range(24)])
    assert any("24 texts, 20 of them" in text for _, text in look(texts=texts, slides=slides)["ok"])
    assert any("none of the 24 texts" in text for _, text in look(texts=texts, slides=None)["fault"])


def test_what_the_slide_table_lacks_is_named(look, tiny_cohort, tmp_path):
    def change(slide, row):
        renamed = {"S00": "X00", "S23": "X23", "S05": "s05.svs"}
        return None if slide == "S06" else row | {"slide_id": renamed.get(slide, slide)}

    found = look(slides=_table(tiny_cohort, tmp_path, change))
    notes, faults = ("\n".join(text for _, text in found[state]) for state in ("note", "fault"))
    assert "without a record: 1 of the 11 slides of split train (X00); training skips them" in notes
    assert "without a record: 1 of the 6 slides of split test (X23)" in faults
    assert "without a row: 3 of the 24 slides" in notes and "(S00, S06, S23)" in notes
    assert "1 slides of" in notes and "(S05)" in notes


def test_a_split_that_leaks_and_slides_without_patients(look, tiny_cohort, tmp_path):
    def change(slide, row):
        return row | {"S00": {"split": "test"}, "S12": {"patient_id": ""}}.get(slide, {})

    found = look(slides=_table(tiny_cohort, tmp_path, change))
    assert any("more than one split (P00)" in text for _, text in found["fault"])
    assert any("without a patient: 1 of the 24 slides (S12)" in text for _, text in found["note"])


def test_tables_that_contradict_each_other_name_both(look, tiny_cohort, tmp_path):
    slides = _table(tiny_cohort, tmp_path, lambda slide, row: row | ({"patient_id": "Q"} if slide == "S00" else {}))
    faults = [text for _, text in look(slides=slides, texts=None)["fault"]]
    assert any("slide S00" in text and "Q" in text and "P00" in text and str(slides) in text for text in faults)


@pytest.mark.parametrize("part", ["records", "slides", "texts", "tokenizer"])
def test_a_part_that_cannot_be_read_is_a_fault_and_the_rest_goes_on(look, part, tmp_path):
    found = look(**{part: tmp_path / "absent"})
    assert [name for name, _ in found["fault"]] == [part] and len({name for name, _ in found["ok"]}) == 3


def test_a_vocabulary_of_another_language_is_a_fault(look, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n")
    found = look(tokenizer=tmp_path)
    (fault,) = found["fault"]
    assert fault[0] == "tokenizer" and "are unknown to it" in fault[1]
    assert "0.0%" in dict(look()["ok"])["tokenizer"]
    assert dict(look(texts=None, tokenizer=tmp_path)["ok"])["tokenizer"].endswith("pieces")


def test_no_slide_of_the_training_split_has_a_text(look, tmp_path):
    texts = _texts(tmp_path, [{"slide_id": "S20", "caption": "tumor."}])
    assert any("none of the 12 slides of split train has a text" in text for _, text in look(texts=texts)["fault"])


def test_warnings_become_findings_and_logging_is_as_before(caplog):
    import logging

    log = logging.getLogger("pathflip_jax.data.texts.text")
    with logged_warnings() as messages:
        log.warning("%d ids", 3)
    log.warning("after")
    assert messages == ["3 ids"] and [record.getMessage() for record in caplog.records] == ["after"]
