"""PathFLIP checkpoints: tensor names, and the config inferred from names and shapes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pathflip_jax.convert.names import (
    LANGUAGE_HEAD,
    POSITION_IDS,
    Name,
    attention,
    bert_names,
    feed_forward,
    linear,
    missing,
    multihead,
    norm,
)
from pathflip_jax.model.config import PathFLIPConfig


def pathflip_names(config: PathFLIPConfig) -> Iterator[Name]:
    """Every parameter of a PathFLIP, once."""
    if config.patch_projection == "linear":
        yield from linear("patch_projection/linear", "path_encoder")
    else:
        yield from linear("patch_projection/linear", "path_encoder.0")
        yield from norm("patch_projection/norm", "path_encoder.1")
        yield from linear("patch_projection/linear_out", "path_encoder.3")
        yield from norm("patch_projection/norm_out", "path_encoder.4")
    yield Name("qformer/query_tokens", "query_tokens", "leading_axis")
    yield from bert_names(config.layers, "Qformer.bert.")
    for number in range(config.layers):
        path, torch = f"qformer/layers/{number}", f"Qformer.bert.encoder.layer.{number}"
        yield from feed_forward(f"{path}/query_ffn", torch, "_query")
        if number in config.cross_layers:
            yield from attention(f"{path}/cross_attention", f"{torch}.crossattention")
    yield from linear("slide_projection", "path_proj")
    yield from linear("text_projection", "text_proj")
    for number in range(config.region_layers):
        path, torch = f"region_layers/{number}", f"path_trans.layers.{number}"
        yield from multihead(f"{path}/attention", f"{torch}.self_attn")
        yield from norm(f"{path}/attention_norm", f"{torch}.norm1")
        yield from linear(f"{path}/intermediate", f"{torch}.linear1")
        yield from linear(f"{path}/output", f"{torch}.linear2")
        yield from norm(f"{path}/norm", f"{torch}.norm2")
    for name, torch in (("query", "w_q"), ("key", "w_k"), ("value", "w_v")):
        yield from linear(f"text_region/{name}", f"fg_head.{torch}")
    yield from multihead("text_region/attention", "fg_head.attn")
    yield Name("logit_scale", "logit_scale")
    if config.logit_bias_init is not None:
        yield Name("logit_bias", "logit_bias")  # absent from the released model


def pathflip_unused(config: PathFLIPConfig, words: np.ndarray) -> dict[str, np.ndarray]:
    """Entries of the released `state_dict` without a parameter here, filled so that it loads with strict=True.

    The language-model head is tied to the word table `words` as in BERT, and otherwise neutral.
    """
    H, head = config.hidden, f"{LANGUAGE_HEAD}predictions"
    return {
        POSITION_IDS: np.arange(config.max_positions, dtype=np.int64)[None],
        # One row short: the released code adds [DEC] to the tables after BERT has created this bias.
        f"{head}.bias": np.zeros(config.vocab_size - 1, np.float32),
        f"{head}.transform.dense.weight": np.zeros((H, H), np.float32),
        f"{head}.transform.dense.bias": np.zeros(H, np.float32),
        f"{head}.transform.LayerNorm.weight": np.ones(H, np.float32),
        f"{head}.transform.LayerNorm.bias": np.zeros(H, np.float32),
        f"{head}.decoder.weight": words,
        f"{head}.decoder.bias": np.zeros(config.vocab_size, np.float32),
    }


def infer_pathflip(
    state: Mapping[str, np.ndarray], heads: int | None = None, arguments: Mapping[str, Any] | None = None
) -> PathFLIPConfig:
    """Infer the config of a PathFLIP `state_dict` from names and shapes; run arguments add nothing to them.

    Neither determines the numbers of heads: BERT has `heads`, or one per 64 of the hidden width; the region transformer
    and the text-region attention have 8, as released. Raises ValueError listing the tensors without which nothing can
    be inferred.
    """
    bert = "Qformer.bert."
    layer = re.compile(re.escape(bert) + r"encoder\.layer\.(\d+)\.(crossattention\.)?")
    found = [match for match in map(layer.match, state) if match]
    layers = {int(match[1]) for match in found}
    cross = sorted({int(match[1]) for match in found if match[2]})
    region_layers = {int(match[1]) for match in map(re.compile(r"path_trans\.layers\.(\d+)\.").match, state) if match}
    mlp = "path_encoder.0.weight" in state
    wanted = {
        "path_encoder.0.weight" if mlp else "path_encoder.weight": 2,
        "path_proj.weight": 2,
        "query_tokens": 3,
        f"{bert}embeddings.word_embeddings.weight": 2,
        f"{bert}embeddings.position_embeddings.weight": 2,
        f"{bert}encoder.layer.0.intermediate.dense.weight": 2,
        f"{bert}encoder.layer.0.crossattention.self.query.weight": 2,
    }
    if faults := missing(state, wanted):
        raise ValueError(not_the_model(faults, state))
    patch, projection, queries, words, positions, intermediate, _ = (state[name].shape for name in wanted)
    hidden = queries[2]
    if heads is None:
        heads = max(hidden // 64, 1)
    freq = cross[1] if len(cross) > 1 else max(layers) + 1
    if cross != list(range(0, max(layers) + 1, freq)):
        raise ValueError(
            f"cross-attention is in layers {cross} of {max(layers) + 1}; expected every n-th layer from layer 0 on"
        )
    return PathFLIPConfig(
        feature_dim=patch[1],
        embed_dim=projection[0],
        hidden=hidden,
        layers=max(layers) + 1,
        heads=heads,
        intermediate=intermediate[0],
        num_queries=queries[1],
        cross_attention_freq=freq,
        vocab_size=words[0],
        max_positions=positions[0],
        patch_projection="mlp" if mlp else "linear",
        patch_hidden=patch[0] if mlp and patch[0] != projection[0] else None,
        region_layers=max(region_layers, default=-1) + 1,
        logit_bias_init=float(state["logit_bias"]) if "logit_bias" in state else None,
    )


def not_the_model(faults: list[str], state: Mapping[str, np.ndarray]) -> str:
    """Error message for a `state_dict` whose tensors are not those of a model."""
    return (
        f"not a PathFLIP alignment model: {len(faults)} of its tensors do not fit ({len(state)} found)\n  "
        + "\n  ".join(faults)
    )


def assumed_heads(config: PathFLIPConfig, arguments: Mapping[str, Any]) -> list[str]:
    """Settings that neither tensors nor run arguments determine: the released code's."""
    return [
        f"region_heads {config.region_heads} and text_region_heads {config.text_region_heads} (the released code's)"
    ]
