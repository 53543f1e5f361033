"""Captions and answers of the language stage about the slides of a split, and their metrics.

Every prompt is answered with and without the slide, because reports resemble each other and questions contain hints:
the gain over the text-only answer is what the model gets from the slide (DESIGN section 8). A second baseline of
captions is the caption of another patient's slide.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.conversations import ask, match_conversations, read_conversations
from pathflip_jax.data.texts.text import Question, match_slides, read_questions
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.prompt_files import read_prompts
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.task import SHARE, Headline, Part, Predictions, Setting, Task, headline_with_baselines
from pathflip_jax.evaluate.tasks import vqa
from pathflip_jax.inference.assistant import EncodedPrompt, Rows, SlideAssistant, load_assistant
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.scores import concepts, statistics

KEY = "language"
ANOTHER = "another slide's caption"
LIKELIHOOD, GENERATION = "by_likelihood", "by_generation"  # two ways to determine the chosen option
EXAMPLES = 6


class Inputs(NamedTuple):
    """The tables of reports and questions, the phrasings of the concepts to find in captions, and how to generate."""

    texts: str | Path | None
    questions: str | Path | None
    concepts: Mapping[str, Sequence[str]] | None
    sampling: Sampling


class Caption(NamedTuple):
    """A report of a slide (or of a case), its prompt, and the captions generated with and without the slide."""

    slide_ids: tuple[str, ...]
    patient: str
    asked: str
    reference: str
    written: str
    text_only: str


class Answers(NamedTuple):
    """Questions with the answers given with and without the slide, by the way in which they are read."""

    questions: list[Question]
    patients: list[str]
    given: dict[str, list[str]]
    text_only: dict[str, list[str]]


class SlideRows:
    """[slide; regions] of the slides of a cohort, embedded on first use; several slides are one bag."""

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


def score_language(run, cohort: Cohort, inputs: Inputs, seed: int = 0) -> Part:
    """The results of a run of the language stage. Raises ValueError for tables about other slides."""
    assistant = load_assistant(run)
    rows, found, tables = SlideRows(assistant, cohort), {"run": str(run)}, {}
    if inputs.texts is not None:
        captions = write_captions(assistant, cohort, rows, inputs.texts, inputs.sampling)
        found["captions"] = score_captions(captions, inputs.concepts, seed)
        tables["captions"] = [caption._asdict() | {"slide_ids": "+".join(caption.slide_ids)} for caption in captions]
    if inputs.questions is not None:
        choices, open_ended = answer_questions(assistant, cohort, rows, inputs.questions, inputs.sampling)
        found["questions"] = score_answers(choices, open_ended, seed)
        tables["answers"] = [row for answers in (choices, open_ended) if answers for row in _answer_rows(answers)]
    found["warnings"] = _warnings(found)
    return Part(found, {}, tables, found["warnings"], assistant.config)


def write_captions(
    assistant: SlideAssistant, cohort: Cohort, rows: SlideRows, table, sampling: Sampling
) -> list[Caption]:
    """A caption for every report of the table about slides of the cohort, with the prompts of the table.

    Raises ValueError for a table without such reports, and as `SlideAssistant.answer`.
    """
    slide_ids, patient_of = cohort.records.slides.column("slide_id"), cohort.patient_of
    talks = match_conversations(read_conversations(table), slide_ids, cohort.cases)
    kept = [(talk, tuple(slide for slide in talk.slide_ids if slide in patient_of)) for talk in talks]
    kept = [(talk, slides) for talk, slides in kept if slides]
    if not kept:
        raise ValueError(f"{table}: none of its texts belongs to a slide of the split ({preview(cohort.slide_ids)})")
    asked = [talk.turns[0].asked for talk, _ in kept]
    shown = rows([slides for _, slides in kept])
    written = assistant.answer([assistant.prompt(a, x) for a, x in zip(asked, shown, strict=True)], sampling)
    blind = _answer_distinct(assistant, [assistant.prompt(a, None) for a in asked], asked, sampling)
    return [
        Caption(slides, patient_of[slides[0]], talk.turns[0].asked, talk.turns[0].answer, *texts)
        for (talk, slides), *texts in zip(kept, written, blind, strict=True)
    ]


def answer_questions(
    assistant: SlideAssistant, cohort: Cohort, rows: SlideRows, table, sampling: Sampling
) -> tuple[Answers | None, Answers | None]:
    """Answers to the questions of a table about slides of the cohort: with options, and open-ended.

    Options are chosen by the likelihood of their letters and, as in published scripts, by the generated text. Raises
    ValueError for a table without a question about them.
    """
    slide_ids, patient_of = cohort.records.slides.column("slide_id"), cohort.patient_of
    questions = read_questions(table)
    found = match_slides([(question.slide_ids, question.case_id) for question in questions], slide_ids, cohort.cases)
    bags = [tuple(slide for slide in slides if slide in patient_of) for slides in found]
    kept = [(question, bag) for question, bag in zip(questions, bags, strict=True) if bag]
    if not kept:
        raise ValueError(f"{table}: none of its questions is about a slide of the split ({preview(cohort.slide_ids)})")
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
        text_only = {GENERATION: _answer_distinct(assistant, blind, asked, sampling)}
        if with_options:
            given[LIKELIHOOD] = most_likely_letters(assistant, prompts, questions)
            text_only[LIKELIHOOD] = most_likely_letters(assistant, blind, questions)
        outcomes.append(Answers(questions, [patient_of[bag[0]] for bag in bags], given, text_only))
    return outcomes[0], outcomes[1]


def choice_shares(
    assistant: SlideAssistant, prompts: Sequence[EncodedPrompt], options: Sequence[Mapping[str, str]]
) -> list[dict]:
    """The probability of each letter, by its likelihood as the answer."""
    found = assistant.choose(prompts, [list(letters) for letters in options])
    shares = []
    for letters, likelihood in zip(options, found, strict=True):
        odds = np.exp(likelihood - likelihood.max())
        shares.append(dict(zip(letters, (odds / odds.sum()).tolist(), strict=True)))
    return shares


def most_likely_letters(
    assistant: SlideAssistant, prompts: Sequence[EncodedPrompt], questions: Sequence[Question]
) -> list[str]:
    """The most likely letter of each question."""
    shares = choice_shares(assistant, prompts, [question.options for question in questions])
    return [max(own, key=own.get) for own in shares]


def score_captions(captions: Sequence[Caption], phrasings: Mapping[str, Sequence[str]] | None, seed: int) -> dict:
    """Metrics of captions, with text-only captions and those of another patient's slide as baselines.

    N-gram metrics need NLTK and rouge-score (extra [language]); `phrasings` of concepts add precision and recall of the
    asserted concepts against those of the report.
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
        found["warnings"].append(
            "n-gram metrics are not computed: NLTK and rouge-score are not installed (extra [language])"
        )
    if phrasings is not None:
        finder = concepts.Finder(phrasings)
        truths = [concepts.asserted(finder(text)) for text in references]
        named = concepts.score_concepts(written, truths, patients, phrasings, others, seed)
        found |= {"concepts": named["metrics"], "per_concept": named["per_concept"]}
        found["warnings"] += named["warnings"]
        found["examples"] = _examples(captions, truths, named["mentions"], finder)
    return found


