"""Runs that come with the package, by name."""

import json
from pathlib import Path

import numpy as np
import pytest

import pathflip_jax as pf
from pathflip_jax.runs import bundled


def test_a_name_finds_its_folder_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "package")
    assert bundled.names() == [] and bundled.find("colon") == "colon"
    (tmp_path / "package" / "colon").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert bundled.names() == ["colon"]
    for place in ("colon", Path("colon")):
        assert bundled.find(place) == tmp_path / "package" / "colon"
    assert bundled.find("gs://bucket/colon") == "gs://bucket/colon" and bundled.find("runs/colon") == "runs/colon"
    (tmp_path / "colon").mkdir()
    assert bundled.find("colon") == "colon"


@pytest.mark.parametrize("name", bundled.names())
def test_a_bundled_run_is_small_and_comes_with_card_and_scores(name):
    folder = bundled.FOLDER / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    card = (folder / "README.md").read_text()
    assert "For research use only" in card and "licence CC BY 4.0" in card and "not a general model" in card
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["split"] == "test" and not {"runs", "command"} & set(scores)
    assert f"| {scores['grounding']['auc']['value']:.3f} |" in card


def test_the_colon_biopsies_load_by_name_and_know_their_words():
    model = pf.load("colon-biopsy")
    classes = ["A section of adenocarcinoma.", "A section of normal mucosa."]
    asked = ["infiltrating malignant glands in desmoplastic stroma", "straight crypts of even size with goblet cells"]
    known, found = (model.encode_text(texts) for texts in (classes, asked))
    known, found = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (known, found))
    cosines = found @ known.T
    assert cosines.argmax(1).tolist() == [0, 1] and np.diagonal(cosines).min() > 0.2
