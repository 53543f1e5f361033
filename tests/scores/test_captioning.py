"""Caption metrics against reference implementations: pycocoevalcap's (golden, see captioning/README.md) and NLTK's."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.texts.text import read_texts
from pathflip_jax.scores import captioning
from pathflip_jax.scores import statistics as scores
from pathflip_jax.scores.words import find_words, normal_form, words

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/captioning/pycocoevalcap.json").read_text())
PREDICTIONS = [row["prediction"] for row in GOLDEN["captions"]]
REFERENCES = [row["references"] for row in GOLDEN["captions"]]
PATIENTS = [f"P{i // 2}" for i in range(len(PREDICTIONS))]
SIGNS = {"-lrb-", "-rrb-", "%"}
ONE = np.ones((1, len(PREDICTIONS)))


def split(texts):
    return [words(text) for text in texts]


def references():
    return [split(texts) for texts in REFERENCES]


def test_words_are_the_ptb_tokens_without_signs():
    for row in GOLDEN["ptb"]:
        assert words(row["text"]) == [token for token in row["tokens"] if token not in SIGNS]
    assert words("70 mm; O’Neill isn’t 1,489... 3+4=7 (μ)") == "70 mm o neill is n't 1,489 3 4 7 μ".split()
    assert normal_form("The left Breast.") == normal_form("left breast")


@given(st.text(max_size=80))
def test_words_stand_where_they_are_said_to(text):
    found = find_words(text)
    assert all(text[word.start : word.end].lower().replace("’", "'") == word.text for word in found)
    assert all(one.end <= other.start for one, other in pairwise(found))


def test_scores_are_those_of_pycocoevalcap():
    statistics = captioning.caption_statistics(PREDICTIONS, REFERENCES)
    for order, expected in enumerate(GOLDEN["scores"]["BLEU"], 1):
        assert statistics[f"BLEU-{order}"](ONE)[0] == pytest.approx(expected, rel=1e-6)  # it adds 1e-9 here and there
    np.testing.assert_allclose(captioning.rouge_l(split(PREDICTIONS), references()), GOLDEN["scores"]["ROUGE-L"])
    np.testing.assert_allclose(captioning.cider(split(PREDICTIONS), references()), GOLDEN["scores"]["CIDEr"])
    assert statistics["CIDEr"](ONE)[0] == pytest.approx(np.mean(GOLDEN["scores"]["CIDEr"]))


@pytest.mark.filterwarnings(r"ignore:\s*The hypothesis contains 0 counts")  # and is 1e-77 or so, here 0
def test_each_draw_of_bleu_is_nltk_corpus_bleu_of_the_captions_repeated():
    from nltk.translate.bleu_score import corpus_bleu

    # NLTK counts one n-gram in a caption that is too short for any; such captions are left out here.
    kept = [i for i, text in enumerate(PREDICTIONS) if len(words(text)) >= 4]
    candidates, targets = [split(PREDICTIONS)[i] for i in kept], [references()[i] for i in kept]
    counts = np.array([captioning.bleu_counts(*pair) for pair in zip(candidates, targets, strict=True)])
    weights = np.concatenate([np.ones((1, len(kept))), scores.patient_weights([PATIENTS[i] for i in kept], draws=20)])
    for order in range(1, 5):
        found = captioning.bleu(counts, order)(weights)
        for draw, row in enumerate(weights.astype(int)):
            chosen = np.repeat(np.arange(len(kept)), row)
            expected = corpus_bleu(
                [targets[i] for i in chosen], [candidates[i] for i in chosen], weights=[1 / order] * order
            )
            assert found[draw] == pytest.approx(expected, rel=1e-9, abs=1e-12), (order, draw)


def test_bleu_is_zero_where_nothing_is_found_and_where_nothing_is_said():
    nothing = captioning.caption_statistics(["", "mucin"], ["fat is present", "necrosis"])
    values = {name: statistic(np.ones((1, 2)))[0] for name, statistic in nothing.items()}
    assert values == dict.fromkeys(values, 0.0)
    assert captioning.bleu(np.zeros((1, 10)), 4)(np.ones((1, 1)))[0] == 0


def test_a_draw_of_cider_is_a_mean_over_its_slides():
    statistic = captioning.caption_statistics(PREDICTIONS, REFERENCES)["CIDEr"]
    weights = scores.patient_weights(PATIENTS, draws=5)
    expected = [np.average(GOLDEN["scores"]["CIDEr"], weights=row) for row in weights]
    np.testing.assert_allclose(statistic(weights), expected)


class Data:
    """A stand-in for NLTK's WordNet with a few groups of synonyms, or with no data at all."""

    def __init__(self, *groups):
        self.groups = groups

    def ensure_loaded(self):
        if not self.groups:
            raise LookupError("Resource wordnet not found.")

    def synsets(self, word):
        return [Synset(group) for group in self.groups if word in group]


class Synset:
    def __init__(self, names):
        self.names = names

    def lemmas(self):
        return [type("Lemma", (), {"name": lambda _, name=name: name})() for name in self.names]


@pytest.fixture
def wordnet(monkeypatch):
    import nltk

    def fail(*_, **__):
        raise AssertionError("NLTK was asked to download")

    monkeypatch.setattr(nltk, "download", fail)
    return lambda *groups: monkeypatch.setattr(nltk.corpus, "wordnet", Data(*groups))


