"""Model configurations: one frozen dataclass per family, with the same fields in code, files and checkpoints."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pathflip_jax.model.versions import UnknownSettings, before
from pathflip_jax.settings.fields import LARGEST_SIZE

CONFIGS: dict[str, type["ModelConfig"]] = {}  # by family name


@dataclass(frozen=True)
class ModelConfig:
    """Sizes common to both families: patch features, joint space and BERT. Raises ValueError for incompatible sizes.

    F `feature_dim`, D `embed_dim`, H `hidden`; `heads`, `layers` and `intermediate` are BERT's.
    """

    feature_dim: int = 512
    embed_dim: int = 256
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocab_size: int = 30523
    max_positions: int = 512
    dropout: float = 0.1
    init: Literal["bert", "fan_in"] = "bert"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    family: ClassVar[str]
    _divides: ClassVar[tuple[tuple[str, str], ...]] = (("hidden", "heads"),)
    _optional: ClassVar[dict[str, Any]] = {}
    _positive: ClassVar[tuple[str, ...]] = (
        "layers", "feature_dim", "embed_dim", "hidden", "intermediate", "vocab_size", "max_positions"
    )  # fmt: skip
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "init": ("bert", "fan_in"),
        "compute_dtype": ("float32", "bfloat16"),
    }
    _probabilities: ClassVar[tuple[str, ...]] = ("dropout",)

    def __init_subclass__(cls) -> None:
        CONFIGS[cls.family] = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = (int, float) if isinstance(field.default, float) else type(field.default)
            if field.name in self._optional and (value is None or isinstance(value, self._optional[field.name])):
                continue
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                raise ValueError(
                    f"model config: {field.name}={value!r:.40}, expected a value such as {field.default!r}"
                )
            if expected is int and not 0 <= value <= _LARGEST.get(field.name, LARGEST_SIZE):
                most = _LARGEST.get(field.name, LARGEST_SIZE)
                raise ValueError(f"model config: {field.name}={value}, expected a size of at most {most}")
        for width, heads in self._divides:
            if not getattr(self, heads) or getattr(self, width) % getattr(self, heads):
                found = f"{width}={getattr(self, width)} and {heads}={getattr(self, heads)}"
                raise ValueError(f"model config: {found}; the width must be a multiple of the number of heads")
        for name, choices in self._choices.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model config: {name}={getattr(self, name)!r}, expected one of {choices}")
        for name in self._positive:
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name}={getattr(self, name)}, expected at least 1")
        for name in self._probabilities:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model config: {name}={getattr(self, name)}, expected a probability below 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON; families other than `PathFLIPConfig` include the family's name."""
        values = dataclasses.asdict(self)
        return values if self.family == PathFLIPConfig.family else {"family": self.family} | values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; raises UnknownSettings for unknown names.

        Settings that an earlier version did not write take the value that reproduces its behaviour.
        """
        values = dict(values)
        name = values.pop("family", PathFLIPConfig.family)
        if name not in CONFIGS:
            raise ValueError(f"model config: family={name!r}, expected one of {', '.join(CONFIGS)}")
        kind = CONFIGS[name]
        known = {field.name for field in dataclasses.fields(kind)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UnknownSettings(
                f"model config: unknown settings {', '.join(unknown)}; known settings are {', '.join(sorted(known))}",
                unknown,
            )
        return kind(**before("model", known - set(values)) | values)


_LARGEST = {  # bounds for configs read from files: a model is built before its weights are compared with the config
    "layers": 1024, "region_layers": 1024, "token_layers": 1024
}  # fmt: skip


@dataclass(frozen=True)
class PathFLIPConfig(ModelConfig):
    """Configuration of PathFLIP; the defaults are the released model's (DESIGN section 3).

    Letters as in `pathflip.py`: F `feature_dim`, D `embed_dim`, H `hidden`, Q `num_queries`. Raises ValueError for
    incompatible sizes.
    """

    vocab_size: int = 30523  # the BERT vocabulary plus `[DEC]`
    num_queries: int = 8
    cross_attention_freq: int = 2
    patch_projection: Literal["linear", "mlp"] = "linear"
    patch_hidden: int | None = None  # width inside the "mlp" patch projection; None: embed_dim
    region_layers: int = 2
    region_heads: int = 8
    text_region_heads: int = 8
    logit_scale_init: float = math.log(1 / 0.07)
    logit_bias_init: float | None = None  # None: no bias, as released

    family = "pathflip"
    _divides = (*ModelConfig._divides, ("embed_dim", "region_heads"), ("embed_dim", "text_region_heads"))
    _optional = {"patch_hidden": int, "logit_bias_init": (int, float)}
    _positive = (*ModelConfig._positive, "num_queries", "cross_attention_freq")
    _choices = ModelConfig._choices | {"patch_projection": ("linear", "mlp")}

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Indices of the layers with cross-attention to patches."""
        return tuple(range(0, self.layers, self.cross_attention_freq))

    @property
    def map_layer(self) -> int:
        """Index of the layer that provides the attention map: the last cross-attention layer up to `layers - 2`."""
        return max(layer for layer in self.cross_layers if layer <= max(self.layers - 2, 0))


@dataclass(frozen=True)
class PathFLIP2Config(ModelConfig):
    """Configuration of PathFLIP2, the authors' follow-up network; the defaults are the released code's.

    Texts are encoded by a complete BERT, whose vocabulary has no `[DEC]`. `text_lora_rank` above 0 adapts that BERT by
    LoRA. `text_pooling` selects the pooling of tokens: "mean" of the text's own tokens, "cls", or "mean_padded", the
    mean over the padded length of all texts encoded together, as in the released code.
    """

    embed_dim: int = 512
    vocab_size: int = 28996
    tokens: int = 128  # in addition to the slide token
    token_layers: int = 1
    token_heads: int = 8
    token_dropout: float = 0.2
    text_pooling: Literal["mean", "cls", "mean_padded"] = "mean"
    text_lora_rank: int = 0
    text_lora_alpha: float = 64.0
    region_head: Literal["soft_topk", "attention"] = "soft_topk"
    text_region_heads: int = 8  # of the attention head
    top_k: int = 128
    topk_temperature: float = 0.5
    scale_init: float = 10.0
    bias_init: float = -10.0

    family = "pathflip2"
    _divides = (*ModelConfig._divides, ("embed_dim", "token_heads"), ("embed_dim", "text_region_heads"))
    _positive = (*ModelConfig._positive, "token_layers", "top_k")
    _choices = ModelConfig._choices | {
        "text_pooling": ("mean", "cls", "mean_padded"),
        "region_head": ("soft_topk", "attention"),
    }
    _probabilities = (*ModelConfig._probabilities, "token_dropout")

    def __post_init__(self):
        super().__post_init__()
        if self.topk_temperature <= 0:
            raise ValueError(f"model config: topk_temperature={self.topk_temperature}, expected more than 0")
