"""Precision and recall of the findings that captions assert, which n-gram metrics do not measure.

A concept is given by its phrasings, {concept: [phrasings]} in JSON (the embedded cohort writes concepts.json). Phrases
are matched word by word, ignoring articles and grammatical number ("glands" matches "gland", "papillae" matches
"papilla"). Matching runs from left to right and takes the longest phrase that starts at a word. Words that belong to no
phrasing are ignored.

A negated mention does not count as an assertion. Negation is detected by cue words within a clause, as in NegEx
(Chapman et al. 2001): "no", "without", "negative for" and the like before the mention, "absent", "not seen" and the
like after it, up to a word that starts another finding. Hedged mentions ("possible necrosis") count as assertions.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.scores import statistics
from pathflip_jax.scores.statistics import Statistic
from pathflip_jax.scores.words import Word, find_words

_ARTICLES = frozenset(("a", "an", "the"))
_SENTENCE_ENDS = frozenset(".;!?\n")
_CONTRASTS = frozenset("but however although though whereas while yet except".split())
_CUES_BEFORE = [tuple(cue.split()) for cue in (
    "no", "not", "n't", "none", "neither", "nor", "never", "without", "lacks", "lacking", "absence of", "lack of",
    "negative for", "free of", "devoid of", "rules out", "ruling out",
)]  # fmt: skip
_CUES_AFTER = frozenset(("absent", "lacking", "excluded"))
_NEGATIONS = frozenset(("not", "n't"))
_NEGATIVE_ANSWERS = frozenset(("no", "none", "negative", "not", "absent"))  # "Necrosis: none"
_NO_NEGATION_AFTER = frozenset(("only", "just", "limited", "otherwise"))  # "not only necrosis" is not a negation
_AUXILIARIES = frozenset("is are was were has have been be also".split())
_OBSERVED = frozenset(
    "seen identified present noted found observed evident detected appreciated apparent visible".split()
)
# "Invasion is not specified" does not assert invasion, so it counts as a negation.
_REPORTED = frozenset("specified provided reported mentioned described stated assessed".split())
_SHOWS = frozenset("shows contains demonstrates reveals exhibits includes".split())
_SHOW = frozenset("show contain demonstrate reveal exhibit include".split())  # "does not show necrosis" negates it


class Mention(NamedTuple):
    """A mention of a concept at the characters `start` to `end` of a text, and whether it is negated."""

    start: int
    end: int
    concept: str
    denied: bool


class Finder:
    """A finder of the mentions of concepts in texts.

    Raises ValueError for a phrasing without words and for one that two concepts share.
    """

    def __init__(self, phrasings: Mapping[str, Sequence[str]]) -> None:
        self.concepts = list(phrasings)
        owner: dict[tuple[str, ...], str] = {}
        for concept, texts in phrasings.items():
            for text in texts:
                phrase = tuple(singular(word.text) for word in find_words(text))
                phrase = phrase[1:] if phrase[:1] and phrase[0] in _ARTICLES else phrase
                if not phrase:
                    raise ValueError(f"concept {concept!r}: the phrasing {text!r} has no words; remove it")
                if owner.setdefault(phrase, concept) != concept:
                    raise ValueError(
                        f"the phrasing {text!r} belongs to the concepts {owner[phrase]!r} and {concept!r}; "
                        "remove it from one of them"
                    )
        self._by_first = defaultdict(list)
        for phrase in sorted(owner, key=len, reverse=True):
            self._by_first[phrase[0]].append((phrase, owner[phrase]))

    def __call__(self, text: str) -> list[Mention]:
        """The mentions in a text, in order and without overlaps."""
        return [mention for clause in _clauses(text) for mention in self._in_clause(text, clause)]

    def _in_clause(self, text: str, clause: list[Word]) -> list[Mention]:
        folded = tuple(singular(word.text) for word in clause)
        found, first = [], 0
        while first < len(clause):
            for phrase, concept in self._by_first.get(folded[first], ()):
                if folded[first : first + len(phrase)] == phrase:
                    last = first + len(phrase)
                    denied = _denied_before(text, clause, first) or _denied_after(text, clause, first, last)
                    found.append(Mention(clause[first].start, clause[last - 1].end, concept, denied))
                    first = last - 1
                    break
            first += 1
        return found


def score_concepts(
    captions: Sequence[str],
    truths: Sequence[Collection[str]],
    patients: Sequence[str],
    phrasings: Mapping[str, Sequence[str]],
    baselines: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict:
    """Precision, recall and F1 of the concepts that captions assert, with patient-level intervals and baselines.

    `truths` holds the concepts of each slide. Metrics are micro averages over pairs of slide and concept. Returns
    {"captions", "patients", "metrics", "per_concept", "mentions", "warnings"}; `mentions` holds the result of `judge`
    for each caption. Raises ValueError for lists of different lengths and a true concept without phrasings.
    """
    weights = statistics.patient_weights(patients, seed=seed)
    statistics.check_lengths(patients, {"captions": captions, "truths": truths, **baselines}, "slide")
    finder = Finder(phrasings)
    unknown = sorted(set().union(*truths) - set(finder.concepts))
    if unknown:
        raise ValueError(f"no phrasings for the true concepts {', '.join(unknown)}; expected {', '.join(phrasings)}")
    is_true = _table(truths, finder.concepts)
    found = [finder(caption) for caption in captions]
    asserts = _table([asserted(mentions) for mentions in found], finder.concepts)
    others = {
        name: _statistics(_table([asserted(finder(text)) for text in texts], finder.concepts), is_true)
        for name, texts in baselines.items()
    }
    metrics = statistics.metrics_with_baselines(_statistics(asserts, is_true), others, weights)
    return {
        "captions": len(patients),
        "patients": len(set(patients)),
        "metrics": metrics,
        "per_concept": _per_concept(asserts, is_true, finder.concepts),
        "mentions": [judge(mentions, truth) for mentions, truth in zip(found, truths, strict=True)],
        "warnings": statistics.warn_if_not_above_baseline(metrics),
    }


def asserted(mentions: Sequence[Mention]) -> set[str]:
    """The concepts with at least one mention that is not negated."""
    return {mention.concept for mention in mentions if not mention.denied}


def judge(mentions: Sequence[Mention], truth: Collection[str]) -> list[dict]:
    """Each mention as {start, end, concept, denied, right}: right if a true concept is asserted or a false one negated.

    Negations are judged for display only; precision and recall count assertions.
    """
    return [mention._asdict() | {"right": (mention.concept in truth) is not mention.denied} for mention in mentions]


def singular(word: str) -> str:
    """A word without its English or Latin plural ending; the same for singular and plural of a noun."""
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if word.endswith("ae"):
        return word[:-1]
    if word.endswith("i"):
        return word[:-1] + "us"
    return word.removesuffix("s")


def _clauses(text: str) -> list[list[Word]]:
    """The words of a text, divided at the ends of sentences and before contrasts."""
    clauses: list[list[Word]] = [[]]
    for word in find_words(text):
        gap = text[clauses[-1][-1].end : word.start] if clauses[-1] else ""
        if _SENTENCE_ENDS.intersection(gap) or word.text in _CONTRASTS:
            clauses.append([])
        clauses[-1].append(word)
    return clauses


def _denied_before(text: str, clause: list[Word], first: int) -> bool:
    """Whether a cue before the mention negates it, with no word in between that ends the cue's scope."""
    texts = [word.text for word in clause]
    for place in range(first - 1, -1, -1):
        if texts[place] in _NEGATIONS and texts[place + 1] in _NO_NEGATION_AFTER:
            return False
        if any(tuple(texts[place : place + len(cue)]) == cue and place + len(cue) <= first for cue in _CUES_BEFORE):
            return True
        new_part = texts[place] == "with" and (_comma(text, clause, place) or texts[place - 1] == "and")
        finding = texts[place] in _OBSERVED and texts[place - 1] != "no"  # but "no detected necrosis"
        if texts[place] in _AUXILIARIES | _SHOWS or finding or new_part:
            return False
    return False


