"""Captions and answers of a language stage about the slides of a split, and their scores.

Everything is asked twice, with the slide and without it: reports are alike and questions give hints, so only what a
model gains by the slide says that it has looked (DESIGN section 8). A caption of another patient's slide stands beside
both.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.failures import some
from pathflip_jax.data.texts.conversations import ask, match_conversations, read_conversations
from pathflip_jax.data.texts.text import Question, match_slides, read_questions
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.tasks import vqa
from pathflip_jax.inference.assistant import Asked, Rows, SlideAssistant, load_assistant
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.scores import concepts, statistics

ANOTHER = "another slide's caption"
LIKELIHOOD, GENERATION = "by_likelihood", "by_generation"  # how a choice among options is read
EXAMPLES = 6


class Caption(NamedTuple):
    """A report of a slide (or of the slides of a case), what it answers, and what was written with and without it."""

    slide_ids: tuple[str, ...]
    patient: str
    asked: str
    reference: str
    written: str
    text_only: str


class Answers(NamedTuple):
    """Questions with the answers that were given with the slide and without it, by how they were given."""

    questions: list[Question]
    patients: list[str]
    given: dict[str, list[str]]
    text_only: dict[str, list[str]]


class SlideRows:
    """[slide; regions] of the slides of a cohort, embedded when first asked for; several slides are one bag."""

    def __init__(self, assistant: SlideAssistant, cohort: Cohort) -> None:
        self._assistant, self._cohort = assistant, cohort
        self._found: dict[tuple[str, ...], Rows] = {}

    def __call__(self, bags: Sequence[tuple[str, ...]]) -> list[Rows]:
        """The rows of each bag, in their order."""
        missing = [bag for bag in dict.fromkeys(bags) if bag not in self._found]
        slides = (self._features(bag) for bag in tqdm(missing, desc="slides", unit="slide", disable=None))
        self._found |= zip(missing, self._assistant.embed_slides(slides), strict=True)
        return [self._found[bag] for bag in bags]

    def _features(self, bag: tuple[str, ...]) -> list[SlideFeatures]:
        return [self._cohort.features(slide) for slide in bag]


def evaluate_language(
    folder, cohort: Cohort, *, captions=None, questions=None, phrasings=None, sampling: Sampling, seed: int = 0
) -> tuple[dict, dict[str, list[dict]], dict]:
    """Score a run of the language stage: what scores.json holds of it, the rows of its tables, and its config.

    `captions` is a table of reports, `questions` one of questions, `phrasings` names the concepts to look for in
    captions. Raises ValueError where there is neither of the first two, and for tables about other slides.
    """
    if captions is None and questions is None:
        raise ValueError("nothing to ask the language stage: give a table of reports, or one of questions")
    assistant = load_assistant(folder)
    rows, found, tables = SlideRows(assistant, cohort), {"run": str(folder)}, {}
    if captions is not None:
        written = write_captions(assistant, cohort, rows, captions, sampling)
        found["captions"] = score_captions(written, phrasings, seed)
        tables["captions"] = [caption._asdict() | {"slide_ids": "+".join(caption.slide_ids)} for caption in written]
    if questions is not None:
        choices, open_ended = answer_questions(assistant, cohort, rows, questions, sampling)
        found["questions"] = score_answers(choices, open_ended, seed)
        tables["answers"] = [row for answers in (choices, open_ended) if answers for row in _answer_rows(answers)]
    found["warnings"] = _warnings(found)
    return found, tables, assistant.config


def write_captions(
    assistant: SlideAssistant, cohort: Cohort, rows: SlideRows, table, sampling: Sampling
) -> list[Caption]:
    """A caption of every report of the table that is about slides of the cohort, asked as the table asks.

    Raises ValueError for a table with none, and as `SlideAssistant.answer`.
    """
    slide_ids = cohort.records.slides.column("slide_id")
    patient_of = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    talks = match_conversations(read_conversations(table), slide_ids, cohort.cases)
    kept = [(talk, tuple(slide for slide in talk.slide_ids if slide in patient_of)) for talk in talks]
    kept = [(talk, slides) for talk, slides in kept if slides]
    if not kept:
        raise ValueError(f"{table}: none of its texts belongs to a slide of the split ({some(cohort.slide_ids)})")
    asked = [talk.turns[0].asked for talk, _ in kept]
    shown = rows([slides for _, slides in kept])
    written = assistant.answer([assistant.prompt(a, x) for a, x in zip(asked, shown, strict=True)], sampling)
    blind = _answer_once(assistant, [assistant.prompt(a, None) for a in asked], asked, sampling)
    return [
        Caption(slides, patient_of[slides[0]], talk.turns[0].asked, talk.turns[0].answer, *texts)
        for (talk, slides), *texts in zip(kept, written, blind, strict=True)
    ]


def answer_questions(
    assistant: SlideAssistant, cohort: Cohort, rows: SlideRows, table, sampling: Sampling
) -> tuple[Answers | None, Answers | None]:
    """Answers to the questions of a table about slides of the cohort: those with options, and the open ones.

    Options are chosen by the likelihood of their letters, and by what is generated, as published scripts do. Raises
    ValueError for a table with no question about them.
    """
    slide_ids = cohort.records.slides.column("slide_id")
    patient_of = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    questions = read_questions(table)
    found = match_slides(
        [(question.slide_ids, question.case_id) for question in questions],
        slide_ids,
        cohort.cases,
    )
    bags = [tuple(slide for slide in slides if slide in patient_of) for slides in found]
    kept = [(question, bag) for question, bag in zip(questions, bags, strict=True) if bag]
    if not kept:
        raise ValueError(f"{table}: none of its questions is about a slide of the split ({some(cohort.slide_ids)})")
    outcomes = []
    for with_options in (True, False):
        own = [(question, bag) for question, bag in kept if bool(question.options) == with_options]
        if not own:
            outcomes.append(None)
            continue
        questions, bags = ([pair[i] for pair in own] for i in (0, 1))
        asked, shown = [ask(question) for question in questions], rows(bags)
        prompts = [assistant.prompt(a, x) for a, x in zip(asked, shown, strict=True)]
        blind = [assistant.prompt(a, None) for a in asked]
        given = {GENERATION: assistant.answer(prompts, sampling)}
        text_only = {GENERATION: _answer_once(assistant, blind, asked, sampling)}
        if with_options:
            given[LIKELIHOOD] = likeliest(assistant, prompts, questions)
            text_only[LIKELIHOOD] = likeliest(assistant, blind, questions)
        outcomes.append(Answers(questions, [patient_of[bag[0]] for bag in bags], given, text_only))
    return outcomes[0], outcomes[1]


def choice_shares(
    assistant: SlideAssistant, prompts: Sequence[Asked], options: Sequence[Mapping[str, str]]
) -> list[dict]:
    """The share of belief in each letter, by the likelihood of the letter as the answer."""
    found = assistant.choose(prompts, [list(letters) for letters in options])
    shares = []
    for letters, likelihood in zip(options, found, strict=True):
        belief = np.exp(likelihood - likelihood.max())
        shares.append(dict(zip(letters, (belief / belief.sum()).tolist(), strict=True)))
    return shares


def likeliest(assistant: SlideAssistant, prompts: Sequence[Asked], questions: Sequence[Question]) -> list[str]:
    """The likeliest letter of each question."""
    shares = choice_shares(assistant, prompts, [question.options for question in questions])
    return [max(own, key=own.get) for own in shares]


def score_captions(captions: Sequence[Caption], phrasings: Mapping[str, Sequence[str]] | None, seed: int) -> dict:
    """Scores of captions beside those written without the slide and those of another patient's slide.

    The words are scored where NLTK and rouge-score are installed (extra [language]); with `phrasings` of concepts,
    those that a caption asserts against those that the report asserts.
    """
    patients = [caption.patient for caption in captions]
    written, references = ([getattr(c, name) for c in captions] for name in ("written", "reference"))
    others = {statistics.TEXT_ONLY: [c.text_only for c in captions]}
    other = _another(patients, seed)
    if other is not None:
        others[ANOTHER] = [written[i] for i in other]
    found: dict = {"captions": len(captions), "patients": len(set(patients)), "warnings": []}
    if all(importlib.util.find_spec(name) for name in ("nltk", "rouge_score")):
        from pathflip_jax.scores import captioning

        words = captioning.score_captions(written, references, patients, others, seed)
        found |= {"words": words["metrics"]}
        found["warnings"] += words["warnings"]
    else:
        found["warnings"].append("words are not scored: NLTK and rouge-score are missing (extra [language])")
    if phrasings is not None:
        finder = concepts.Finder(phrasings)
        truths = [concepts.asserted(finder(text)) for text in references]
        named = concepts.score_concepts(written, truths, patients, phrasings, others, seed)
        found |= {"concepts": named["metrics"], "per_concept": named["per_concept"]}
        found["warnings"] += named["warnings"]
        found["examples"] = _examples(captions, truths, named["mentions"], finder)
    return found


def score_answers(choices: Answers | None, open_ended: Answers | None, seed: int) -> dict:
    """Scores of answers beside those given without the slide, chance and the most frequent letter."""
    found: dict = {}
    if choices is not None:
        found["choices"] = {
            how: vqa.score_choices(
                choices.questions, given, choices.patients, {statistics.TEXT_ONLY: choices.text_only[how]}, seed
            )
            for how, given in choices.given.items()
        }
    if open_ended is not None:
        others = {statistics.TEXT_ONLY: open_ended.text_only[GENERATION]}
        found["open"] = vqa.score_open(
            open_ended.questions, open_ended.given[GENERATION], open_ended.patients, others, seed
        )
    return found


def _answer_rows(answers: Answers) -> list[dict]:
    rows = []
    for i, question in enumerate(answers.questions):
        row = {"question_id": question.question_id, "patient": answers.patients[i], "question": ask(question)}
        row |= {"category": question.category, "answer": question.answer}
        for how in (LIKELIHOOD, GENERATION):
            row[how] = answers.given.get(how, [""] * (i + 1))[i]
            row[f"{how}_text_only"] = answers.text_only.get(how, [""] * (i + 1))[i]
        rows.append(row)
    return rows


def _warnings(found: dict) -> list[str]:
    """What the parts warn of, each with the part that it is about."""
    parts = {"captions": found.get("captions", {})}
    asked = found.get("questions", {})
    parts |= {f"choices, {how.replace('_', ' ')}": part for how, part in asked.get("choices", {}).items()}
    parts |= {"open questions": asked.get("open", {})}
    return [f"{name}: {text}" for name, part in parts.items() for text in part.get("warnings", [])]


def _answer_once(
    assistant: SlideAssistant, prompts: Sequence[Asked], asked: Sequence[str], sampling: Sampling
) -> list[str]:
    """Answers without a slide: what is asked in the same words is answered once."""
    first = {text: i for i, text in reversed(list(enumerate(asked)))}
    found = dict(zip(first, assistant.answer([prompts[i] for i in first.values()], sampling), strict=True))
    return [found[text] for text in asked]


def _another(patients: Sequence[str], seed: int) -> list[int] | None:
    """For each caption one of another patient, drawn; None where there is but one patient."""
    names = np.array(patients)
    if len(set(patients)) < 2:
        return None
    rng = np.random.default_rng(seed)
    return [int(rng.choice(np.flatnonzero(names != name))) for name in names]


def _examples(captions: Sequence[Caption], truths: list[set[str]], mentions: list[list[dict]], finder) -> list[dict]:
    """Captions from the best to the worst by the F1 of their concepts, evenly spaced, with their mentions."""

    def f1(i: int) -> float:
        named = {mention["concept"] for mention in mentions[i] if not mention["denied"]}
        return 2 * len(named & truths[i]) / max(len(named) + len(truths[i]), 1)

    order = sorted(range(len(captions)), key=f1, reverse=True)
    chosen = [order[i] for i in np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).round().astype(int)]
    return [
        {
            "slide_ids": list(captions[i].slide_ids),
            "f1": f1(i),
            "reference": pieces(captions[i].reference, concepts.judge(finder(captions[i].reference), truths[i])),
            "written": pieces(captions[i].written, mentions[i]),
            "missed": sorted(truths[i] - {m["concept"] for m in mentions[i] if not m["denied"]}),
        }
        for i in chosen
    ]


def pieces(text: str, mentions: Sequence[dict]) -> list[dict]:
    """A text cut at its mentions: {"text", "kind"}, of kind "right", "wrong", "denied" or ""."""
    found, start = [], 0
    for mention in mentions:
        kind = ("denied" if mention["denied"] else "right") if mention["right"] else "wrong"
        found += [{"text": text[start : mention["start"]], "kind": ""}]
        found += [{"text": text[mention["start"] : mention["end"]], "kind": kind}]
        start = mention["end"]
    return [piece for piece in [*found, {"text": text[start:], "kind": ""}] if piece["text"]]
