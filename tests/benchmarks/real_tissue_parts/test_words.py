"""Words of the tissue classes: held-out texts are unseen, their words are not, and captions deny truly."""

import re

import numpy as np
import pytest

from data_prep import phrasings
from data_prep.reports import concept_phrasings
from pathflip_jax.scores.concepts import Finder, asserted


@pytest.fixture
def words(benchmark_modules):
    return benchmark_modules("real_tissue_parts.words")


def _plain(text):
    return text.removeprefix("+").lower()


def _words(texts):
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


@pytest.mark.parametrize("vocabulary", ["COLON", "TEXTURES"])
def test_held_out_names_recombine_the_words_of_training(words, vocabulary):
    names = getattr(words, vocabulary)
    frames = [phrasings.PRESENT[extent] for extent in phrasings.PRESENT]
    frames += [phrasings.WHERE, phrasings.ABSENT, words.DIAGNOSIS, words.REMARKS]
    learnt = _words(text for own in names.values() for text in own["train"])
    learnt |= _words(text for frame in frames for text in frame["train"])
    for own in names.values():
        seen = {_plain(text) for text in own["train"]}
        assert not seen & {_plain(text) for use in ("test", "prompt") for text in own[use]}
        assert _words(own["test"] + own["prompt"]) <= learnt | {"areas"}, own
    for frame in (words.DIAGNOSIS, words.REMARKS):
        assert not set(frame["train"]) & set(frame["test"])


@pytest.mark.parametrize("vocabulary", ["COLON", "TEXTURES"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_assert_what_is_there_and_deny_what_is_not(words, vocabulary, split):
    names = getattr(words, vocabulary)
    finder = Finder(concept_phrasings(names))
    denials = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shown = [list(names)[i] for i in rng.permutation(len(names))[: int(rng.integers(2, 5))]]
        extent = {name: 1 / len(shown) for name in shown}
        caption = words.write_caption(rng, names, extent, dict.fromkeys(shown, "left"), split)
        mentions = finder(caption)
        assert asserted(mentions) == set(shown), caption
        denied = {mention.concept for mention in mentions if mention.denied}
        assert denied and not denied & set(shown), caption
        denials += len(denied)
    assert denials > 60  # one to three each


def test_class_prompts_are_in_no_caption(words):
    prompts = words.class_prompts(words.COLON, list(words.COLON))
    rng = np.random.default_rng(0)
    captions = [
        words.write_caption(rng, words.COLON, {"normal": 0.6, "polyp": 0.4}, {"normal": "", "polyp": ""}, "train")
        for _ in range(100)
    ]
    assert not [text for texts in prompts.values() for text in texts if any(text in caption for caption in captions)]
