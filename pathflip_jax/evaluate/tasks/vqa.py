"""Accuracy of answers to multiple-choice questions about slides, and metrics of answers to open questions.

Multiple-choice benchmarks can largely be answered without the slide: the correct letter of 41.4% of the SlideBench-VQA
questions is B, and a question may give its answer away. The baselines of every accuracy are therefore chance, the most
frequent letter and, if given, the same model asked without the slide.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.texts.text import Question
from pathflip_jax.scores import captioning, statistics
from pathflip_jax.scores.statistics import Statistic
from pathflip_jax.scores.words import normal_form

CHANCE = "chance"
MOST_FREQUENT = "most frequent letter"
_MARKS = " \t\r\n.,:;()[]*_\"'`"


def score_choices(
    questions: Sequence[Question],
    answers: Sequence[str],
    patients: Sequence[str],
    baselines: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict:
    """Accuracy of answers to questions with options, overall and by category, with patient-level intervals.

    `parse_choice` reads the letters; an answer without one is wrong, and the fraction of these is reported. `baselines`
    are other answers to the same questions by name, such as `statistics.TEXT_ONLY`; chance and the most frequent letter
    are always added. Returns {"questions", "patients", "most_frequent_letter", "unparsed", "accuracy",
    "by_broad_category", "by_category", "warnings"}; an accuracy is what `statistics.with_baselines` returns. Raises
    ValueError for lists of different lengths and for a question without options.
    """
    weights = statistics.patient_weights(patients, seed=seed)
    statistics.check_lengths(patients, {"questions": questions, "answers": answers, **baselines}, "question")
    for question in questions:
        if not question.options:
            raise ValueError(f"question {question.question_id} has no options; `score_open` scores open questions")
    letters = {name: _letters(questions, texts) for name, texts in {"answers": answers, **baselines}.items()}
    truth = np.array([question.answer for question in questions])
    frequent = Counter(truth.tolist()).most_common(1)[0][0]
    right = {name: np.array([*map(str, found)]) == truth for name, found in letters.items()}
    ours = right.pop("answers")
    known = {CHANCE: np.array([1 / len(question.options) for question in questions]), MOST_FREQUENT: truth == frequent}

    def accuracy(chosen: np.ndarray) -> dict:
        others = {name: statistics.mean(values[chosen]) for name, values in (known | right).items()}
        entry = statistics.with_baselines(statistics.mean(ours[chosen]), others, weights[:, chosen])
        return {"questions": int(chosen.sum())} | entry

    overall = accuracy(np.ones(len(questions), bool))
    by_broad = {
        name: accuracy(chosen) for name, chosen in _groups(question.broad_category for question in questions).items()
    }
    by_narrow = {
        name: accuracy(chosen) for name, chosen in _groups(question.category for question in questions).items()
    }
    return {
        "questions": len(questions),
        "patients": len(set(patients)),
        "most_frequent_letter": frequent,
        "unparsed": {name: float(np.mean([letter is None for letter in found])) for name, found in letters.items()},
        "accuracy": overall,
        "by_broad_category": by_broad,
        "by_category": by_narrow,
        "warnings": statistics.warn_if_not_above_baseline({"accuracy": overall} | by_broad | by_narrow),
    }


def score_open(
    questions: Sequence[Question],
    answers: Sequence[str],
    patients: Sequence[str],
    baselines: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict:
    """Metrics of answers to open questions: exact match, and the metrics of captions with the answer as reference.

    A match is exact if the words are the same but for case, punctuation and articles. Returns what
    `captioning.score_captions` returns, with "exact match" first among the metrics; raises what that raises.
    """
    truth = [question.answer for question in questions]
    found = captioning.score_captions(answers, truth, patients, baselines, seed)
    weights = statistics.patient_weights(patients, seed=seed)
    exact = statistics.with_baselines(
        _matches(answers, truth), {name: _matches(texts, truth) for name, texts in baselines.items()}, weights
    )
    metrics = {"exact match": exact} | found["metrics"]
    return found | {"metrics": metrics, "warnings": statistics.warn_if_not_above_baseline(metrics)}


def parse_choice(generated: str, options: Mapping[str, str]) -> str | None:
    """The letter that a generated text chooses; None if it chooses none or several.

    Published scripts accept "B", "B.", "(B)", "The answer is B" or an option's text; without a letter, ScienceQA's
    draws one, and of several, MMMU's takes the last. Here there is no guess. The first rule that matches decides: the
    text is a letter or an option's text; it names the answer ("answer: B"); it names an option ("option B"); a line
    starts with a letter and a punctuation mark, or a letter is in brackets; the text contains an option's text; a
    capital letter stands alone and is not an article.
    """
    if not options:
        return None
    letter = generated.strip(_MARKS).upper()
    if letter in options:
        return letter
    patterns = _patterns(tuple(options))
    texts = {letter: normal_form(text) for letter, text in options.items()}
    answer = normal_form(patterns.opening.sub("", generated))
    found = [letter for letter, text in texts.items() if text and text == answer]
    for pattern in (patterns.answer, patterns.option, patterns.marked):
        found = found or _named(pattern, patterns.letter, generated)
    if not found:
        held = {letter: text for letter, text in texts.items() if text and _within(text, answer)}
        # "Grade 1" is contained in "grade 1 of 3": the longest such option counts.
        found = [
            letter for letter, text in held.items() if not any(_within(text, o) for o in held.values() if o != text)
        ]
    found = found or _named(patterns.alone, patterns.letter, generated)
    return found[0] if len(set(found)) == 1 else None


class _Patterns(NamedTuple):
    """Patterns that name letters; the group `named` of `answer` to `alone` is one or several ("B and C")."""

    letter: re.Pattern
    opening: re.Pattern
    answer: re.Pattern
    option: re.Pattern
    marked: re.Pattern
    alone: re.Pattern


@lru_cache(maxsize=64)
def _patterns(letters: tuple[str, ...]) -> _Patterns:
    one = f"(?:{'|'.join(map(re.escape, letters))})"
    # An "A" before a lower-case word is an article ("Answer: A tumor of ..."), unless that word continues the answer.
    article = r"A\s+(?!(?:and|or|is|because|since|as)\b)[a-z]"
    single = rf"(?<![\w'’-])(?!{article}){one}(?![\w'’-])"
    marks = r"[\s*_\"'`(\[]*"
    named = rf"(?P<named>{single}(?:[\s*)\].]*(?:,|/|&|\band\b|\bor\b){marks}{single})*)"
    is_answer = r"\banswer\b(?:\s+(?:is|would be|should be))?\s*:?"
    is_option = r"\b(?:options?|choices?)\b(?:\s+is)?\s*:?"
    return _Patterns(
        letter=re.compile(single),
        opening=re.compile(
            rf"^\W*(?:the\s+)?(?:(?:correct|right|best)\s+)?answer(?:\s+is)?\W+(?:{one}[).:]\s*)?", re.I
        ),
        answer=re.compile(rf"(?i:{is_answer}){marks}(?i:(?:option|choice)\s+)?{marks}{named}"),
        option=re.compile(rf"(?i:{is_option}){marks}{named}"),
        marked=re.compile(rf"(?m)(?:^{marks}|(?<!\w)[(\[]){named}(?=\s*(?:[).:,;\]*]|-\s|$))"),
        alone=re.compile(named),
    )


def _named(pattern: re.Pattern, letter: re.Pattern, text: str) -> list[str]:
    return [one for match in pattern.finditer(text) for one in letter.findall(match.group("named"))]


def _within(inner: str, outer: str) -> bool:
    """Whether the words of one normal form occur consecutively in another."""
    return f" {inner} " in f" {outer} "


def _letters(questions: Sequence[Question], texts: Sequence[str]) -> list[str | None]:
    return [parse_choice(text, question.options) for question, text in zip(questions, texts, strict=True)]


def _groups(names) -> dict[str, np.ndarray]:
    """The questions of each category as a mask, by name; questions without a category are in none."""
    names = np.array(list(names))
    return {str(name): names == name for name in np.unique(names) if name}


def _matches(answers: Sequence[str], truth: Sequence[str]) -> Statistic:
    pairs = zip(answers, truth, strict=True)
    return statistics.mean(np.array([normal_form(answer) == normal_form(wanted) for answer, wanted in pairs]))
