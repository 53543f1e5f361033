"""Scores of answers to questions about slides: multiple choice by its letters, open questions by their words.

Benchmarks of multiple choice can be answered in good part without the slide: the right letter of 41.4% of the
SlideBench-VQA questions is B, and a question may give its answer away. So every accuracy stands beside a guess, the
most frequent letter, and, where it is given, the same model asked without the slide.
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
    """Accuracy of generated answers to questions with options, overall and by category, with intervals by patient.

    A letter is read by `parse_choice`; an answer without one is wrong, and the share of these is reported. `baselines`
    are other answers to the same questions by name, such as `scores.TEXT_ONLY`; chance and the most frequent letter of
    these questions are always beside them. Returns {"questions", "patients", "most_frequent_letter", "unparsed",
    "accuracy", "by_broad_category", "by_category", "warnings"}; an accuracy is what `scores.beside` returns. Raises
    ValueError for lists of different lengths and for a question without options.
    """
    weights = statistics.patient_weights(patients, seed=seed)
    _check_lengths(patients, {"questions": questions, "answers": answers, **baselines})
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
        entry = statistics.beside(statistics.mean(ours[chosen]), others, weights[:, chosen])
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
        "warnings": statistics.unbeaten({"accuracy": overall} | by_broad | by_narrow),
    }


def score_open(
    questions: Sequence[Question],
    answers: Sequence[str],
    patients: Sequence[str],
    baselines: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict:
    """Scores of answers to open questions: exact match, and the scores of captions with the answer as reference.

    A match is exact when the words are the same but for case, punctuation and articles. Returns what
    `captioning.score_captions` does, with "exact match" first among the metrics; raises what that raises.
    """
    truth = [question.answer for question in questions]
    found = captioning.score_captions(answers, truth, patients, baselines, seed)
    weights = statistics.patient_weights(patients, seed=seed)
    exact = statistics.beside(
        _matches(answers, truth), {name: _matches(texts, truth) for name, texts in baselines.items()}, weights
    )
    metrics = {"exact match": exact} | found["metrics"]
    return found | {"metrics": metrics, "warnings": statistics.unbeaten(metrics)}


def parse_choice(generated: str, options: Mapping[str, str]) -> str | None:
    """The letter that a generated text chooses; None where it chooses none or several.

    Published scripts take "B", "B.", "(B)", "The answer is B" or an option's text; where they find no letter,
    ScienceQA's draws one, and where they find several, MMMU's takes the last. Here nobody guesses. The first of these
    that finds something decides: the text is a letter, or an option's text; it names the answer ("answer: B"); it names
    an option ("option B"); a line starts with a letter and a mark, or a letter stands in brackets; it holds an option's
    text; a capital letter stands alone and is no article.
    """
    if not options:
        return None
    letter = generated.strip(_MARKS).upper()
    if letter in options:
        return letter
    patterns = _patterns(tuple(options))
    texts = {letter: normal_form(text) for letter, text in options.items()}
    said = normal_form(patterns.opening.sub("", generated))
    found = [letter for letter, text in texts.items() if text and text == said]
    for pattern in (patterns.answer, patterns.option, patterns.marked):
        found = found or _named(pattern, patterns.letter, generated)
    if not found:
        held = {letter: text for letter, text in texts.items() if text and _within(text, said)}
        # "Grade 1" stands within "grade 1 of 3": of such options the longest that is held counts.
        found = [
            letter for letter, text in held.items() if not any(_within(text, o) for o in held.values() if o != text)
        ]
    found = found or _named(patterns.alone, patterns.letter, generated)
    return found[0] if len(set(found)) == 1 else None


class _Patterns(NamedTuple):
    """How texts name letters: the group `named` of `answer` to `alone` holds one or several ("B and C")."""

    letter: re.Pattern
    opening: re.Pattern
    answer: re.Pattern
    option: re.Pattern
    marked: re.Pattern
    alone: re.Pattern


@lru_cache(maxsize=64)
def _patterns(letters: tuple[str, ...]) -> _Patterns:
    one = f"(?:{'|'.join(map(re.escape, letters))})"
    # An "A" before a word in small letters is an article ("Answer: A tumor of ..."), unless that word goes on about it.
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
    """Whether the words of one normal form stand in a row in another."""
    return f" {inner} " in f" {outer} "


def _letters(questions: Sequence[Question], texts: Sequence[str]) -> list[str | None]:
    return [parse_choice(text, question.options) for question, text in zip(questions, texts, strict=True)]


def _groups(names) -> dict[str, np.ndarray]:
    """Name -> which questions are of it, by name; those without one are in none."""
    names = np.array(list(names))
    return {str(name): names == name for name in np.unique(names) if name}


def _matches(answers: Sequence[str], truth: Sequence[str]) -> Statistic:
    pairs = zip(answers, truth, strict=True)
    return statistics.mean(np.array([normal_form(answer) == normal_form(wanted) for answer, wanted in pairs]))


def _check_lengths(patients: Sequence[str], lists: Mapping[str, Sequence]) -> None:
    for name, listed in lists.items():
        if len(listed) != len(patients):
            raise ValueError(
                f"{name}: {len(listed)} for {len(patients)} questions; give one for every question, in order"
            )
