"""The ONE table of names: every tensor of the released PyTorch model, and where it lives here.

Both directions of conversion, the parity command and the exporter read this table and nothing else. What the
released model holds and no loss or embedding uses stands in `unused`, so that every entry is accounted for.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from pathflip_jax.model.config import PathFLIPConfig


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


def _linear(path: str, torch: str) -> Iterator[Name]:
    yield Name(f"{path}/kernel", f"{torch}.weight", "transpose")
    yield Name(f"{path}/bias", f"{torch}.bias")


def _norm(path: str, torch: str) -> Iterator[Name]:
    yield Name(f"{path}/scale", f"{torch}.weight")
    yield Name(f"{path}/bias", f"{torch}.bias")


def _attention(path: str, torch: str) -> Iterator[Name]:
    for name in ("query", "key", "value"):
        yield from _linear(f"{path}/{name}", f"{torch}.self.{name}")
    yield from _linear(f"{path}/output", f"{torch}.output.dense")
    yield from _norm(f"{path}/norm", f"{torch}.output.LayerNorm")


def _ffn(path: str, torch: str, suffix: str) -> Iterator[Name]:
    yield from _linear(f"{path}/intermediate", f"{torch}.intermediate{suffix}.dense")
    yield from _linear(f"{path}/output", f"{torch}.output{suffix}.dense")
    yield from _norm(f"{path}/norm", f"{torch}.output{suffix}.LayerNorm")


def _multihead(path: str, torch: str) -> Iterator[Name]:
    for third, name in enumerate(("query", "key", "value")):
        yield Name(f"{path}/{name}/kernel", f"{torch}.in_proj_weight", "transpose", third)
        yield Name(f"{path}/{name}/bias", f"{torch}.in_proj_bias", "same", third)
    yield from _linear(f"{path}/output", f"{torch}.out_proj")


def bert_names(layers: int, prefix: str = "") -> Iterator[Name]:
    """The part of the Q-Former that any BERT has, under the names of `transformers.BertModel` after `prefix`."""
    embeddings = f"{prefix}embeddings"
    yield Name("qformer/word_embeddings/embedding", f"{embeddings}.word_embeddings.weight")
    yield Name("qformer/position_embeddings/embedding", f"{embeddings}.position_embeddings.weight")
    yield from _norm("qformer/norm", f"{embeddings}.LayerNorm")
    for number in range(layers):
        path, torch = f"qformer/layers/{number}", f"{prefix}encoder.layer.{number}"
        yield from _attention(f"{path}/self_attention", f"{torch}.attention")
        yield from _ffn(f"{path}/ffn", torch, "")


def query_copy(path: str) -> str | None:
    """The parameter of the queries' own feed-forward network that starts as a copy of this one; None for others."""
    return path.replace("/ffn/", "/query_ffn/") if "/ffn/" in path else None


def names(config: PathFLIPConfig) -> list[Name]:
    """All parameters of a model of this config, each once."""
    return list(_names(config))


def _names(config: PathFLIPConfig) -> Iterator[Name]:
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


POSITION_IDS = "Qformer.bert.embeddings.position_ids"
LANGUAGE_HEAD = "Qformer.cls."


def is_unused(torch: str) -> bool:
    """Whether this entry of the released model is one that no loss or embedding uses: it is not read."""
    return torch == POSITION_IDS or torch.startswith(LANGUAGE_HEAD)


def unused(config: PathFLIPConfig, words: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of the released `state_dict` that are no parameter here, filled so that it loads with strict=True.

    The language-model head is tied to the word table `words` as in BERT, and otherwise neutral.
    """
    H, head = config.hidden, f"{LANGUAGE_HEAD}predictions"
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
