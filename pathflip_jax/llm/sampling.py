"""Generation settings: greedy decoding, sampling and beam search."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Token selection; all but beam search as in transformers' processors of the same names.

    `temperature` 0 takes the likeliest token; otherwise tokens are drawn by `seed` from the `top_k` likeliest and from
    the smallest set with probability `top_p`. `beams` above 1 keeps that many texts, and divides their log likelihoods
    by length ** `length_penalty`. `repetition_penalty` makes tokens that occurred less likely. `stop_ids` end a text,
    not before `min_new_tokens`.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> "Sampling":
        """Settings from values by option; other values are ignored, and missing ones keep their defaults.

        The end token is 0, which `SlideAssistant` replaces by those of its tokenizer.
        """
        options = ("temperature", "top_k", "top_p", "beams", "length_penalty", "repetition_penalty", "seed")
        fields = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"} | {name: name for name in options}
        return cls(stop_ids=(0,), **{field: values[name] for name, field in fields.items() if name in values})

    def __post_init__(self) -> None:
        faults = []
        if self.max_new_tokens < 1:
            faults.append(f"max_new_tokens {self.max_new_tokens} (expected 1 or more)")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            faults.append(f"min_new_tokens {self.min_new_tokens} (expected 0 to max_new_tokens, {self.max_new_tokens})")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            faults.append(f"temperature {self.temperature} (expected 0 for greedy decoding, or more)")
        if self.top_k is not None and self.top_k < 1:
            faults.append(f"top_k {self.top_k} (expected 1 or more, or None for all)")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p {self.top_p} (expected more than 0, at most 1)")
        if self.beams < 1:
            faults.append(f"beams {self.beams} (expected 1 for no beam search, or more)")
        if not math.isfinite(self.length_penalty):
            faults.append(f"length_penalty {self.length_penalty} (expected a number)")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            faults.append(f"repetition_penalty {self.repetition_penalty} (expected more than 0; 1 means no penalty)")
        if any(token < 0 for token in self.stop_ids):
            faults.append(f"stop_ids {self.stop_ids} (expected ids of the tokenizer)")
        if self.temperature == 0 and (self.top_k is not None or self.top_p != 1):
            faults.append("top_k or top_p with temperature 0 (greedy; set a temperature to sample tokens)")
        if self.beams > 1 and self.temperature > 0:
            faults.append(
                f"temperature {self.temperature} with {self.beams} beams (beam search does not sample; set it to 0)"
            )
        if self.beams == 1 and self.length_penalty != 1:
            faults.append(f"length_penalty {self.length_penalty} without beams (it only affects beam search)")
        if self.min_new_tokens and not self.stop_ids:
            faults.append(f"min_new_tokens {self.min_new_tokens} without stop_ids (nothing ends a text)")
        if faults:
            raise ValueError("sampling: " + "; ".join(faults))
