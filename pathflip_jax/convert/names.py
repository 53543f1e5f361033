"""The ONE table of names: every tensor of the released PyTorch models, and where it lives here.

Both directions of conversion, the parity command and the exporter read this table and nothing else. What a
released model holds and no loss or embedding uses stands in `unused`, so that every entry is accounted for.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


class Name(NamedTuple):
    """One parameter here, the torch tensor that holds it, and how: which third of a fused one, transposed or not."""

    path: str
    torch: str
    form: Literal["same", "transpose", "leading_axis"] = "same"
    third: int | None = None

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter out of the torch tensor."""
        if self.third is not None:
            size = tensor.shape[0] // 3
            tensor = tensor[self.third * size : (self.third + 1) * size]
        if self.form == "transpose":
            return tensor.T
        return tensor[0] if self.form == "leading_axis" else tensor

    def to_torch(self, parameter: np.ndarray) -> np.ndarray:
        """The torch tensor, or its third, out of the parameter."""
        if self.form == "transpose":
            return parameter.T
        return parameter[None] if self.form == "leading_axis" else parameter

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole torch tensor, from that of the parameter."""
        if self.form == "transpose":
            shape = shape[::-1]
        if self.third is not None:
            shape = (3 * shape[0], *shape[1:])
        return (1, *shape) if self.form == "leading_axis" else shape


def _linear(path: str, torch: str, lora: bool = False) -> Iterator[Name]:
    """A Linear; with `lora` as PEFT wraps it."""
    base = f"{torch}.base_layer" if lora else torch
    yield Name(f"{path}/kernel", f"{base}.weight", "transpose")
    yield Name(f"{path}/bias", f"{base}.bias")
    if lora:
        yield Name(f"{path}/lora/a", f"{torch}.lora_A.default.weight", "transpose")
        yield Name(f"{path}/lora/b", f"{torch}.lora_B.default.weight", "transpose")


def _norm(path: str, torch: str) -> Iterator[Name]:
    yield Name(f"{path}/scale", f"{torch}.weight")
    yield Name(f"{path}/bias", f"{torch}.bias")


def _rms_norm(path: str, torch: str) -> Iterator[Name]:
    yield Name(f"{path}/scale", f"{torch}.weight")


def _attention(path: str, torch: str, lora: bool = False) -> Iterator[Name]:
    for name in ("query", "key", "value"):
        yield from _linear(f"{path}/{name}", f"{torch}.self.{name}", lora)
    yield from _linear(f"{path}/output", f"{torch}.output.dense", lora)
    yield from _norm(f"{path}/norm", f"{torch}.output.LayerNorm")


def _ffn(path: str, torch: str, suffix: str = "", lora: bool = False) -> Iterator[Name]:
    yield from _linear(f"{path}/intermediate", f"{torch}.intermediate{suffix}.dense", lora)
    yield from _linear(f"{path}/output", f"{torch}.output{suffix}.dense", lora)
    yield from _norm(f"{path}/norm", f"{torch}.output{suffix}.LayerNorm")


def _multihead(path: str, torch: str) -> Iterator[Name]:
    for third, name in enumerate(("query", "key", "value")):
        yield Name(f"{path}/{name}/kernel", f"{torch}.in_proj_weight", "transpose", third)
        yield Name(f"{path}/{name}/bias", f"{torch}.in_proj_bias", "same", third)
    yield from _linear(f"{path}/output", f"{torch}.out_proj")


def bert_names(layers: int, prefix: str = "", path: str = "qformer", lora: bool = False) -> Iterator[Name]:
    """What any BERT has, under the names of `transformers.BertModel` after `prefix`; here it is part of `path`."""
    embeddings = f"{prefix}embeddings"
    yield Name(f"{path}/word_embeddings/embedding", f"{embeddings}.word_embeddings.weight")
    yield Name(f"{path}/position_embeddings/embedding", f"{embeddings}.position_embeddings.weight")
    yield from _norm(f"{path}/norm", f"{embeddings}.LayerNorm")
    for number in range(layers):
        here, torch = f"{path}/layers/{number}", f"{prefix}encoder.layer.{number}"
        yield from _attention(f"{here}/self_attention", f"{torch}.attention", lora)
        yield from _ffn(f"{here}/ffn", torch, lora=lora)


def query_copy(path: str) -> str | None:
    """The parameter of the queries' own feed-forward network that starts as a copy of this one; None for others."""
    return path.replace("/ffn/", "/query_ffn/") if "/ffn/" in path else None


def names(config: ModelConfig) -> list[Name]:
    """All parameters of a model of this config, each once."""
    return list(_pathflip2_names(config) if isinstance(config, PathFLIP2Config) else _pathflip_names(config))


def _pathflip_names(config: PathFLIPConfig) -> Iterator[Name]:
    if config.patch_projection == "linear":
        yield from _linear("patch_projection/linear", "path_encoder")
    else:
        yield from _linear("patch_projection/linear", "path_encoder.0")
        yield from _norm("patch_projection/norm", "path_encoder.1")
        yield from _linear("patch_projection/linear_out", "path_encoder.3")
        yield from _norm("patch_projection/norm_out", "path_encoder.4")
    yield Name("qformer/query_tokens", "query_tokens", "leading_axis")
    yield from bert_names(config.layers, "Qformer.bert.")
    for number in range(config.layers):
        path, torch = f"qformer/layers/{number}", f"Qformer.bert.encoder.layer.{number}"
        yield from _ffn(f"{path}/query_ffn", torch, "_query")
        if number in config.cross_layers:
            yield from _attention(f"{path}/cross_attention", f"{torch}.crossattention")
    yield from _linear("slide_projection", "path_proj")
    yield from _linear("text_projection", "text_proj")
    for number in range(config.region_layers):
        path, torch = f"region_layers/{number}", f"path_trans.layers.{number}"
        yield from _multihead(f"{path}/attention", f"{torch}.self_attn")
        yield from _norm(f"{path}/attention_norm", f"{torch}.norm1")
        yield from _linear(f"{path}/intermediate", f"{torch}.linear1")
        yield from _linear(f"{path}/output", f"{torch}.linear2")
        yield from _norm(f"{path}/norm", f"{torch}.norm2")
    for name, torch in (("query", "w_q"), ("key", "w_k"), ("value", "w_v")):
        yield from _linear(f"text_region/{name}", f"fg_head.{torch}")
    yield from _multihead("text_region/attention", "fg_head.attn")
    yield Name("logit_scale", "logit_scale")
    if config.logit_bias_init is not None:
        yield Name("logit_bias", "logit_bias")  # the released model has none


