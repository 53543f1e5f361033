"""PathFLIP2 checkpoints: tensor names, LoRA, and the config inferred from names, shapes and the run's arguments.

The published code trains with PEFT around BERT and stores its arguments (`hparams.yaml`, or in the checkpoint) under
the names in `SIZES` and `OTHERS`. Tensors do not determine heads, pooling and the scale of LoRA: where the arguments
are missing too, these must be given or are the published defaults, as `infer_pathflip2` documents.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pathflip_jax.convert.names import (
    PEFT_TEXT_ENCODER,
    TEXT_ENCODER,
    Name,
    bert_names,
    linear,
    missing,
    multihead,
    norm,
    rms_norm,
)
from pathflip_jax.model.config import PathFLIP2Config

TOKENS = "slide_encoder.visual_tokens"  # the tensor that identifies a PathFLIP2
HEAD = "fine_gained_loss_head."
# Published argument -> setting: those that tensors also determine (a contradiction is refused), and the others.
SIZES = {"image_embed_dim": "feature_dim", "embed_dim": "embed_dim", "text_embed_dim": "hidden"}
OTHERS = {
    "num_heads": "token_heads",
    "num_flair_heads": "text_region_heads",
    "top_k": "top_k",
    "topk_temperature": "topk_temperature",
    "init_logit_scale": "scale_init",
    "init_logit_bias": "bias_init",
}
POOLING, DEFAULT_POOLING = "text_pooling_type", "cls_token"
POOLINGS = {"mean": "mean_padded", "cls_token": "cls"}
LORA = re.compile(r"(.*)\.lora_([AB])\.default\.weight$")

StateDict = Mapping[str, np.ndarray]


def pathflip2_names(config: PathFLIP2Config) -> Iterator[Name]:
    """Every parameter of a PathFLIP2, once; with LoRA its BERT has PEFT's names."""
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
        yield from multihead("text_region/attention", f"{head}.attn")
        for name, torch in (("query_norm", "ln_q"), ("key_norm", "ln_k"), ("value_norm", "ln_v")):
            yield from norm(f"text_region/{name}", f"{head}.{torch}")
    for level, torch in (("slide", "global"), ("region", "local")):
        for name in ("scale", "bias"):
            yield Name(f"{level}_{name}", f"{torch}_logit_{name}")


def _projection(path: str, torch: str) -> Iterator[Name]:
    yield from linear(f"{path}/linear", f"{torch}.0")
    yield from rms_norm(f"{path}/norm", f"{torch}.1")


def _block(path: str, torch: str, itself: bool = False) -> Iterator[Name]:
    yield from multihead(f"{path}/attention", f"{torch}.mha")
    yield from rms_norm(f"{path}/query_norm", f"{torch}.norm_q")
    if not itself:
        yield from rms_norm(f"{path}/key_norm", f"{torch}.norm_kv")
    yield from rms_norm(f"{path}/norm", f"{torch}.norm2")
    yield from linear(f"{path}/intermediate", f"{torch}.ffn.0")
    yield from linear(f"{path}/output", f"{torch}.ffn.3")


def pathflip2_unused(config: PathFLIP2Config, words: np.ndarray) -> dict[str, np.ndarray]:
    """Entries of the published `state_dict` without a parameter here: BERT's pooler, which is unused."""
    dense = f"{PEFT_TEXT_ENCODER if config.text_lora_rank else TEXT_ENCODER}pooler.dense"
    H = config.hidden
    return {f"{dense}.weight": np.zeros((H, H), np.float32), f"{dense}.bias": np.zeros(H, np.float32)}