def _denied_after(text: str, clause: list[Word], first: int, last: int) -> bool:
    """Whether a cue after the mention negates it ("fat and mucin are not seen") and not only a finding in between."""
    texts = [word.text for word in clause]
    if (
        last < len(clause)
        and ":" in text[clause[last - 1].end : clause[last].start]
        and texts[last] in _NEGATIVE_ANSWERS
    ):
        return True
    for place in range(last, len(clause)):
        follows = texts[place + 1 : place + 4]
        not_seen = texts[place] in _NEGATIONS and (not follows or not (_OBSERVED | _REPORTED).isdisjoint(follows))
        if not_seen or texts[place] in _CUES_AFTER:
            between = place
            while between > last and texts[between - 1] in _AUXILIARIES:
                between -= 1
            if not (_AUXILIARIES | _OBSERVED | _SHOWS | _SHOW).isdisjoint(texts[last:between]):
                return False
            # "The section shows fat, necrosis is absent": the verb before the mention asserts it.
            another = any(texts[i] == "and" or _comma(text, clause, i) for i in range(last, between))
            return not (another and not (_AUXILIARIES | _OBSERVED | _SHOWS | _SHOW).isdisjoint(texts[:first]))
    return False


def _comma(text: str, clause: list[Word], place: int) -> bool:
    """Whether a comma precedes a word."""
    return place > 0 and "," in text[clause[place - 1].end : clause[place].start]


def _table(sets: Sequence[Collection[str]], concepts: Sequence[str]) -> np.ndarray:
    """Membership of each concept in each slide's set [slides, concepts]."""
    return np.array([[concept in found for concept in concepts] for found in sets], bool).reshape(len(sets), -1)


def _statistics(asserts: np.ndarray, is_true: np.ndarray) -> dict[str, Statistic]:
    correct = (asserts & is_true).sum(1)
    predicted, present = asserts.sum(1), is_true.sum(1)
    f1 = ratio(2 * correct, predicted + present)
    return {"precision": ratio(correct, predicted), "recall": ratio(correct, present), "f1": f1}


def ratio(above: Float[np.ndarray, "n"], below: Float[np.ndarray, "n"]) -> Statistic:
    """The ratio of two sums over slides; NaN if the second sum is 0."""

    def statistic(weights):
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ above) / (weights @ below)

    return statistic


def _per_concept(asserts: np.ndarray, is_true: np.ndarray, concepts: Sequence[str]) -> list[dict]:
    rows = []
    for c, concept in enumerate(concepts):
        row = {"concept": concept, "slides": int(is_true[:, c].sum()), "asserted": int(asserts[:, c].sum())}
        one = _statistics(asserts[:, c : c + 1], is_true[:, c : c + 1])
        rows.append(row | {name: float(statistic(np.ones((1, len(asserts))))[0]) for name, statistic in one.items()})
    return rows