def test_meteor_says_which_stages_matched(wordnet):
    pair = [["tumor", "glands"]], [[["neoplasm", "gland"]]]
    wordnet()
    name, values = captioning.meteor(*pair)
    assert name == "METEOR (exact, stem)"
    # One of two words matches, by its stem, in one chunk: F is 1/2, less a half for the fragment.
    assert values == pytest.approx([0.5 * (1 - 0.5)])
    wordnet(["tumor", "neoplasm"])
    name, values = captioning.meteor(*pair)
    assert name == "METEOR (exact, stem, synonym)"
    assert values == pytest.approx([1 - 0.5 / 2**3])  # both, in one chunk of two words


def test_meteor_takes_the_best_reference(wordnet):
    wordnet()
    text = words("solid sheets of tumor cells occupy much of the tissue")
    name, values = captioning.meteor([text, []], [[["fat"], text], [["fat"]]])
    assert values == pytest.approx([1 - 0.5 / len(text) ** 3, 0.0])


def test_the_data_that_is_installed_is_asked_and_nothing_is_downloaded(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk, "download", None)
    name, values = captioning.meteor([["fat"]], [[["fat"]]])
    assert name in ("METEOR (exact, stem)", "METEOR (exact, stem, synonym)") and values == pytest.approx([0.5])


def test_a_model_stands_beside_captions_that_never_saw_the_slide(wordnet):
    wordnet()
    shown = [texts[0] for texts in REFERENCES]
    others = {scores.TEXT_ONLY: PREDICTIONS, "another slide's caption": shown[2:] + shown[:2]}
    found = captioning.score_captions(shown, REFERENCES, PATIENTS, others)
    assert list(found["metrics"]) == [
        *(f"BLEU-{n}" for n in (1, 2, 3, 4)),
        "ROUGE-L",
        "METEOR (exact, stem)",
        "CIDEr",
    ]
    assert (found["captions"], found["patients"]) == (12, 6)
    for name, entry in found["metrics"].items():
        assert entry["baselines"].keys() == entry["difference"].keys() == others.keys()
        assert entry["low"] <= entry["value"] + 1e-12 and entry["value"] <= entry["high"] + 1e-12
        for other in others:
            gap = entry["value"] - entry["baselines"][other]["value"]
            assert entry["difference"][other]["value"] == pytest.approx(gap), name
    assert found["metrics"]["BLEU-4"]["value"] == pytest.approx(1)
    assert found["warnings"] == []  # better than both in everything

    blind = captioning.score_captions(PREDICTIONS, REFERENCES, PATIENTS, {scores.TEXT_ONLY: PREDICTIONS})
    (warning,) = blind["warnings"]
    assert warning.startswith("no better than without the slide in BLEU-1, BLEU-2, BLEU-3, BLEU-4, ROUGE-L, METEOR")
    worse = captioning.score_captions(PREDICTIONS, REFERENCES, PATIENTS, {"copied": shown})
    assert worse["warnings"][0].startswith("no better than the baseline 'copied' in BLEU-1")


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="predictions: 1 for 2 slides"):
        captioning.score_captions(["fat"], ["fat", "fat"], ["p", "q"], {})
    with pytest.raises(ValueError, match="text only: 3 for 2 slides"):
        captioning.score_captions(["fat"] * 2, ["fat"] * 2, ["p", "q"], {"text only": ["fat"] * 3})
    for bad in ("...", [], ["fat", " "]):
        with pytest.raises(ValueError, match="references of caption 1: expected texts with words"):
            captioning.score_captions(["fat"] * 2, ["fat", bad], ["p", "q"], {})


@pytest.mark.parametrize(("package", "score"), [("nltk", "METEOR"), ("rouge_score.rouge_scorer", "ROUGE-L")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, score):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{score} needs .*pip install pathflip-jax\[language\]"):
        captioning.caption_statistics(["fat"], ["fat"])


def test_scoring_needs_neither_torch_nor_tensorflow():
    code = (
        "import sys; from pathflip_jax.scores import captioning, concepts; "
        "from pathflip_jax.evaluate.tasks import vqa; "
        "assert not {'nltk', 'rouge_score'} & set(sys.modules); captioning.caption_statistics(['fat'], ['fat']); "
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.slow
def test_real_captions_score_as_in_pycocoevalcap():
    """Each of the 732 SlideBench captions scored as if it were written about the next one's slide."""
    path = DATA / "text" / "SlideBench-Caption-TCGA.csv"
    if not path.exists():
        pytest.skip(f"no real captions: {path} is absent, set PATHFLIP_TEST_DATA")
    captions = [text.caption for text in read_texts(path)]
    statistics = captioning.caption_statistics(captions[1:] + captions[:1], captions)
    found = {name: statistic(np.ones((1, 732)))[0] for name, statistic in statistics.items()}
    expected = {"BLEU-1": 0.4022234864189834, "BLEU-2": 0.21551962772785346, "BLEU-3": 0.11876942797966658}
    expected |= {"BLEU-4": 0.06763566388703575, "ROUGE-L": 0.22364756969578828, "CIDEr": 0.06907408445922722}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
