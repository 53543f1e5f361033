"""Sizes and settings of the model: one frozen dataclass, the same in files, code and checkpoints."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PathFLIPConfig:
    """Shape of a PathFLIP; the defaults are the released model's (DESIGN section 3).

    Letters as in `pathflip.py`: F `feature_dim`, D `embed_dim`, H `hidden`, Q `num_queries`. Raises ValueError where
    sizes contradict each other.
    """

    feature_dim: int = 512
    embed_dim: int = 256
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    num_queries: int = 8
    cross_attention_freq: int = 2
    vocab_size: int = 30523  # the BERT vocabulary and `[DEC]`
    max_positions: int = 512
    patch_projection: Literal["linear", "mlp"] = "linear"
    patch_hidden: int | None = None  # width inside the "mlp" patch projection; None: embed_dim
    region_layers: int = 2
    region_heads: int = 8
    text_region_heads: int = 8
    dropout: float = 0.1
    logit_scale_init: float = math.log(1 / 0.07)
    logit_bias_init: float | None = None  # None: no bias, as released
    init: Literal["bert", "fan_in"] = "bert"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = (int, float) if isinstance(field.default, float) else type(field.default)
            if field.name in _OPTIONAL and (value is None or isinstance(value, _OPTIONAL[field.name])):
                continue
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                raise ValueError(f"model config: {field.name}={value!r:.40}, expected such as {field.default!r}")
            if expected is int and not 0 <= value <= _LARGEST.get(field.name, LARGEST_SIZE):
                most = _LARGEST.get(field.name, LARGEST_SIZE)
                raise ValueError(f"model config: {field.name}={value}, expected a size of at most {most}")
        for width, heads in (("hidden", "heads"), ("embed_dim", "region_heads"), ("embed_dim", "text_region_heads")):
            if not getattr(self, heads) or getattr(self, width) % getattr(self, heads):
                found = f"{width}={getattr(self, width)} and {heads}={getattr(self, heads)}"
                raise ValueError(f"model config: {found}; the width must be a multiple of the heads")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model config: {name}={getattr(self, name)!r}, expected one of {choices}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name}={getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model config: dropout={self.dropout}, expected a probability below 1")

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """The layers whose queries look at patches."""
        return tuple(range(0, self.layers, self.cross_attention_freq))

    @property
    def map_layer(self) -> int:
        """The layer whose cross-attention is the attention map: the last cross layer up to `layers - 2`."""
        return max(layer for layer in self.cross_layers if layer <= max(self.layers - 2, 0))

    def to_dict(self) -> dict:
        """Plain values by name, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "PathFLIPConfig":
        """Inverse of `to_dict`; a name that no setting has raises ValueError, naming it."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"model config: no setting is called {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )
        return cls(**values)


LARGEST_SIZE = 2**24
_LARGEST = {"layers": 1024, "region_layers": 1024}  # a model is built layer by layer before a file is compared with it
_OPTIONAL = {"patch_hidden": int, "logit_bias_init": (int, float)}
_POSITIVE = (
    "layers", "num_queries", "cross_attention_freq", "feature_dim", "embed_dim", "hidden", "intermediate", "vocab_size",
    "max_positions",
)  # fmt: skip
_CHOICES = {
    "patch_projection": ("linear", "mlp"),
    "init": ("bert", "fan_in"),
    "compute_dtype": ("float32", "bfloat16"),
}
