"""The cohort of an evaluation: slides, patients and texts found in every spelling of their ids."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pathflip_jax.data.texts.tables import read_rows
from pathflip_jax.evaluate import colour
from pathflip_jax.evaluate.cohort import name_labels, read_cohort
from pathflip_jax.evaluate.tasks.retrieval import read_pairs


@pytest.fixture
def respelt(tiny_cohort, tmp_path):
    """A slide table as a spreadsheet leaves it, of patients 1, 2, ... of two slides each."""
    lines = ["slide_id,patient_id,label,split"]
    for i, row in enumerate(read_rows(tiny_cohort.slides)):
        slide, split = row.values["slide_id"], row.values["split"]
        spelt = f"{slide.lower()}.svs" if i % 2 else slide
        lines.append(f"{spelt},{i // 2 + 1}{'.0' if i % 2 else ''},{'NA' if i == 0 else 'a'},{split}")
    path = tmp_path / "slides.csv"
    path.write_text("\n".join([*lines, "elsewhere,99,a,train"]))
    return path


def test_a_spreadsheets_table_finds_slides_and_patients(tiny_cohort, respelt):
    cohort = read_cohort(tiny_cohort.records, respelt, "test")
    known = {info.slide_id for info in cohort.records.slides}
    assert set(cohort.slide_ids) <= known
    assert not any(name.endswith(".0") for name in cohort.patients)
    assert len(set(cohort.patients)) < len(cohort.patients)
    assert len(cohort.rows("train")) == sum(row["split"] == "train" for row in cohort.table) - 1
    text = "\n".join(cohort.warnings)
    assert "are spelt differently from the slides (s01.svs is slide S01" in text.replace("s01 is", "s01.svs is")
    assert f"1 of {len(known) + 1} rows of {respelt} match no slide (elsewhere)" in text
    assert "patients are written in more than one way" in text


def test_texts_may_name_the_patients_of_the_table(tiny_cohort, respelt, tmp_path):
    cohort = read_cohort(tiny_cohort.records, respelt, "test")
    patient = cohort.patients[0]
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"case_id": float(patient), "caption": "A tumor."}))
    (pair,) = read_pairs(texts, cohort)
    own = [slide for slide, name in zip(cohort.slide_ids, cohort.patients, strict=True) if name == patient]
    assert sorted(pair.slide_ids) == sorted(own)


def test_the_pixels_of_a_slide_are_read_once(tiny_cohort, monkeypatch):
    cohort, read = read_cohort(tiny_cohort.records, tiny_cohort.slides, "test"), []

    def patch_colours(path, coords, patch_size):
        read.append(path)
        return np.arange(3 * len(coords)).reshape(-1, 3)

    monkeypatch.setattr(colour, "patch_colours", patch_colours)
    first, other = cohort.slide_ids[:2]
    assert cohort.mean_colour(first) is None and not read
    cohort = cohort._replace(slide_files={first: "one", other: "two"})
    again = name_labels(cohort, lambda label: label)
    for one in (cohort, again):
        patches = len(cohort.features(first).coords)
        assert one.mean_colour(first) == pytest.approx(1.5 * (patches - 1) + np.arange(3))
    assert again.mean_colour(other) is not None and cohort.mean_colour(other) is not None
    assert read == ["one", "two"]


def test_patches_without_a_place_have_no_mean_colour(tiny_cohort, monkeypatch):
    cohort, asked = read_cohort(tiny_cohort.records, tiny_cohort.slides, "test"), []
    cohort = cohort._replace(slide_files=dict.fromkeys(cohort.slide_ids, "file"))
    slide = replace(cohort.features(cohort.slide_ids[0]), coords=None)
    monkeypatch.setattr(type(cohort), "features", lambda self, slide_id: asked.append(slide_id) or slide)
    assert cohort.mean_colour(cohort.slide_ids[0]) is cohort.mean_colour(cohort.slide_ids[0]) is None
    assert asked == cohort.slide_ids[:1]
