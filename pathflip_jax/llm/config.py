"""Decoder configuration, read from the config.json of a Hugging Face folder, and that of its low-rank adapters.

Qwen3, Qwen2 (and 2.5) and Llama 3 are one architecture with switches; any other requirement of a config.json is
refused, never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Family = Literal["qwen3", "qwen2", "llama"]
FAMILIES = get_args(Family)
DTYPES = ("float32", "bfloat16", "float16")
# Names of the projections in Hugging Face's weights and PEFT's target_modules, and here.
TARGETS = {
    "q_proj": "attention/query",
    "k_proj": "attention/key",
    "v_proj": "attention/value",
    "o_proj": "attention/output",
    "gate_proj": "feed_forward/gate",
    "up_proj": "feed_forward/up",
    "down_proj": "feed_forward/down",
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary scaling: long wavelengths are stretched by `factor`, short ones unchanged (arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): x W + (alpha / rank) x A B at each projection named in `targets`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = tuple(TARGETS)

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"LoRA targets {', '.join(unknown) or '(none)'}: expected one or more of {', '.join(TARGETS)}"
            )
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoRA rank {self.rank}, dropout {self.dropout}: expected a rank of at least 1 and a dropout of at "
                "least 0 and below 1"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """Causal decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    `attention_bias` adds biases to queries, keys and values, `output_bias` to the attention's output; `query_norm`
    normalises each head of queries and keys. `tied`: the head shares the embedding. `remat` recomputes layers for the
    gradient.
    """

    family: Family
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    query_norm: bool = False
    rope_scaling: RopeScaling | None = None
    compute_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "intermediate", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys and values evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}: rotary positions need an even number")
        if self.compute_dtype not in DTYPES:
            raise ValueError(f"compute_dtype {self.compute_dtype!r}: expected one of {', '.join(DTYPES)}")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], **more: Any) -> "DecoderConfig":
        """Read a Hugging Face config.json, as transformers 4 or 5 writes it.

        Raises ValueError listing missing entries and unsupported requirements.
        """
        family = values.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        faults = [f"{name} is missing" for name in needed if name not in values]
        faults += [
            f"{name} is {values[name]!r}, expected a whole number of at least 1"
            for name in needed
            if name in values and not (type(values[name]) is int and values[name] >= 1)
        ]
        faults += _unsupported(family, values)
        rope = _rope(values)
        kind = rope.get("rope_type", rope.get("type", "default")) or "default"
        scaling = None
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            faults += [f"{name} of its rope scaling is missing" for name in names if name not in rope]
            if not faults:
                scaling = RopeScaling(*(float(rope[name]) for name in names[:3]), int(rope[names[3]]))
        elif kind != "default":
            faults.append(f"rope scaling {kind!r} (expected default or llama3)")
        if rope.get("partial_rotary_factor", 1) != 1:
            faults.append(f"partial_rotary_factor {rope['partial_rotary_factor']} (expected 1)")
        if faults:
            raise ValueError(f"this {family} is not supported: {'; '.join(faults)}")
        heads, width = values["num_attention_heads"], values["hidden_size"]
        bias = family == "qwen2" or bool(values.get("attention_bias"))
        return cls(
            family=family,
            vocab_size=values["vocab_size"],
            width=width,
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads", 32 if family != "llama" else None) or heads,
            head_dim=values.get("head_dim") or (128 if family == "qwen3" else width // heads),
            intermediate=values["intermediate_size"],
            max_positions=values.get("max_position_embeddings") or (2048 if family == "llama" else 32768),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tied=bool(values.get("tie_word_embeddings", False)),
            attention_bias=bias,
            output_bias=bias and family != "qwen2",
            query_norm=family == "qwen3",
            rope_scaling=scaling,
            **more,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"rope_scaling": None if self.rope_scaling is None else dict(vars(self.rope_scaling))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecoderConfig":
        """Inverse of `to_dict`. Raises TypeError for an unknown setting."""
        scaling = values.get("rope_scaling")
        return cls(**values | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)})


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as one dict: transformers 5 has `rope_parameters`, 4 `rope_theta` and `rope_scaling`."""
    rope = dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})
    if "rope_theta" not in rope and "rope_theta" in values:
        rope["rope_theta"] = values["rope_theta"]
    return rope


def _unsupported(family: str, values: Mapping[str, Any]) -> list[str]:
    """Requirements of a config.json that this decoder does not support."""
    faults = []
    if values.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act {values['hidden_act']!r} (expected silu)")
    if values.get("use_sliding_window"):
        faults.append("use_sliding_window")
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        faults.append("layer_types other than full_attention")
    if values.get("mlp_bias"):
        faults.append("mlp_bias")
    if values.get("quantization_config"):
        faults.append("quantization_config (give the unquantised weights)")
    if values.get("attention_dropout"):
        faults.append("attention_dropout")
    if family == "llama" and values.get("pretraining_tp", 1) != 1:
        faults.append("pretraining_tp")
    return faults
