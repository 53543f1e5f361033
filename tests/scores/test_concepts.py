"""Asserted concepts: phrases and negations by hand, the embedded cohort's reports, figures against scikit-learn."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from data_prep import synthetic
from data_prep.layout import TUMORS
from data_prep.phrasings import NAMES
from data_prep.reports import concept_phrasings
from pathflip_jax.evaluate.prompt_files import read_prompts
from pathflip_jax.scores import concepts, statistics
from pathflip_jax.scores.concepts import Finder, asserted, judge, singular

PHRASINGS = {
    "necrosis": ["necrosis", "necrotic debris", "tumor necrosis"],
    "fat": ["fat", "adipose tissue"],
    "glands": ["glands", "acini with lumens", "papillae"],
    "solid": ["a solid pattern without differentiation"],
    "invasion": ["lymphovascular invasion"],
}
find = Finder(PHRASINGS)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Necrosis is present, and fat.", {"necrosis", "fat"}),
        ("Tumor necrosis; the gland is dilated.", {"necrosis", "glands"}),
        ("An acinus with lumens.", {"glands"}),
        ("A papilla is seen in adipose tissue", {"glands", "fat"}),
        ("There is a solid pattern without differentiation.", {"solid"}),
        ("Solid pattern without differentiation, no necrosis.", {"solid"}),
        ("Fatty change, necrotizing inflammation.", set()),
        ("No necrosis is identified.", set()),
        ("There is no evidence of necrosis, fat or glands.", set()),
        ("Necrosis is absent. Fat is noted.", {"fat"}),
        ("Necrosis and fat are not seen.", set()),
        ("Glands are not clearly identified.", set()),
        ("Negative for necrosis. Glands without fat.", {"glands"}),
        ("The section is free of necrosis, but fat is seen.", {"fat"}),
        ("Necrosis is not seen, fat is present.", {"fat"}),
        ("Fat is present and necrosis is absent.", {"fat"}),
        ("Large areas show fat, necrosis is absent.", {"fat"}),
        ("The tumor doesn't show necrosis.", set()),
        ("Necrosis isn't seen.", set()),
        ("Not only necrosis but also fat is seen.", {"necrosis", "fat"}),
        ("Neither necrosis nor fat is seen.", set()),
        ("Glands without necrosis, with fat.", {"glands", "fat"}),
        ("No necrosis and with glands.", {"glands"}),
        ("Necrosis: absent\nFat: present\nGlands: none", {"fat"}),
        ("Absence of glands; lymphovascular invasion is not specified.", set()),
        ("No detected necrosis.", set()),
        ("Necrosis is extensive and not limited to the center.", {"necrosis"}),
        ("Although necrosis is absent, glands are present.", {"glands"}),
        ("No fat. There is 1.5 cm of necrosis.", {"necrosis"}),
        ("Lympho-vascular invasion", set()),
        ("", set()),
    ],
)
def test_what_a_caption_asserts(caption, expected):
    assert asserted(find(caption)) == expected


def test_the_longest_phrase_counts_once_and_stands_where_it_is_said_to():
    text = "No tumor\u00a0necrosis, but Necrotic debris (focal)."
    mentions = find(text)
    assert [(text[m.start : m.end], m.concept, m.denied) for m in mentions] == [
        ("tumor\u00a0necrosis", "necrosis", True),
        ("Necrotic debris", "necrosis", False),
    ]
    assert find("solid pattern. Without differentiation") == []  # a phrase ends with its sentence


def test_mentions_are_judged_right_or_wrong():
    text = "Necrosis is seen, fat is not identified. No glands. Lymphovascular invasion."
    judged = judge(find(text), {"necrosis", "glands"})
    assert [(row["concept"], row["denied"], row["right"]) for row in judged] == [
        ("necrosis", False, True),
        ("fat", True, True),
        ("glands", True, False),
        ("invasion", False, False),
    ]
    assert text[judged[0]["start"] : judged[0]["end"]] == "Necrosis"


@given(st.lists(st.sampled_from([*"no not with and but . , : \n is seen only absent".split(" "), "fat", "glands"])))
def test_any_text_can_be_read(parts):
    text = " ".join(parts)
    mentions = find(text)
    assert len(mentions) == sum(part in ("fat", "glands") for part in parts)
    assert all(one.end <= other.start for one, other in pairwise(mentions))


def test_plurals_fold_into_their_singular():
    pairs = "glands gland|papillae papilla|acini acinus|biopsies biopsy|masses mass|nuclei nucleus|follicles follicle"
    for many, one in (pair.split() for pair in pairs.split("|")):
        assert singular(many) == singular(one) == one
    for word in ("necrosis", "fibrous", "mass", "fat", "its", "is"):
        assert singular(word) == word


def cohort_reports(seed, folder):
    """The reports of a whole cohort, its slides planned and described but not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_finished", lambda *_: True)
        rows = [synthetic._make_slide(str(folder), slide, seed, 768) for slide in synthetic._patients(100, seed)]
    synthetic._write_tables(folder, rows)
    return rows


