"""Synthetic captions for cohorts without reports."""

from pathlib import Path

import numpy as np

from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece

CAPTION_LENGTH = 384
CAPTION_TOKENS = (222, 54)  # mean and deviation; they give the 95th percentile of real captions, 311
SENTENCE_TOKENS = 28  # merges of one to three such sentences are about as long as a real subcaption, 58 tokens


def make_captions(count: int, folder: Path, rng: np.random.Generator) -> list[str]:
    """Synthetic captions as long as real ones, in tokens of a vocabulary that is written to `folder`."""
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "ar", "en", "is", "ut")]
    words = list(dict.fromkeys("".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(2000)))
    chances = 1 / np.arange(10, 10 + len(words))  # a few words make up most of any text
    chances /= chances.sum()
    text = " ".join(rng.choice(words, 20_000, p=chances)) + " ."
    train_wordpiece([text], folder, vocab_size=1500)
    tokens = dict(zip(words, map(len, TextTokenizer(folder).ids(words)), strict=True))
    mean, deviation = CAPTION_TOKENS
    captions = []
    for length in np.clip(rng.normal(mean, deviation, count), 40, CAPTION_LENGTH).round():
        left, sentences = int(length) - 2, []  # without [CLS] and [SEP]
        while left > 0:
            size, sentence = min(left, SENTENCE_TOKENS + int(rng.integers(-8, 9))), []
            while size > 1 or not sentence:  # the full stop takes one
                sentence.append(str(rng.choice(words, p=chances)))
                size, left = size - tokens[sentence[-1]], left - tokens[sentence[-1]]
            sentences.append(" ".join(sentence).capitalize() + ".")
            left -= 1
        captions.append(" ".join(sentences))
    return captions