def score_answers(choices: Answers | None, open_ended: Answers | None, seed: int) -> dict:
    """Metrics of answers, with text-only answers, chance and the most frequent letter as baselines."""
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
    """The warnings of all parts, each prefixed with the name of its part."""
    parts = {"captions": found.get("captions", {})}
    asked = found.get("questions", {})
    parts |= {f"choices, {how.replace('_', ' ')}": part for how, part in asked.get("choices", {}).items()}
    parts |= {"open questions": asked.get("open", {})}
    return [f"{name}: {text}" for name, part in parts.items() for text in part.get("warnings", [])]


def _answer_distinct(
    assistant: SlideAssistant, prompts: Sequence[EncodedPrompt], asked: Sequence[str], sampling: Sampling
) -> list[str]:
    """Answers without a slide, generated once per distinct question."""
    first = {text: i for i, text in reversed(list(enumerate(asked)))}
    found = dict(zip(first, assistant.answer([prompts[i] for i in first.values()], sampling), strict=True))
    return [found[text] for text in asked]


def _another(patients: Sequence[str], seed: int) -> list[int] | None:
    """For each caption a random one of another patient; None if there is only one patient."""
    names = np.array(patients)
    if len(set(patients)) < 2:
        return None
    rng = np.random.default_rng(seed)
    return [int(rng.choice(np.flatnonzero(names != name))) for name in names]


def _examples(captions: Sequence[Caption], truths: list[set[str]], mentions: list[list[dict]], finder) -> list[dict]:
    """Captions at evenly spaced ranks of their concept F1, with their mentions."""

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
    """A text divided at its mentions: {"text", "kind"}, of kind "right", "wrong", "denied" or ""."""
    found, start = [], 0
    for mention in mentions:
        kind = ("denied" if mention["denied"] else "right") if mention["right"] else "wrong"
        found += [{"text": text[start : mention["start"]], "kind": ""}]
        found += [{"text": text[mention["start"] : mention["end"]], "kind": kind}]
        start = mention["end"]
    return [piece for piece in [*found, {"text": text[start:], "kind": ""}] if piece["text"]]


def _check(spec: EvaluationSpec) -> None:
    if spec.language is None and (spec.questions is not None or spec.concepts is not None):
        raise ValueError(
            "questions and concepts of captions are scored for a run of the language stage: pass it as --language"
        )
    if spec.language is not None and spec.texts is None and spec.questions is None:
        raise ValueError("nothing to ask the language stage: pass a table of reports (texts) or a table of questions")


def _read(setting: Setting) -> Inputs:
    spec = setting.spec
    concepts = read_prompts(spec.concepts).classes if spec.concepts is not None else None
    return Inputs(spec.texts, spec.questions, concepts, spec.sampling)


def _score(setting: Setting, inputs: Inputs, predictions: Predictions) -> Part:
    return score_language(setting.spec.language, setting.cohort, inputs, setting.spec.seed)


def _headlines(found: dict) -> Iterator[Headline]:
    captions, questions = found[KEY].get("captions", {}), found[KEY].get("questions", {})
    if "concepts" in captions:
        yield headline_with_baselines("Captions: F1 of the concepts asserted", captions["concepts"]["f1"])
    if "words" in captions:
        yield headline_with_baselines("Captions: ROUGE-L", captions["words"]["ROUGE-L"])
    for how, block in questions.get("choices", {}).items():
        yield headline_with_baselines(f"Multiple choice, {how.replace('_', ' ')}: accuracy", block["accuracy"], SHARE)
    if "open" in questions:
        metrics = questions["open"]["metrics"]
        yield headline_with_baselines("Open questions: exact match", metrics["exact match"], SHARE)
        yield headline_with_baselines("Open questions: ROUGE-L", metrics["ROUGE-L"])


TASK = Task(
    KEY,
    title="language",
    needs="questions",
    wanted=lambda spec: spec.language is not None,
    check=_check,
    read=_read,
    score=_score,
    headlines=_headlines,
    section=Path(__file__).with_name("language.html"),
)
