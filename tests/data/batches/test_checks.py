"""Batches without a training signal: refused where no step has one, counted where some lack it."""

from types import SimpleNamespace

import numpy as np
import pytest

from pathflip_jax.data.batches.bags import SentenceTokens, TokenisedText
from pathflip_jax.data.batches.checks import any_unrelated, refuse_unknown_words, require_negatives
from pathflip_jax.data.texts.text import SlideText
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_wordpiece(["gland stroma fat"] * 3, folder, 200)
    return TextTokenizer(folder)


def bags(tokenizer, *sentences: str):
    """A bag of a text for each sentence."""
    ids = tokenizer.ids(sentences)
    written = [SlideText((), "", sentence) for sentence in sentences]
    texts = [TokenisedText(tokenizer.wrap(x, 64), SentenceTokens([x]), s) for x, s in zip(ids, written, strict=True)]
    return [SimpleNamespace(texts=[text]) for text in texts]


def test_texts_that_the_vocabulary_does_not_know_are_refused_with_the_cure(tokenizer):
    unknown = bags(tokenizer, "Железа 腺", "gland", "腺 腺 fat")
    with pytest.raises(ValueError) as error:
        refuse_unknown_words(unknown, tokenizer, 0.2, "reports.jsonl")
    said = str(error.value)
    assert "reports.jsonl: 66.7% of the word pieces" in said and str(tokenizer.folder) in said
    assert "(腺, Железа)" in said and "pathflip vocabulary" in said and "--config.data.max_unknown_share=0.68" in said


def test_an_option_overrules_and_what_is_unknown_is_said(tokenizer, caplog):
    refuse_unknown_words(bags(tokenizer, "Железа gland"), tokenizer, 0.51, "reports.jsonl")
    assert "50.0% of the word pieces" in caplog.text
    caplog.clear()
    refuse_unknown_words(bags(tokenizer, "gland fat stroma"), tokenizer, 0.2, "reports.jsonl")
    assert caplog.text == ""


def batches(related, batch_size: int, seed: int = 0):
    """Stand-in with the parts of batches that `require_negatives` reads: ids and slides of a batch."""
    related = np.array(related)
    order = np.random.default_rng(seed).permutation(len(related))
    return SimpleNamespace(
        related=related,
        batch_size=batch_size,
        steps_per_epoch=len(related) // batch_size,
        slides=[(f"S{i}",) for i in range(len(related))],
        chosen=lambda step: order[step * batch_size :][:batch_size],
    )


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="batch of one slide has no negative.*train.batch_size to 2 or more"):
        require_negatives(batches([[0], [1]], 1))


@pytest.mark.parametrize("related", [[[0]] * 3, [[0, 5], [1, 5], [2, 5]]])
def test_a_cohort_of_one_case_or_one_caption_is_refused(related):
    with pytest.raises(ValueError, match=r"all 3 training slides \(S0, S1, S2\) are of one case, or have the same"):
        require_negatives(batches(related, 2))


def test_batches_without_negatives_are_counted(caplog):
    related = [[number // 4] for number in range(40)]
    made = batches(related, 2)
    expected = sum(len({int(made.related[i, 0]) for i in made.chosen(step)}) == 1 for step in range(20))
    require_negatives(made)
    assert expected > 0 and f"{expected} of the first 20 batches hold slides of one case alone" in caplog.text
    caplog.clear()
    require_negatives(batches([[number] for number in range(40)], 2))
    assert caplog.text == ""


def test_slides_of_a_chain_are_not_all_related():
    """The first shares a caption with the second, which shares another with the third."""
    assert any_unrelated(np.array([[0, 5], [5, 6], [6, 2]]))
    assert not any_unrelated(np.array([[0, 5], [5, 6], [6, 0]]))


def test_a_large_cohort_of_one_case_is_told_at_once():
    """Each slide was held against all others: 100,000 slides of one case would have taken hours."""
    assert not any_unrelated(np.zeros((1_000_000, 1), int))
    assert not any_unrelated(np.stack([np.arange(100_000) // 2, np.full(100_000, 100_000)], axis=1))
    assert any_unrelated(np.append(np.zeros(1_000_000, int), 1)[:, None])
