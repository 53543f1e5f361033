"""Question answering: letters parsed as written, accuracy with blind baselines, on synthetic and real questions."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.texts.text import Question, read_questions
from pathflip_jax.evaluate.tasks import vqa
from pathflip_jax.evaluate.tasks.vqa import parse_choice
from pathflip_jax.scores import statistics

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
OPTIONS = {
    "A": "Squamous cell carcinoma",
    "B": "Small cell lung carcinoma",
    "C": "Papillary adenocarcinoma",
    "D": "A lesion without atypia",
}


def question(number, answer, category="Grading", broad="Diagnosis", options=OPTIONS):
    return Question(str(number), (f"S{number}",), f"P{number}", "Which?", answer, dict(options), category, broad)


@pytest.mark.parametrize(
    "generated",
    [
        "B",
        "b",
        " B.\n",
        "(B)",
        "[B]",
        "**B**",
        "B)",
        "B: Small cell lung carcinoma",
        "B) Small cell lung carcinoma",
        "B. The cells are small.",
        "Answer: B",
        "answer: **B**",
        "Answer:\nB",
        "The answer is B",
        "The answer is B) because the cells are small and A is a different tumor.",
        "The correct answer is (B).",
        "Option B is right.",
        "I choose option (B), not a squamous one.",
        "Small cell lung carcinoma",
        "small-cell is wrong, it is: small cell lung carcinoma.",
        "The answer is Small cell lung carcinoma.",
        "The most likely diagnosis is a small cell lung carcinoma, given the nuclei.",
        "Option A is unlikely. The answer is B.",
        "It must be B",
        "A tumor of small cells, so B is best.",
    ],
)
def test_a_letter_is_read_as_it_is_written(generated):
    assert parse_choice(generated, OPTIONS) == "B"


@pytest.mark.parametrize(
    "generated",
    [
        "",
        "   ",
        "I cannot say.",
        "A tumor of unknown origin",
        "A or B",
        "B and C",
        "Answer: B, C",
        "The answer is A. The answer is B.",
        "E",
        "Answer: E",
        "A) Squamous cell carcinoma\nB) Small cell lung carcinoma\nC) Papillary adenocarcinoma",
        "Squamous cell carcinoma or papillary adenocarcinoma",
        "carcinoma",
        "HER2-B status and grade-C",
    ],
)
def test_none_or_several_is_no_answer(generated):
    assert parse_choice(generated, OPTIONS) is None


def test_the_text_of_an_option_goes_before_the_letters_in_it():
    assert parse_choice("A lesion without atypia", OPTIONS) == "D"
    assert parse_choice("Answer: a lesion without atypia", OPTIONS) == "D"
    assert parse_choice("Hepatitis B", {"A": "Hepatitis B", "B": "Hepatitis A"}) == "A"
    grades = {"A": "Grade 1", "B": "Grade 1 of 3", "C": "Grade 2"}
    assert parse_choice("It is grade 1 of 3.", grades) == "B"
    assert parse_choice("It is grade 1.", grades) == "A"
    assert parse_choice("It is grade 1.5.", grades) is None  # a decimal is one word
    assert parse_choice("same", {"A": "same", "B": "Same."}) is None
    assert parse_choice("B", {}) is None


letters = st.dictionaries(st.sampled_from("ABCDEFGH"), st.text(max_size=12), max_size=5)
fragments = st.sampled_from(
    ["answer", "is", ":", "option", "A", "B", "(", ")", "C.", "and", "\n", " ", "a ", "The ", "*"]
)


@given(st.one_of(st.text(max_size=60), st.lists(fragments, max_size=14).map("".join)), letters)
def test_a_letter_that_is_read_is_an_option(generated, options):
    found = parse_choice(generated, options)
    assert found is None or found in options


@given(
    st.sampled_from("ABCD"), st.sampled_from(["{}", "{}.", "({})", "Answer: {}", "The answer is {}.", "Option {}\n"])
)
def test_every_letter_reads_alike(letter, frame):
    assert parse_choice(frame.format(letter), OPTIONS) == letter


def test_accuracy_stands_beside_what_knows_nothing():
    two = {"A": "yes", "B": "no"}
    asked = [question(i, "ABCB"[i % 4]) for i in range(12)] + [
        question(12 + i, "B", "Staging", "Clinical", two) for i in range(4)
    ]
    patients = [f"P{i // 2}" for i in range(16)]
    answers = [f"Answer: {q.answer}" for q in asked]
    answers[0] = "I cannot say."
    blind = ["B"] * 16
    found = vqa.score_choices(asked, answers, patients, {statistics.TEXT_ONLY: blind})
    entry = found["accuracy"]
    assert (entry["questions"], found["patients"], found["most_frequent_letter"]) == (16, 8, "B")
    assert entry["value"] == pytest.approx(15 / 16) and entry["low"] <= entry["value"] <= entry["high"]
    assert entry["baselines"]["chance"]["value"] == pytest.approx((12 / 4 + 4 / 2) / 16)
    assert entry["baselines"]["most frequent letter"]["value"] == pytest.approx(10 / 16)
    assert entry["baselines"]["text only"]["value"] == pytest.approx(10 / 16)
    assert entry["difference"]["text only"]["value"] == pytest.approx(5 / 16)
    assert found["unparsed"] == {"answers": 1 / 16, "text only": 0.0}
    assert list(found["by_category"]) == ["Grading", "Staging"]
    assert list(found["by_broad_category"]) == ["Clinical", "Diagnosis"]
    assert found["by_category"]["Grading"]["value"] == pytest.approx(11 / 12)
    assert found["by_broad_category"]["Clinical"]["baselines"]["chance"]["value"] == pytest.approx(1 / 2)
    # In "Staging" every answer is B, and always B is as good as any model.
    without = [text for text in found["warnings"] if "without the slide" in text]
    assert len(without) == 1 and "Staging" in without[0] and "accuracy" not in without[0]


def test_the_interval_is_that_of_drawn_patients():
    asked = [question(i, "AB"[i % 2]) for i in range(10)]
    patients = [f"P{i // 3}" for i in range(10)]
    answers = ["A"] * 10
    entry = vqa.score_choices(asked, answers, patients, {}, seed=4)["accuracy"]
    weights = statistics.patient_weights(patients, seed=4)
    right = np.array([q.answer == "A" for q in asked])
    draws = [np.average(right, weights=row) for row in weights]
    np.testing.assert_allclose([entry["low"], entry["high"]], np.quantile(draws, [0.025, 0.975]))


def test_a_model_that_does_not_look_is_told_so():
    asked = [question(i, "ABCD"[i % 4]) for i in range(40)]
    answers = [q.answer if i % 2 else "D" for i, q in enumerate(asked)]
    found = vqa.score_choices(asked, answers, [q.case_id for q in asked], {statistics.TEXT_ONLY: answers})
    assert any(text.startswith("no better than without the slide in accuracy") for text in found["warnings"])
    difference = found["accuracy"]["difference"]["text only"]
    assert difference == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_open_answers_match_but_for_case_marks_and_articles():
    asked = [question(i, text, options={}) for i, text in enumerate(["The left breast.", "no", "70 mm", "pT2b"])]
    answers = ["left breast", "No.", "80 mm", "pT2b"]
    found = vqa.score_open(asked, answers, list("abcd"), {statistics.TEXT_ONLY: ["no"] * 4})
    assert next(iter(found["metrics"])) == "exact match"
    exact = found["metrics"]["exact match"]
    assert exact["value"] == pytest.approx(3 / 4) and exact["baselines"]["text only"]["value"] == pytest.approx(1 / 4)
    assert {"BLEU-1", "ROUGE-L", "CIDEr"} <= found["metrics"].keys()
    assert found["metrics"]["BLEU-1"]["value"] == pytest.approx(5 / 6 * np.exp(1 - 7 / 6))  # "the" is missing


def test_what_cannot_be_scored_is_refused():
    asked = [question(0, "A"), question(1, "B")]
    with pytest.raises(ValueError, match="answers: 1 for 2 questions"):
        vqa.score_choices(asked, ["A"], ["p", "q"], {})
    with pytest.raises(ValueError, match="text only: 3 for 2 questions"):
        vqa.score_choices(asked, ["A", "B"], ["p", "q"], {"text only": ["A"] * 3})
    with pytest.raises(ValueError, match="question 7 has no options; `score_open`"):
        vqa.score_choices([question(7, "yes", options={})], ["A"], ["p"], {})


def test_always_b_on_the_real_questions():
    path = DATA / "text" / "SlideBench-VQA-TCGA.csv"
    if not path.exists():
        pytest.skip(f"no real questions: {path} is absent, set PATHFLIP_TEST_DATA")
    asked = read_questions(path)
    patients = [q.case_id for q in asked]
    found = vqa.score_choices(
        asked, [q.options[q.answer] for q in asked], patients, {statistics.TEXT_ONLY: ["B"] * 1489}
    )
    entry = found["accuracy"]
    assert found["most_frequent_letter"] == "B"
    assert round(entry["baselines"]["most frequent letter"]["value"], 3) == 0.414  # as counted in STACK
    assert entry["baselines"]["text only"] == entry["baselines"]["most frequent letter"]
    assert 0.2 < entry["baselines"]["chance"]["value"] < 0.35
    broad = {name: row["questions"] for name, row in found["by_broad_category"].items()}
    assert broad == {"Clinical": 101, "Diagnosis": 999, "Microscopy": 389}
    assert len(found["by_category"]) == 13
    # The text of the right option is read as its letter, but where two options have the same text.
    twice = [q for q in asked if Counter(text.lower() for text in q.options.values())[q.options[q.answer].lower()] > 1]
    assert round(entry["value"] * 1489) == 1489 - len(twice)
    assert found["unparsed"]["answers"] == pytest.approx(len(twice) / 1489)