def _pathflip2_names(config: PathFLIP2Config) -> Iterator[Name]:
    yield from _projection("patch_projection", "image_proj")
    yield Name("tokens", "slide_encoder.visual_tokens", "leading_axis")
    for number in range(config.token_layers):
        for name, torch in (("cross", "cross"), ("among", "self")):
            block = f"slide_encoder.encoder_layers.{number}.{torch}"
            yield from _block(f"layers/{number}/{name}", block, itself=name == "among")
    yield from _block("patch_decoder", "slide_encoder.patch_decoder")
    yield from _projection("slide_projection", "image_projection_global")
    yield from _projection("region_projection", "image_projection_local")
    lora = config.text_lora_rank > 0
    bert = PEFT_TEXT_ENCODER if lora else TEXT_ENCODER
    yield from bert_names(config.layers, bert, "text_encoder", lora)
    yield Name("text_encoder/type_embeddings/embedding", f"{bert}embeddings.token_type_embeddings.weight")
    yield from _projection("text_projection", "text_projection_global")
    yield from _projection("region_text_projection", "text_projection_local")
    if config.region_head == "attention":
        head = "fine_gained_loss_head"
        yield from _multihead("text_region/attention", f"{head}.attn")
        for name, torch in (("query_norm", "ln_q"), ("key_norm", "ln_k"), ("value_norm", "ln_v")):
            yield from _norm(f"text_region/{name}", f"{head}.{torch}")
    for level, torch in (("slide", "global"), ("region", "local")):
        for name in ("scale", "bias"):
            yield Name(f"{level}_{name}", f"{torch}_logit_{name}")


def _projection(path: str, torch: str) -> Iterator[Name]:
    yield from _linear(f"{path}/linear", f"{torch}.0")
    yield from _rms_norm(f"{path}/norm", f"{torch}.1")


def _block(path: str, torch: str, itself: bool = False) -> Iterator[Name]:
    yield from _multihead(f"{path}/attention", f"{torch}.mha")
    yield from _rms_norm(f"{path}/query_norm", f"{torch}.norm_q")
    if not itself:
        yield from _rms_norm(f"{path}/key_norm", f"{torch}.norm_kv")
    yield from _rms_norm(f"{path}/norm", f"{torch}.norm2")
    yield from _linear(f"{path}/intermediate", f"{torch}.ffn.0")
    yield from _linear(f"{path}/output", f"{torch}.ffn.3")


TEXT_ENCODER = "text_encoder."
PEFT_TEXT_ENCODER = f"{TEXT_ENCODER}base_model.model."

POSITION_IDS = "Qformer.bert.embeddings.position_ids"
LANGUAGE_HEAD = "Qformer.cls."
COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")  # single numbers that weight averaging keeps


def is_unused(torch: str) -> bool:
    """Whether this entry of a released model is one that no loss or embedding uses: it is not read."""
    return why_unused(torch) is not None


def why_unused(torch: str) -> str | None:
    """Why an entry of a released model is not read; None for one that is a parameter, or unknown."""
    if torch in COUNTERS:
        return "a number that weight averaging keeps beside the weights"
    if torch == POSITION_IDS or (torch.startswith(TEXT_ENCODER) and torch.endswith("embeddings.position_ids")):
        return "a buffer: 0, 1, 2, ..."
    if torch.startswith(LANGUAGE_HEAD):
        return "BERT's language-model head, which no loss or embedding of the alignment uses"
    if torch.startswith(TEXT_ENCODER) and ".pooler." in torch:
        return "BERT's pooler, which nothing reads: texts are pooled from the last states"
    return None


def unused(config: ModelConfig, words: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of the released `state_dict` that are no parameter here, filled so that it loads with strict=True.

    The language-model head is tied to the word table `words` as in BERT, and otherwise neutral.
    """
    H, head = config.hidden, f"{LANGUAGE_HEAD}predictions"
    if isinstance(config, PathFLIP2Config):
        bert = PEFT_TEXT_ENCODER if config.text_lora_rank else TEXT_ENCODER
        dense = f"{bert}pooler.dense"
        return {f"{dense}.weight": np.zeros((H, H), np.float32), f"{dense}.bias": np.zeros(H, np.float32)}
    return {
        POSITION_IDS: np.arange(config.max_positions, dtype=np.int64)[None],
        # One short: the released code adds [DEC] to the tables after BERT has made this bias.
        f"{head}.bias": np.zeros(config.vocab_size - 1, np.float32),
        f"{head}.transform.dense.weight": np.zeros((H, H), np.float32),
        f"{head}.transform.dense.bias": np.zeros(H, np.float32),
        f"{head}.transform.LayerNorm.weight": np.ones(H, np.float32),
        f"{head}.transform.LayerNorm.bias": np.zeros(H, np.float32),
        f"{head}.decoder.weight": words,
        f"{head}.decoder.bias": np.zeros(config.vocab_size, np.float32),
    }
