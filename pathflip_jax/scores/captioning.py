"""N-gram metrics of generated captions against reference reports, on the words of `pathflip_jax.scores.words`.

BLEU is corpus BLEU: n-gram counts are summed over slides before the division, and a bootstrap draw sums the counts of
its slides (Papineni et al. 2002). The other metrics are means over slides: ROUGE-L is the F1 of the longest common
subsequence (rouge-score; pycocoevalcap weighs recall by 1.2), METEOR is NLTK's, and CIDEr is CIDEr-D with the document
frequencies of the given references (Vedantam et al. 2015). On the same words, BLEU and CIDEr equal those of
pycocoevalcap, which is not a dependency because it ships 100 MB of Java archives.

These metrics reward phrases that most reports share. Compare them with the metrics of captions generated without the
slide.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from pathflip_jax.scores import statistics
from pathflip_jax.scores.statistics import Statistic
from pathflip_jax.scores.words import words

LONGEST = 4  # longest n-gram, in words, of both BLEU and CIDEr
CIDER_SIGMA = 6.0  # standard deviation of CIDEr-D's Gaussian penalty on the difference in length, in words


def score_captions(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    patients: Sequence[str],
    baselines: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> dict:
    """Every metric of the captions with baselines, patient-level intervals and warnings.

    A slide has one reference or several. `baselines` are captions of the same slides by name, such as
    `statistics.TEXT_ONLY`, another slide's caption or the most common one. Returns {"captions", "patients", "metrics",
    "warnings"}; a metric is what `statistics.with_baselines` returns. Raises ValueError for lists of different lengths
    and a reference without words, ImportError if NLTK or rouge-score is not installed.
    """
    weights = statistics.patient_weights(patients, seed=seed)
    lists = {"predictions": predictions, "references": references, **baselines}
    statistics.check_lengths(patients, lists, "slide")
    others = {name: caption_statistics(captions, references) for name, captions in baselines.items()}
    metrics = statistics.metrics_with_baselines(caption_statistics(predictions, references), others, weights)
    return {
        "captions": len(patients),
        "patients": len(set(patients)),
        "metrics": metrics,
        "warnings": statistics.warn_if_not_above_baseline(metrics),
    }


def caption_statistics(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Statistic]:
    """The metrics of captions by name: BLEU-1 to BLEU-4, ROUGE-L, METEOR with its stages, CIDEr."""
    candidates = [words(text) for text in predictions]
    targets = [[words(text) for text in _as_list(texts)] for texts in references]
    for number, texts in enumerate(targets):
        if not texts or not all(texts):
            raise ValueError(
                f"references of caption {number}: expected texts with words, found {references[number]!r:.60}"
            )
    counts = np.array([bleu_counts(*pair) for pair in zip(candidates, targets, strict=True)])
    found = {f"BLEU-{order}": bleu(counts, order) for order in range(1, LONGEST + 1)}
    found["ROUGE-L"] = statistics.mean(rouge_l(candidates, targets))
    name, values = meteor(candidates, targets)
    return found | {name: statistics.mean(values), "CIDEr": statistics.mean(cider(candidates, targets))}


def ngrams(tokens: Sequence[str]) -> list[Counter]:
    """The counts of n-grams, for n from 1 to 4."""
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


def bleu_counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """The counts that BLEU sums over captions: matched and generated n-grams for n from 1 to 4, and two lengths.

    Matches are clipped at the highest count in any one reference. The lengths are the caption's and that of the
    reference closest to it, the shorter of two equally close.
    """
    allowed = [Counter() for _ in range(LONGEST)]
    for reference in references:
        allowed = [most | counts for most, counts in zip(allowed, ngrams(reference), strict=True)]
    found = [(counts & most).total() for counts, most in zip(ngrams(candidate), allowed, strict=True)]
    written = [max(0, len(candidate) - n) for n in range(LONGEST)]
    nearest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return [*found, *written, len(candidate), nearest]


def bleu(counts: Float[np.ndarray, "n 10"], order: int) -> Statistic:
    """Corpus BLEU of n-grams up to `order`, without smoothing, from the `bleu_counts` of each caption."""

    def statistic(weights):
        total = weights @ counts  # [W, 10]
        found, written = total[:, :order], total[:, LONGEST : LONGEST + order]
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.exp(np.log(found / written).mean(1))
            brevity = np.exp(np.minimum(0, 1 - total[:, -1] / total[:, -2]))
        return np.where((found > 0).all(1), brevity * precision, 0.0)

    return statistic


def rouge_l(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> Float[np.ndarray, "n"]:
    """The ROUGE-L F1 of each caption, the highest over its references."""
    scorer = import_rouge()(["rougeL"], tokenizer=_SplitWords())
    return np.array(
        [
            scorer.score_multi([" ".join(text) for text in texts], " ".join(candidate))["rougeL"].fmeasure
            for candidate, texts in zip(candidates, references, strict=True)
        ],
        np.float64,
    )


def meteor(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[str, Float[np.ndarray, "n"]]:
    """A name that lists the matching stages, and the METEOR of each caption, the highest over its references.

    Words match if they are equal, share a stem (Porter) or, if NLTK's WordNet data is installed, are synonyms. Nothing
    is downloaded: without that data there is no synonym stage.
    """
    nltk = import_nltk()
    from nltk.translate.meteor_score import meteor_score

    stemmer = nltk.stem.PorterStemmer()
    wordnet = _wordnet(nltk)
    values = [
        meteor_score(texts, candidate, stemmer=stemmer, wordnet=wordnet or _NoSynonyms())
        for candidate, texts in zip(candidates, references, strict=True)
    ]
    return f"METEOR (exact, stem{', synonym' if wordnet else ''})", np.array(values, np.float64)


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Float[np.ndarray, "n"]:
    """The CIDEr-D of each caption, at most 10: its similarity to the references in n-grams weighted by rarity.

    The weight of an n-gram is log(slides / slides with it in a reference); an n-gram that occurs in no reference is
    weighted as if it occurred in one. The bootstrap does not recompute these frequencies.
    """
    targets = [[ngrams(text) for text in texts] for texts in references]
    having = Counter(
        gram for texts in targets for gram in {gram for text in texts for counts in text for gram in counts}
    )
    unknown = math.log(len(targets))
    rarity = {gram: unknown - math.log(slides) for gram, slides in having.items()}

    def weigh(counts: Counter) -> dict[tuple[str, ...], float]:
        return {gram: count * rarity.get(gram, unknown) for gram, count in counts.items()}

    def norm(vector: Mapping) -> float:
        return math.sqrt(sum(weight**2 for weight in vector.values()))

    values = []
    for candidate, texts in zip(candidates, targets, strict=True):
        written = [weigh(counts) for counts in ngrams(candidate)]
        similarities = []
        for text in texts:
            # Lengths in pairs of words, as pycocoevalcap measures them.
            shift = max(0, len(candidate) - 1) - text[1].total()
            penalty = math.exp(-(shift**2) / (2 * CIDER_SIGMA**2))
            for ours, theirs in zip(written, map(weigh, text), strict=True):
                shared = sum(
                    min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs
                )
                lengths = norm(ours) * norm(theirs)
                similarities.append(penalty * shared / lengths if lengths else 0.0)
        values.append(10 * np.mean(similarities))
    return np.array(values)


class _SplitWords:
    """A tokenizer for rouge-score that splits pretokenized text at spaces."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


class _NoSynonyms:
    """A WordNet without synonyms, for installations without its data."""

    def synsets(self, word: str) -> list:
        return []


def _wordnet(nltk):
    """NLTK's WordNet reader, None if its data is not installed."""
    try:
        nltk.corpus.wordnet.ensure_loaded()
    except LookupError:
        return None
    return nltk.corpus.wordnet


def import_nltk():
    """The package nltk; the ImportError names the extra that installs it."""
    try:
        import nltk
    except ImportError:
        raise ImportError("METEOR needs NLTK: `pip install pathflip-jax[language]`") from None
    return nltk


def import_rouge():
    """The scorer of rouge-score; the ImportError names the extra that installs it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("ROUGE-L needs rouge-score: `pip install pathflip-jax[language]`") from None
    return RougeScorer


def _as_list(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts
