"""Conversion of weights between the released PyTorch models and ours (DESIGN section 9).

Checkpoints are untrusted: nothing in a file is ever executed, and every mismatch is listed in a single error.
Safetensors files need no torch; it is imported only to read the other formats.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.convert.checkpoint_files import StateDict
from pathflip_jax.convert.families import CONVERSIONS, conversion_of, names
from pathflip_jax.convert.names import is_unused
from pathflip_jax.convert.pathflip import not_the_model
from pathflip_jax.model.config import ModelConfig, PathFLIPConfig


def infer_config(
    state: Mapping[str, np.ndarray], heads: int | None = None, arguments: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Infer the config of a `state_dict` from names and shapes, and for a PathFLIP2 from its training `arguments`.

    Tensors do not determine the numbers of heads: BERT has `heads`, or one per 64 of the hidden width as in every
    published BERT of 768 or 1,024 (a MiniLM has one per 32); the region transformer and the text-region attention have
    8, as released. Raises ValueError listing the tensors without which nothing can be inferred.
    """
    known = (name for name, family in reversed(CONVERSIONS.items()) if family.known_by[0] in state)
    return CONVERSIONS[next(known, PathFLIPConfig.family)].infer(state, heads, arguments)


def torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the PyTorch model with a parameter here."""
    return dict(_torch_shapes(config))


@functools.lru_cache(maxsize=8)  # a conversion calls this several times, and each call traces the model
def _torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from pathflip_jax.model.parameters import abstract_params

    shapes = abstract_params(config)
    return {name.torch: name.torch_shape(tuple(shapes[name.path].shape)) for name in names(config)}


def to_jax(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters by our names, for `unflatten`, from a PyTorch `state_dict`.

    Buffers and the language-model head are dropped where present. Raises ValueError that lists every other
    tensor that is missing, unknown, of another shape, or not finite.
    """
    state = conversion_of(config).complete(state, config)
    shapes = torch_shapes(config)
    faults = [f"{name}: missing" for name in shapes if name not in state]
    faults += [f"{name}: unknown" for name in state if name not in shapes and not is_unused(name)]
    for name, shape in shapes.items():
        if name in state and state[name].shape != shape:
            faults.append(f"{name}: has shape {state[name].shape}, expected {shape}")
        elif name in state and not np.isfinite(state[name]).all():
            faults.append(f"{name}: holds NaN or infinite numbers")
    if faults:
        raise ValueError(not_the_model(faults, state))
    return {name.path: np.array(name.to_jax(state[name.torch]), order="C") for name in names(config)}


def to_torch(flat: Mapping[str, Any], config: ModelConfig) -> StateDict:
    """`state_dict` from parameters by our names, complete for `load_state_dict(strict=True)` of the released class.

    Entries that the class holds but never uses are filled (`Conversion.unused`). A `logit_bias` has no counterpart
    there: it is an additional entry, which `torch_model` takes when the config has one and the released class refuses.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for name in names(config):
        parts.setdefault(name.torch, []).append(name.to_torch(np.asarray(flat[name.path], np.float32)))
    tensors = {name: np.concatenate(thirds) if len(thirds) > 1 else thirds[0] for name, thirds in parts.items()}
    words = next(tensors[name] for name in tensors if name.endswith("embeddings.word_embeddings.weight"))
    tensors |= conversion_of(config).unused(config, words)
    return {name: np.array(tensor, order="C") for name, tensor in sorted(tensors.items())}


def read_bert_heads(folder: Path) -> int | None:
    """Number of attention heads in the config.json of a BERT folder, None without one."""
    return bert_setting(folder, "num_attention_heads")


def bert_setting(folder: str | Path, name: str) -> int | None:
    """A setting from the config.json of a BERT folder, if there is one."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the BERT folder again") from error
