"""Weight names: pairs of a parameter here and the PyTorch tensor that holds it, for the layers all models share.

Each family's table is built from them (`convert/families.py:names`), as are those of decoders and adapters
(`convert/decoder_names.py`). Both directions of conversion, the parity command and the exporter rely on these tables
alone.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np


class Name(NamedTuple):
    """Pair of a parameter and its torch tensor: which third of a fused tensor, transposed or not."""

    path: str
    torch: str
    form: Literal["same", "transpose", "leading_axis"] = "same"
    third: int | None = None

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """Parameter from the torch tensor."""
        if self.third is not None:
            size = tensor.shape[0] // 3
            tensor = tensor[self.third * size : (self.third + 1) * size]
        if self.form == "transpose":
            return tensor.T
        return tensor[0] if self.form == "leading_axis" else tensor

    def to_torch(self, parameter: np.ndarray) -> np.ndarray:
        """Torch tensor, or its third, from the parameter."""
        if self.form == "transpose":
            return parameter.T
        return parameter[None] if self.form == "leading_axis" else parameter

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full torch tensor, from that of the parameter."""
        if self.form == "transpose":
            shape = shape[::-1]
        if self.third is not None:
            shape = (3 * shape[0], *shape[1:])
        return (1, *shape) if self.form == "leading_axis" else shape


def linear(path: str, torch: str, lora: bool = False) -> Iterator[Name]:
    """Names of a Linear; with `lora` as PEFT wraps it."""
    base = f"{torch}.base_layer" if lora else torch
    yield Name(f"{path}/kernel", f"{base}.weight", "transpose")
    yield Name(f"{path}/bias", f"{base}.bias")
    if lora:
        yield Name(f"{path}/lora/a", f"{torch}.lora_A.default.weight", "transpose")
        yield Name(f"{path}/lora/b", f"{torch}.lora_B.default.weight", "transpose")


def norm(path: str, torch: str) -> Iterator[Name]:
    """Names of a LayerNorm."""
    yield Name(f"{path}/scale", f"{torch}.weight")
    yield Name(f"{path}/bias", f"{torch}.bias")


def rms_norm(path: str, torch: str) -> Iterator[Name]:
    """Names of an RMSNorm, which has no bias."""
    yield Name(f"{path}/scale", f"{torch}.weight")


def attention(path: str, torch: str, lora: bool = False) -> Iterator[Name]:
    """Names of BERT's attention with the LayerNorm after it."""
    for name in ("query", "key", "value"):
        yield from linear(f"{path}/{name}", f"{torch}.self.{name}", lora)
    yield from linear(f"{path}/output", f"{torch}.output.dense", lora)
    yield from norm(f"{path}/norm", f"{torch}.output.LayerNorm")


def feed_forward(path: str, torch: str, suffix: str = "", lora: bool = False) -> Iterator[Name]:
    """Names of BERT's feed-forward network with the LayerNorm after it."""
    yield from linear(f"{path}/intermediate", f"{torch}.intermediate{suffix}.dense", lora)
    yield from linear(f"{path}/output", f"{torch}.output{suffix}.dense", lora)
    yield from norm(f"{path}/norm", f"{torch}.output{suffix}.LayerNorm")


def multihead(path: str, torch: str) -> Iterator[Name]:
    """Names of a torch.nn.MultiheadAttention, whose in-projection is one tensor."""
    for third, name in enumerate(("query", "key", "value")):
        yield Name(f"{path}/{name}/kernel", f"{torch}.in_proj_weight", "transpose", third)
        yield Name(f"{path}/{name}/bias", f"{torch}.in_proj_bias", "same", third)
    yield from linear(f"{path}/output", f"{torch}.out_proj")


def bert_names(layers: int, prefix: str = "", path: str = "qformer", lora: bool = False) -> Iterator[Name]:
    """Parameters of any BERT, as `transformers.BertModel` names them after `prefix`; here they are under `path`."""
    embeddings = f"{prefix}embeddings"
    yield Name(f"{path}/word_embeddings/embedding", f"{embeddings}.word_embeddings.weight")
    yield Name(f"{path}/position_embeddings/embedding", f"{embeddings}.position_embeddings.weight")
    yield from norm(f"{path}/norm", f"{embeddings}.LayerNorm")
    for number in range(layers):
        here, torch = f"{path}/layers/{number}", f"{prefix}encoder.layer.{number}"
        yield from attention(f"{here}/self_attention", f"{torch}.attention", lora)
        yield from feed_forward(f"{here}/ffn", torch, lora=lora)


def query_copy(path: str) -> str | None:
    """Parameter of the queries' feed-forward network that is initialised as a copy of this one; None for others."""
    return path.replace("/ffn/", "/query_ffn/") if "/ffn/" in path else None


TEXT_ENCODER = "text_encoder."
PEFT_TEXT_ENCODER = f"{TEXT_ENCODER}base_model.model."

POSITION_IDS = "Qformer.bert.embeddings.position_ids"
LANGUAGE_HEAD = "Qformer.cls."
COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")  # scalars stored by weight averaging


def is_unused(torch: str) -> bool:
    """Whether no loss or embedding uses this entry of a released model, so that it is not read."""
    return why_unused(torch) is not None


def why_unused(torch: str) -> str | None:
    """Reason that an entry of a released model is not read; None for a parameter or an unknown entry."""
    if torch in COUNTERS:
        return "a scalar that weight averaging stores with the weights"
    if torch == POSITION_IDS or (torch.startswith(TEXT_ENCODER) and torch.endswith("embeddings.position_ids")):
        return "a buffer of position ids: 0, 1, 2, ..."
    if torch.startswith(LANGUAGE_HEAD):
        return "BERT's language-model head, which no loss or embedding of the alignment uses"
    if torch.startswith(TEXT_ENCODER) and ".pooler." in torch:
        return "BERT's pooler, which is unused: texts are pooled from the last hidden states"
    return None


def missing(state: Mapping[str, np.ndarray], wanted: Mapping[str, int]) -> list[str]:
    """Tensors that a `state_dict` lacks, or has with another number of axes than expected, each with the reason."""
    return [
        f"{name}: {'missing' if name not in state else f'is {state[name].ndim}-dimensional, expected {axes}'}"
        for name, axes in wanted.items()
        if name not in state or state[name].ndim != axes
    ]