def test_every_report_of_the_cohort_is_understood(tmp_path):
    rows = cohort_reports(7, tmp_path)
    phrasings = read_prompts(tmp_path / "concepts.json").classes
    captions, truths = [row["caption"] for row in rows], [row["concepts"] for row in rows]
    patients = [row["patient_id"] for row in rows]
    shifted = captions[1:] + captions[:1]
    found = concepts.score_concepts(captions, truths, patients, phrasings, {"another slide's": shifted})
    for name in ("precision", "recall", "f1"):
        assert found["metrics"][name]["value"] == found["metrics"][name]["low"] == 1.0
        assert 0.2 < found["metrics"][name]["baselines"]["another slide's"]["value"] < 0.7
    assert found["warnings"] == []
    mentions = [mention for judged in found["mentions"] for mention in judged]
    assert all(mention["right"] for mention in mentions) and sum(mention["denied"] for mention in mentions) > 90
    assert all(row["f1"] == 1.0 and row["slides"] == row["asserted"] > 5 for row in found["per_concept"])


def test_the_cohort_names_its_concepts_apart():
    phrasings = concept_phrasings()
    assert list(phrasings) == list(NAMES)
    Finder(phrasings)  # no phrasing of two concepts
    for concept, lists in NAMES.items():
        assert {name.removeprefix("+") for names in lists.values() for name in names} <= set(phrasings[concept])
    assert not [text for texts in phrasings.values() for text in texts if text.startswith("+")]
    assert "papillae" in phrasings["papillary fronds"] and "fibrin" in phrasings["ulcer"]
    for label in TUMORS.values():  # a diagnosis is no finding
        assert Finder(phrasings)(f"Final diagnosis: {label}.") == []


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    names = list(PHRASINGS)
    say = {name: texts[0] for name, texts in PHRASINGS.items()}
    is_true = rng.random((30, len(names))) < 0.4
    said = np.where(rng.random(is_true.shape) < 0.7, is_true, ~is_true)
    captions = [". ".join(say[name] for name, yes in zip(names, row, strict=True) if yes) for row in said]
    truths = [{name for name, yes in zip(names, row, strict=True) if yes} for row in is_true]
    patients = [f"P{i // 2}" for i in range(30)]
    found = concepts.score_concepts(captions, truths, patients, PHRASINGS, {}, seed=3)
    oracle = {"precision": metrics.precision_score, "recall": metrics.recall_score, "f1": metrics.f1_score}
    for name, score in oracle.items():
        entry = found["metrics"][name]
        assert entry["value"] == pytest.approx(score(is_true, said, average="micro"))
        draws = [
            score(np.repeat(is_true, row.astype(int), 0), np.repeat(said, row.astype(int), 0), average="micro")
            for row in statistics.patient_weights(patients, seed=3)[:200]
        ]
        assert abs(np.quantile(draws, 0.025) - entry["low"]) < 0.03
        by_concept = score(is_true, said, average=None)
        assert [row[name] for row in found["per_concept"]] == pytest.approx(by_concept)


def test_captions_that_assert_nothing():
    found = concepts.score_concepts(
        ["No fat.", ""], [{"fat"}, set()], ["p", "q"], PHRASINGS, {statistics.TEXT_ONLY: ["fat"] * 2}
    )
    assert np.isnan(found["metrics"]["precision"]["value"])
    assert (found["metrics"]["recall"]["value"], found["metrics"]["f1"]["value"]) == (0, 0)
    assert found["warnings"][0].startswith("no better than without the slide in precision, recall, f1")


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="'the Fat' belongs to the concepts 'a' and 'b'"):
        Finder({"a": ["fat"], "b": ["the Fat"]})
    with pytest.raises(ValueError, match="concept 'a': the phrasing 'the' has no words"):
        Finder({"a": ["the"]})
    with pytest.raises(ValueError, match="no phrasings for the true concepts mucin"):
        concepts.score_concepts(["fat"], [{"mucin"}], ["p"], PHRASINGS, {})
    with pytest.raises(ValueError, match="truths: 2 for 1 slides"):
        concepts.score_concepts(["fat"], [set(), set()], ["p"], PHRASINGS, {})


def test_the_cohort_writes_the_same_concepts_always(tmp_path):
    synthetic._write_tables(tmp_path, [])
    assert json.loads((tmp_path / "concepts.json").read_text()) == concept_phrasings()
