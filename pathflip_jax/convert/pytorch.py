"""Weights of the released PyTorch model to ours and back (DESIGN section 9).

Checkpoints come from other people's machines: nothing of a file is ever executed, and what does not fit is said in
one error that lists all of it. Safetensors files need no torch; for the others it is imported late.
"""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pathflip_jax.convert.checkpoint_files import StateDict, import_torch
from pathflip_jax.convert.exported import describe_export
from pathflip_jax.convert.names import is_unused, names, unused
from pathflip_jax.convert.pathflip2 import TOKENS, complete, infer_pathflip2, merge_lora
from pathflip_jax.data.storage.durable import sync
from pathflip_jax.export.readmes import readme, readme2
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


def write_checkpoint(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a `state_dict` as .safetensors, or as .pt with torch; the file appears whole or not at all."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path}: weights are written as .safetensors or .pt")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:  # not by the library, whose files nobody else may read
            if path.suffix == ".safetensors":
                file.write(safetensors.numpy.save(dict(state), metadata={"format": "pt"}))
            else:
                torch = import_torch(path)
                torch.save({name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}, file)
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(
            f"{path}: not written ({error}); free disk space or mend permissions, and run it again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


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


def export(run: str | Path, out: str | Path, *, which: str | int = "best", pt: bool = False) -> None:
    """Write a run for PyTorch users: weights, config, BERT folder, the model's own code and a README.

    Weights are model.safetensors, with `pt` (needs torch) also model.pt. The folder appears whole or not at all;
    FileExistsError when there is one with content.
    """
    from pathflip_jax.runs.folder import load_run

    with new_folder(out) as part:
        write_export(part, *load_run(run, which), pt=pt)


def write_export(part: Path, model, settings: dict, tokenizer, *, pt: bool = False) -> None:
    """Fill a folder with what `export` says, of a model with the settings and the tokenizer of its run."""
    state, config, more = merged_state(model)
    tokenizer.save(part / "bert")
    _complete_bert_folder(part / "bert", config)
    write_checkpoint(part / "model.safetensors", state)
    if pt:
        write_checkpoint(part / "model.pt", state)
    about = config.to_dict() | describe_export(config, settings, **more)
    (part / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    code, page = ("torch_model.py", readme) if isinstance(config, PathFLIPConfig) else ("torch_pathflip2.py", readme2)
    shutil.copyfile(Path(__file__).with_name(code), part / code)
    (part / "README.md").write_text(page(config, settings), encoding="utf-8")


def merged_state(model) -> tuple[StateDict, ModelConfig, dict[str, list[str]]]:
    """The `state_dict` of a model with the LoRA of its texts merged in, the config it then has, notes of it."""
    from pathflip_jax.model.parameters import flatten

    config = model.config
    state = to_torch(flatten(model), config)
    if not isinstance(config, PathFLIP2Config) or not config.text_lora_rank:
        return state, config, {}
    rank, alpha = config.text_lora_rank, config.text_lora_alpha
    notes = [f"the text encoder's LoRA (rank {rank}, alpha {alpha:g}) was merged into it at export"]
    return merge_lora(state, alpha), dataclasses.replace(config, text_lora_rank=0), {"notes": notes}


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all went well and is gone otherwise.

    Raises FileExistsError where there is one of that name with content.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not empty; export to another folder, or remove it")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _complete_bert_folder(folder: Path, config: ModelConfig) -> None:
    """Add what the released code reads of a BERT folder: vocab.txt and the sizes in config.json."""
    if not (folder / "vocab.txt").exists():
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        words = sorted(vocabulary, key=vocabulary.get)
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    whole = isinstance(config, PathFLIP2Config)
    sizes = {
        "model_type": "bert",
        "architectures": ["BertModel" if whole else "BertLMHeadModel"],
        "vocab_size": config.vocab_size - (not whole),  # [DEC] is added by the code that reads the folder
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