def infer_pathflip2(
    state: StateDict, heads: int | None = None, arguments: Mapping[str, Any] | None = None
) -> PathFLIP2Config:
    """Infer the config of a PathFLIP2 `state_dict` from names, shapes and the published run's `arguments`.

    BERT's heads are `heads`, or one per 64 of the hidden width. Without arguments, pooling is the published default
    ("cls"), heads and top-k too. Raises ValueError for tensors without which nothing can be inferred, arguments that
    contradict them, and LoRA of unknown scale (`lora_alpha`).
    """
    arguments = dict(arguments or {})
    sizes, bert = _sizes(state)
    rank = next((state[name].shape[0] for name in state if (match := LORA.match(name)) and match[2] == "A"), 0)
    attention = any(name.startswith(HEAD) for name in state)
    if clashes := _clashes(arguments, sizes, rank, attention):
        raise ValueError(
            "the arguments of the run and its tensors contradict each other: "
            + "; ".join(clashes)
            + "; give the hparams.yaml of this checkpoint"
        )
    if rank and "lora_alpha" not in arguments:
        raise ValueError(
            f"its text encoder has LoRA of rank {rank}, whose scale no tensor holds; put the run's hparams.yaml next "
            "to the checkpoint, or pass --lora-alpha (64 in the published code)"
        )
    others = {setting: arguments[name] for name, setting in OTHERS.items() if arguments.get(name) is not None}
    return PathFLIP2Config(
        **sizes,
        layers=_count(state, rf"{re.escape(bert)}encoder\.layer\.(\d+)\."),
        heads=max(sizes["hidden"] // 64, 1) if heads is None else heads,
        token_layers=_count(state, r"slide_encoder\.encoder_layers\.(\d+)\."),
        text_pooling=POOLINGS[arguments.get(POOLING, DEFAULT_POOLING)],
        text_lora_rank=rank,
        text_lora_alpha=float(arguments.get("lora_alpha", PathFLIP2Config.text_lora_alpha)),
        region_head="attention" if attention else "soft_topk",
        **{name: type(getattr(PathFLIP2Config, name))(value) for name, value in others.items()},
    )


def _sizes(state: StateDict) -> tuple[dict[str, int], str]:
    """Sizes read off shapes, by setting, and the prefix of BERT's tensors. ValueError lists what is missing."""
    bert = PEFT_TEXT_ENCODER if any(name.startswith(PEFT_TEXT_ENCODER) for name in state) else TEXT_ENCODER
    base = ".base_layer" if any(LORA.match(name) for name in state) else ""
    wanted = {
        "image_proj.0.weight": 2,
        TOKENS: 3,
        f"{bert}embeddings.word_embeddings.weight": 2,
        f"{bert}embeddings.position_embeddings.weight": 2,
        f"{bert}encoder.layer.0.intermediate.dense{base}.weight": 2,
    }
    if faults := missing(state, wanted):
        raise ValueError("not a complete PathFLIP2: " + "; ".join(faults))
    patch, tokens, words, positions, intermediate = (state[name].shape for name in wanted)
    sizes = {"feature_dim": patch[1], "embed_dim": patch[0], "hidden": words[1], "tokens": tokens[1] - 1}
    sizes |= {"vocab_size": words[0], "max_positions": positions[0], "intermediate": intermediate[0]}
    return sizes, bert


def _clashes(arguments: Mapping[str, Any], sizes: Mapping[str, int], rank: int, attention: bool) -> list[str]:
    """Run arguments that contradict the run's tensors."""
    clashes = [
        f"{name}={arguments[name]}, the tensors say {sizes[setting]}"
        for name, setting in SIZES.items()
        if name in arguments and arguments[name] != sizes[setting]
    ]
    if attention and arguments.get("use_soft_topk"):
        clashes.append(f"use_soft_topk=True, but the checkpoint contains {HEAD.rstrip('.')}")
    if "text_encoder_use_lora" in arguments and bool(arguments["text_encoder_use_lora"]) != bool(rank):
        clashes.append(f"text_encoder_use_lora={arguments['text_encoder_use_lora']}, the tensors hold rank {rank}")
    if rank and arguments.get("lora_rank", rank) != rank:
        clashes.append(f"lora_rank={arguments['lora_rank']}, the tensors say {rank}")
    pooling = arguments.get(POOLING, DEFAULT_POOLING)
    if pooling not in POOLINGS:
        clashes.append(f"{POOLING}={pooling!r}, expected one of {', '.join(POOLINGS)}")
    return clashes


def assumed_arguments(config: PathFLIP2Config, arguments: Mapping[str, Any]) -> list[str]:
    """Settings that neither tensors nor run arguments determine: the published defaults."""
    unset = {name: setting for name, setting in OTHERS.items() if arguments.get(name) is None}
    unset |= {} if POOLING in arguments else {POOLING: "text_pooling"}
    head = ("text_region_heads",) if config.region_head == "attention" else ("top_k", "topk_temperature")
    assumed = [setting for setting in unset.values() if setting in ("token_heads", "text_pooling", *head)]
    if not assumed:
        return []
    values = ", ".join(f"{setting} {getattr(config, setting)}" for setting in assumed)
    return [f"{values} (the published code's, since no run arguments state them; pass its hparams.yaml with --hparams)"]


def _count(state: StateDict, pattern: str) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, state) if match), default=-1)


def complete(state: StateDict, config: PathFLIP2Config) -> dict[str, np.ndarray]:
    """Add the scales and biases that a run with another loss lacks to a `state_dict`, at their initial values.

    Trained with `infonce`, a model has no `global_logit_*`; no embedding or map depends on them.
    """
    initial = {"scale": config.scale_init, "bias": config.bias_init}
    filled = {
        f"{level}_logit_{name}": np.float32(value) for level in ("global", "local") for name, value in initial.items()
    }
    return {name: np.asarray(value) for name, value in filled.items()} | dict(state)


def merge_lora(state: StateDict, alpha: float) -> dict[str, np.ndarray]:
    """Merge LoRA into the kernels of a `state_dict`, under BERT's names without PEFT."""
    added = {}
    for name in state:
        if (match := LORA.match(name)) and match[2] == "A":
            a, b = state[name], state[name.replace("lora_A", "lora_B")]
            added[f"{match[1]}.base_layer.weight"] = (b.astype(np.float64) @ a * (alpha / len(a))).astype(np.float32)
    merged = {}
    for name, tensor in state.items():
        if LORA.match(name):
            continue
        plain = name.replace(PEFT_TEXT_ENCODER, TEXT_ENCODER).replace(".base_layer.", ".")
        merged[plain] = tensor + added[name] if name in added else tensor
    return merged


def merge_text_lora(state: StateDict, config: PathFLIP2Config) -> tuple[StateDict, PathFLIP2Config, list[str]]:
    """Merge the text encoder's LoRA into `state_dict` and config, with notes; without LoRA, return them unchanged."""
    rank, alpha = config.text_lora_rank, config.text_lora_alpha
    if not rank:
        return state, config, []
    merged = merge_lora(state, alpha), dataclasses.replace(config, text_lora_rank=0)
    return *merged, [f"the text encoder's LoRA (rank {rank}, alpha {alpha:g}) was merged into it"]
