"""Weights of the released PyTorch model to ours and back (DESIGN section 9).

Checkpoints come from other people's machines: nothing of a file is ever executed, and what does not fit is said in
one error that lists all of it. Safetensors files need no torch; for the others it is imported late.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.convert.checkpoint_files import StateDict
from pathflip_jax.convert.names import is_unused, names, unused
from pathflip_jax.convert.pathflip2 import TOKENS, complete, infer_pathflip2
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


def infer_config(
    state: Mapping[str, np.ndarray], heads: int | None = None, arguments: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The config of a `state_dict`, from names and shapes, and for a PathFLIP2 the `arguments` it was trained with.

    Heads leave no trace in either: those of BERT are `heads`, or one per 64 of the hidden width as in every published
    BERT of 768 or 1,024 (a MiniLM has one per 32), those of the region transformer and of the text-region attention
    are the released 8. Raises ValueError listing the tensors without which nothing can be inferred.
    """
    if TOKENS in state:
        return infer_pathflip2(state, heads, arguments)
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
    faults = [
        f"{name}: {'missing' if name not in state else f'is {state[name].ndim}-dimensional, expected {axes}'}"
        for name, axes in wanted.items()
        if name not in state or state[name].ndim != axes
    ]
    if faults:
        raise ValueError(_not_the_model(faults, state))
    patch, projection, queries, words, positions, intermediate, _ = (state[name].shape for name in wanted)
    hidden = queries[2]
    if heads is None:
        heads = max(hidden // 64, 1)
    freq = cross[1] if len(cross) > 1 else max(layers) + 1
    if cross != list(range(0, max(layers) + 1, freq)):
        raise ValueError(
            f"cross-attention stands in layers {cross} of {max(layers) + 1}; expected every n-th layer from 0 on"
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


def _not_the_model(faults: list[str], state: Mapping[str, np.ndarray]) -> str:
    return (
        f"not a PathFLIP alignment model: {len(faults)} of its tensors do not fit ({len(state)} found)\n  "
        + "\n  ".join(faults)
    )


def torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the PyTorch model that is a parameter here."""
    return dict(_torch_shapes(config))


@functools.lru_cache(maxsize=8)  # a conversion asks several times, and each answer traces the model
def _torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from pathflip_jax.model.parameters import abstract_params

    shapes = abstract_params(config)
    return {name.torch: name.torch_shape(tuple(shapes[name.path].shape)) for name in names(config)}


def to_jax(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters by our names, for `unflatten`, from a PyTorch `state_dict`.

    Buffers and the language-model head are dropped, whether there or not. Raises ValueError that lists every other
    tensor that is missing, unknown, of another shape, or not finite.
    """
    if isinstance(config, PathFLIP2Config):
        state = complete(state, config)
    shapes = torch_shapes(config)
    faults = [f"{name}: missing" for name in shapes if name not in state]
    faults += [f"{name}: unknown" for name in state if name not in shapes and not is_unused(name)]
    for name, shape in shapes.items():
        if name in state and state[name].shape != shape:
            faults.append(f"{name}: has shape {state[name].shape}, expected {shape}")
        elif name in state and not np.isfinite(state[name]).all():
            faults.append(f"{name}: holds NaN or infinite numbers")
    if faults:
        raise ValueError(_not_the_model(faults, state))
    return {name.path: np.array(name.to_jax(state[name.torch]), order="C") for name in names(config)}


def to_torch(flat: Mapping[str, Any], config: ModelConfig) -> StateDict:
    """The `state_dict` of parameters by our names, complete for `load_state_dict(strict=True)` of the released class.

    What that class holds and nothing uses is filled (`names.unused`). A `logit_bias` has no counterpart there: it is
    one entry more, which `torch_model` takes when the config has one and the released class refuses.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for name in names(config):
        parts.setdefault(name.torch, []).append(name.to_torch(np.asarray(flat[name.path], np.float32)))
    tensors = {name: np.concatenate(thirds) if len(thirds) > 1 else thirds[0] for name, thirds in parts.items()}
    words = next(tensors[name] for name in tensors if name.endswith("embeddings.word_embeddings.weight"))
    tensors |= unused(config, words)
    return {name: np.array(tensor, order="C") for name, tensor in sorted(tensors.items())}


def read_bert_heads(folder: Path) -> int | None:
    """The attention heads that the config.json of a BERT folder names, None without one."""
    return bert_setting(folder, "num_attention_heads")


def bert_setting(folder: str | Path, name: str) -> int | None:
    """What the config.json of a BERT folder says, where there is one."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the BERT folder again") from error
