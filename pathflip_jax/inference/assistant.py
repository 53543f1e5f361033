"""Inference with the language stage: slide captioning, question answering and multiple choice.

Slides are embedded by the run's aligner with all their regions, as `inference.predictor.Predictor` does, and enter the
prompt as in training. Every prompt can also be given without its slide: the text-only baseline of every score.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.convert.exported import LANGUAGE
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.json_files import read_json
from pathflip_jax.data.texts.conversations import DESCRIBE, Turn
from pathflip_jax.data.texts.text import IMAGE
from pathflip_jax.inference.language_run import assemble
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.llm.adapter import SlideLanguageModel
from pathflip_jax.llm.generate import generate, score
from pathflip_jax.llm.prompts import Prompted, encode_prompt, insert_slide, stop_ids
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.llm.serving import ServingDecoder, fuse_for_decoding
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.runs.files import CONFIG, run_folder
from pathflip_jax.runs.places import find_run
from pathflip_jax.runtime.buckets import bucket

Rows = Float[np.ndarray, "n D"]


class EncodedPrompt(NamedTuple):
    """Prompt up to the start of the answer, and its slide: [slide; regions], None for no slide."""

    tokens: Int[np.ndarray, "T"]
    slide: Rows | None


@jax.jit
def _embed(model: SlideLanguageModel, tokens, rows):
    return model.embed(tokens, model.project(rows))


class SlideAssistant:
    """Captions, answers and choices by a run of the language stage; `template` is its chat format in training."""

    def __init__(self, model: SlideLanguageModel, config: dict, tokenizer: DecoderTokenizer, name: str = "") -> None:
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.template = config["data"]["template"]
        self.stop_ids = stop_ids(tokenizer, self.template)
        self.predictor = Predictor(model.aligner, config, None, name)

    @cached_property
    def _writer(self) -> ServingDecoder:
        return fuse_for_decoding(self.model.decoder)

    def embed_slides(self, slides: Sequence[SlideFeatures]) -> list[Rows]:
        """Embed each slide as [slide; regions], with all its regions; raises as `Predictor.bag`."""
        found = self.predictor.encode_slides(slides)
        return [np.concatenate([slide.slide[None], slide.regions]) for slide in found]

    def prompt(self, asked: str, slide: Rows | None, before: Sequence[Turn] = ()) -> EncodedPrompt:
        """Prompt about a slide; `<image>` is put before the first text where none of them has it.

        Raises ValueError for a text without words, and where `<image>` occurs twice.
        """
        if not asked.replace(IMAGE, "").strip():
            raise ValueError(f"question {asked!r} has no words; write what to ask")
        first = before[0].asked if before else asked
        if IMAGE not in "".join([*(turn.asked for turn in before), asked]):
            first = f"{IMAGE}\n{first}"
            before, asked = ([Turn(first, before[0].answer), *before[1:]], asked) if before else ([], first)
        return EncodedPrompt(encode_prompt(self.tokenizer, before, asked, self.template), slide)

    def caption(self, slides: Sequence[Rows | None], sampling: Sampling, *, batch_size: int = 8) -> list[str]:
        """Generate a report of each slide, with the prompt used for caption tables in training."""
        return self.answer([self.prompt(DESCRIBE, slide) for slide in slides], sampling, batch_size=batch_size)

    def answer(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, *, batch_size: int = 8) -> list[str]:
        """Answer each prompt. Prompts of similar length share a call; raises as `generate`."""
        sampling = replace(sampling, stop_ids=self.stop_ids)
        found: list[str] = [""] * len(prompts)
        for members in _batches_of_similar_length([self._length(prompt) for prompt in prompts], batch_size):
            tokens, embeds, mask = self._inputs([prompts[i] for i in members])
            written = generate(self._writer, embeds, mask, sampling, prompt_tokens=np.maximum(tokens, -1))
            for row, i in enumerate(members):
                found[i] = self.tokenizer.decode(written.tokens[row, : written.lengths[row]]).strip()
        return found

    def choose(
        self, prompts: Sequence[EncodedPrompt], answers: Sequence[Sequence[str]], *, batch_size: int = 8
    ) -> list[Float[np.ndarray, "C"]]:
        """Log likelihood of each candidate answer to each prompt, summed over its tokens and its end token."""
        found: list[np.ndarray] = [np.zeros(0)] * len(prompts)
        for members in _batches_of_similar_length([self._length(prompt) for prompt in prompts], batch_size):
            _, embeds, mask = self._inputs([prompts[i] for i in members])
            ids = [[np.append(self.tokenizer.text_ids(text), self.stop_ids[0]) for text in answers[i]] for i in members]
            most, longest = max(map(len, ids)), max(len(x) for own in ids for x in own)
            targets = np.zeros((len(mask), bucket(most), bucket(longest)), np.int32)
            real = np.zeros(targets.shape, bool)
            real[:, :, 0] = True  # unused slots hold one token
            for row, own in enumerate(ids):
                for column, x in enumerate(own):
                    targets[row, column, : len(x)], real[row, column, : len(x)] = x, True
            scores = np.asarray(score(self._writer, embeds, mask, targets, real))
            for row, i in enumerate(members):
                found[i] = scores[row, : len(answers[i])]
        return found

    def _length(self, prompt: EncodedPrompt) -> int:
        return len(prompt.tokens) + (0 if prompt.slide is None else len(prompt.slide)) - 1

    def _inputs(self, prompts: Sequence[EncodedPrompt]):
        """Tokens, embeddings and mask of prompts, left-padded to one of a few sizes."""
        size, width = bucket(len(prompts)), bucket(max(map(self._length, prompts)))
        most = bucket(max([1, *(len(p.slide) for p in prompts if p.slide is not None)]))
        tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        rows = np.zeros((size, most, self.model.aligner.config.embed_dim), np.float32)
        mask[len(prompts) :, -1] = True  # rows without a prompt hold one token, so that no row is all padding
        for b, (ids, slide) in enumerate(prompts):
            shown = insert_slide(Prompted(ids, np.zeros(len(ids), bool)), 0 if slide is None else len(slide)).tokens
            tokens[b, width - len(shown) :], mask[b, width - len(shown) :] = shown, True
            if slide is not None:
                rows[b, : len(slide)] = slide
        return tokens, _embed(self.model, tokens, rows), mask


def _batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of prompts of similar length, the longest first, so that running out of memory shows immediately."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def is_language_run(folder: str | Path) -> bool:
    """Whether a run is one of the language stage, or an export of one; False for a folder that is not a run."""
    home = run_folder(find_run(folder))
    return (home / LANGUAGE).exists() or ((home / CONFIG).exists() and "lm" in read_json(home / CONFIG))


def load_assistant(
    folder: str | Path, *, which: str | int = "best", decoder: str = "", aligner: str = "", dtype: str = ""
) -> SlideAssistant:
    """Load a run of the language stage; `decoder` and `aligner` give the current location of those folders, if moved.

    Raises FileNotFoundError and ValueError for a folder that is not such a run, is damaged, or was trained on other
    weights.
    """
    model, config, tokenizer = assemble(folder, which, decoder=decoder, aligner=aligner, dtype=dtype)
    return SlideAssistant(model, config, tokenizer, str(folder))
