"""Scores of a language stage: an oracle scores 1, and a model that ignores the slide is reported."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import finish_folder, shard_name, write_shard
from pathflip_jax.data.texts.conversations import DESCRIBE, read_conversations
from pathflip_jax.evaluate import run
from pathflip_jax.evaluate.cohort import read_cohort
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.tasks import language
from pathflip_jax.evaluate.tasks.language import ANOTHER, GENERATION, LIKELIHOOD, Inputs, pieces, score_language
from pathflip_jax.inference.assistant import EncodedPrompt
from pathflip_jax.llm.sampling import Sampling

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data")) / "text"
SAMPLING = Sampling(max_new_tokens=8)
CONCEPTS = {"fat": ["fat"], "necrosis": ["necrosis"], "mucin": ["mucin"], "lymphoid": ["lymphoid aggregates"]}


class Knowing:
    """Writes the true report of a slide that it is shown, and the right answer; without one always the same."""

    config = {"data": {"template": "plain"}}

    def __init__(self, reports: dict[str, str], looks: bool = True) -> None:
        self.reports, self.looks, self.asked = reports, looks, []

    def embed_slides(self, slides):
        for bag in slides:
            yield [slide.slide_id for slide in bag]

    def prompt(self, asked, slide):
        return EncodedPrompt(asked, slide)

    def answer(self, prompts, sampling):
        self.asked += [prompt.tokens for prompt in prompts]
        return [self._report(prompt.slide) for prompt in prompts]

    def choose(self, prompts, answers):
        def belief(slide, letters):
            right = "A" if self.looks and slide is not None and self._report(slide).find("Fat") >= 0 else "B"
            return np.log([0.7 if letter == right else 0.3 / (len(letters) - 1) for letter in letters])

        return [belief(prompt.slide, letters) for prompt, letters in zip(prompts, answers, strict=True)]

    def _report(self, slide):
        return self.reports[slide[0]] if slide is not None and self.looks else "There is a tumor, and mucin."


@pytest.fixture
def reports(tiny_cohort):
    return {talk.slide_ids[0]: talk.turns[0].answer for talk in read_conversations(tiny_cohort.texts)}


@pytest.fixture
def questions(reports, tmp_path):
    rows = [
        {"slide_id": slide, "question": "Is fat there?", "options": {"A": "Yes", "B": "No"},
         "answer": "A" if "Fat" in text else "B", "broad category": "Morphology", "narrow category": "Fat"}
        for slide, text in reports.items()
    ]  # fmt: skip
    rows += [{"slide_id": slide, "question": "What is there?", "answer": text} for slide, text in reports.items()]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def score(tiny_cohort, questions, monkeypatch):
    def make(assistant, **more):
        monkeypatch.setattr(language, "load_assistant", lambda folder: assistant)
        cohort = read_cohort(tiny_cohort.records, tiny_cohort.slides, "train")
        inputs = Inputs(tiny_cohort.texts, questions, CONCEPTS, SAMPLING)._replace(**more)
        return score_language("run", cohort, inputs)

    return make


def test_who_knows_the_reports_scores_one(score, reports):
    assistant = Knowing(reports)
    found, _, tables, warnings, config = score(assistant)
    assert warnings == found["warnings"]
    captions, asked = found["captions"], found["questions"]
    assert captions["captions"] == 12 and captions["patients"] == 10 and config is assistant.config
    for name in ("BLEU-4", "ROUGE-L"):
        assert captions["words"][name]["value"] == pytest.approx(1)
    f1 = captions["concepts"]["f1"]
    assert f1["value"] == 1 and f1["baselines"]["text only"]["value"] < 0.5 < f1["difference"]["text only"]["low"]
    assert set(f1["baselines"]) == {"text only", ANOTHER} and f1["baselines"][ANOTHER]["value"] < 1
    for how in (LIKELIHOOD, GENERATION):
        assert set(asked["choices"][how]["accuracy"]["baselines"]) >= {"text only", "chance"}
    assert asked["choices"][LIKELIHOOD]["accuracy"]["value"] == 1
    assert asked["choices"][LIKELIHOOD]["by_broad_category"]["Morphology"]["value"] == 1
    assert asked["choices"][GENERATION]["unparsed"]["answers"] > 0, "a report names no letter"
    assert asked["open"]["metrics"]["exact match"]["value"] == 1
    assert not any(warning.startswith("captions") and "without the slide" in warning for warning in found["warnings"])
    assert len(tables["captions"]) == 12 and len(tables["answers"]) == 24
    assert {row["by_likelihood"] for row in tables["answers"] if row["question"].startswith("Is")} <= {"A", "B"}
    assert assistant.asked.count("<image>\n" + DESCRIBE) == 12 + 1, "what is asked in the same words is answered once"


def test_who_never_looks_is_told_so(score, reports):
    found = score(Knowing(reports, looks=False)).scores
    f1 = found["captions"]["concepts"]["f1"]
    assert f1["value"] == f1["baselines"]["text only"]["value"] and f1["difference"]["text only"]["high"] == 0
    for part in ("captions", "choices, by likelihood", "choices, by generation", "open questions"):
        assert any(w.startswith(f"{part}: no better than without the slide") for w in found["warnings"]), part


def test_examples_go_from_the_best_to_the_worst(score, reports):
    half = {slide: text if int(slide[1:]) % 2 else "Only mucin." for slide, text in reports.items()}
    examples = score(Knowing(half)).scores["captions"]["examples"]
    assert [e["f1"] for e in examples] == sorted((e["f1"] for e in examples), reverse=True)
    assert examples[0]["f1"] == 1 > examples[-1]["f1"] == 0
    kinds = {piece["kind"] for example in examples for piece in example["written"]}
    assert {"right", "wrong", ""} <= kinds and examples[-1]["missed"]
    for example in examples:
        assert "".join(piece["text"] for piece in example["reference"]) == reports[example["slide_ids"][0]]


def test_pieces_lose_no_letter():
    mentions = [
        {"start": 0, "end": 3, "concept": "fat", "denied": False, "right": True},
        {"start": 8, "end": 13, "concept": "mucin", "denied": True, "right": True},
    ]
    found = pieces("Fat, no mucin.", mentions)
    assert [piece["kind"] for piece in found] == ["right", "", "denied", ""]
    assert "".join(piece["text"] for piece in found) == "Fat, no mucin."


def test_the_report_shows_them_side_by_side(score, tiny_cohort, reports, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "load_assistant", lambda folder: Knowing(reports))
    monkeypatch.setattr(run, "is_language_run", lambda folder: True)
    (tmp_path / "concepts.json").write_text(json.dumps(CONCEPTS))
    inputs = {"records": tiny_cohort.records, "slides": tiny_cohort.slides, "texts": tiny_cohort.texts}
    found = run.evaluate(EvaluationSpec(
        run=tmp_path / "lm", **inputs, split="train", questions=questions, concepts=tmp_path / "concepts.json",
        out=tmp_path / "scores",
    ))  # fmt: skip
    page = (tmp_path / "scores" / "report.html").read_text()
    assert found["language"]["captions"]["concepts"]["f1"]["value"] == 1 and found["runs"] == []
    for text in (
        "Captions: F1 of the concepts",
        '<mark class="right">',
        "Multiple choice, by likelihood",
        "Morphology",
    ):
        assert text in page, text
    for name in ("captions.csv", "answers.csv", "scores.json"):
        assert (tmp_path / "scores" / name).stat().st_size > 100


def test_a_report_of_open_questions_alone(tiny_cohort, reports, tmp_path, monkeypatch):
    """On one slide: a page without options, and without a single interval."""
    monkeypatch.setattr(language, "load_assistant", lambda folder: Knowing(reports))
    monkeypatch.setattr(run, "is_language_run", lambda folder: True)
    slide = min(reports)
    row = {"slide_id": slide, "question": "What is there?", "answer": reports[slide]}
    (tmp_path / "open.jsonl").write_text(json.dumps(row) + "\n")
    inputs = {"records": tiny_cohort.records, "slides": tiny_cohort.slides, "questions": tmp_path / "open.jsonl"}
    found = run.evaluate(EvaluationSpec(run=tmp_path / "lm", **inputs, split="train", out=tmp_path / "scores"))
    exact = found["language"]["questions"]["open"]["metrics"]["exact match"]
    assert (exact["value"], exact["low"], exact["difference"]["text only"]["low"]) == (1, None, None)
    assert "Open questions: exact match" in (tmp_path / "scores" / "report.html").read_text()


def test_wrong_input_is_named(score, tiny_cohort, reports, tmp_path):
    inputs = {"records": tiny_cohort.records, "slides": tiny_cohort.slides, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="nothing to ask the language stage"):
        run.evaluate(EvaluationSpec(run=tmp_path / "nowhere", **inputs, language=tmp_path / "lm"))
    (tmp_path / "other.jsonl").write_text(json.dumps({"slide_id": "S20", "caption": "Fat."}) + "\n")
    with pytest.raises(ValueError, match="none of its texts belongs to a slide of the split"):
        score(Knowing(reports), texts=tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="pass it as --language"):
        run.evaluate(
            EvaluationSpec(run=tmp_path / "nowhere", **inputs, texts=tiny_cohort.texts, concepts=tmp_path / "c.json")
        )


TABLES = {
    "SlideBench-Caption-TCGA.csv": ("captions", 1),
    "SlideBench-VQA-TCGA.csv": ("choices", 2),
    "WSIBench_Regional_Structure_Description_test.json": ("open", 1),
    "WsiVQA_test.json": ("choices", 0),
}


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_are_scored_as_they_are(name, tmp_path, monkeypatch):
    """Records of the slides that a table names first; the table itself is read as it was published."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no real tables: {path} is absent, set PATHFLIP_TEST_DATA")
    part, least = TABLES[name]
    talks = read_conversations(path)
    slides = list(dict.fromkeys(slide for talk in talks for slide in talk.slide_ids or (talk.case_id,)))[:6]
    records = tmp_path / "records"
    records.mkdir()
    rng = np.random.default_rng(0)
    coords = np.array([[0, 0], [64, 0]], np.int32)
    place = {"coords": coords, "patch_size": 64, "mpp": 0.5, "width": 128, "height": 64}
    made = [SlideFeatures(s, s[:12], rng.normal(size=(2, 4)).astype(np.float32), encoder="e", **place) for s in slides]
    write_shard(records / shard_name(0), made, edge_um=64.0)
    finish_folder(records, edge_um=64.0)
    (tmp_path / "slides.csv").write_text(
        "slide_id,patient_id,split\n" + "".join(f"{s},{s[:12]},test\n" for s in slides)
    )
    monkeypatch.setattr(language, "load_assistant", lambda folder: Knowing({s: "B. Fat." for s in slides}))
    cohort = read_cohort(records, tmp_path / "slides.csv", "test")
    tables = (path, None) if part == "captions" else (None, path)
    found, _, rows, _, _ = score_language("run", cohort, Inputs(*tables, None, SAMPLING))
    if part == "captions":
        assert found["captions"]["captions"] == len(rows["captions"]) >= 6
        assert all(len(row["asked"]) > 40 and row["asked"].startswith("<image>") for row in rows["captions"])
        return
    scored = found["questions"][part]
    scored = scored[LIKELIHOOD] if part == "choices" else scored
    assert len(rows["answers"]) >= 6 and all(row["answer"] for row in rows["answers"])
    if least:
        assert len(scored.get("by_broad_category", {"": 0})) >= 1
    if part == "choices":
        assert 0 <= scored["accuracy"]["value"] <= 1 and "most frequent letter" in scored["accuracy"]["baselines"]
