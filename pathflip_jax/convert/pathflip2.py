"""Checkpoints of PathFLIP2: sizes from names, shapes and the run's own arguments, and LoRA.

The published code trains with PEFT around BERT and stores its arguments (`hparams.yaml`, or in the checkpoint) under
the names of `ARGUMENTS`. Heads, pooling and the scale of LoRA leave no trace in the tensors: where the arguments are
missing too they must be given, or are the published defaults, as `infer_pathflip2` says.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pathflip_jax.convert.names import PEFT_TEXT_ENCODER, TEXT_ENCODER
from pathflip_jax.model.config import PathFLIP2Config

TOKENS = "slide_encoder.visual_tokens"  # the tensor that a PathFLIP2 is known by
HEAD = "fine_gained_loss_head."
# Published argument -> setting, for what tensors tell too (a contradiction is refused) and what they do not.
SIZES = {"image_embed_dim": "feature_dim", "embed_dim": "embed_dim", "text_embed_dim": "hidden"}
OTHERS = {
    "num_heads": "token_heads",
    "num_flair_heads": "text_region_heads",
    "top_k": "top_k",
    "topk_temperature": "topk_temperature",
    "init_logit_scale": "scale_init",
    "init_logit_bias": "bias_init",
}
POOLINGS = {"mean": "mean_padded", "cls_token": "cls"}
LORA = re.compile(r"(.*)\.lora_([AB])\.default\.weight$")

StateDict = Mapping[str, np.ndarray]


def infer_pathflip2(
    state: StateDict, heads: int | None = None, arguments: Mapping[str, Any] | None = None
) -> PathFLIP2Config:
    """The config of a PathFLIP2 `state_dict`, from names and shapes and the published run's `arguments`.

    BERT's heads are `heads`, or one per 64 of the hidden width. Without arguments, pooling is the published default
    ("cls"), heads and top-k too. Raises ValueError for tensors without which nothing can be inferred, arguments that
    contradict them, and LoRA whose scale (`lora_alpha`) nobody says.
    """
    arguments = dict(arguments or {})
    lora = {match[1]: state[name] for name in state if (match := LORA.match(name)) and match[2] == "A"}
    bert = PEFT_TEXT_ENCODER if any(name.startswith(PEFT_TEXT_ENCODER) for name in state) else TEXT_ENCODER
    base = ".base_layer" if lora else ""
    wanted = {
        "image_proj.0.weight": 2,
        TOKENS: 3,
        f"{bert}embeddings.word_embeddings.weight": 2,
        f"{bert}embeddings.position_embeddings.weight": 2,
        f"{bert}encoder.layer.0.intermediate.dense{base}.weight": 2,
    }
    faults = [
        f"{name}: {'missing' if name not in state else f'is {state[name].ndim}-dimensional, expected {axes}'}"
        for name, axes in wanted.items()
        if name not in state or state[name].ndim != axes
    ]
    if faults:
        raise ValueError("not a whole PathFLIP2: " + "; ".join(faults))
    patch, tokens, words, positions, intermediate = (state[name].shape for name in wanted)
    sizes = {"feature_dim": patch[1], "embed_dim": patch[0], "hidden": words[1]}
    clashes = [
        f"{name}={arguments[name]}, the tensors say {sizes[setting]}"
        for name, setting in SIZES.items()
        if name in arguments and arguments[name] != sizes[setting]
    ]
    attention = any(name.startswith(HEAD) for name in state)
    if attention and arguments.get("use_soft_topk"):
        clashes.append(f"use_soft_topk=True, yet there is a {HEAD.rstrip('.')}")
    rank = next((a.shape[0] for a in lora.values()), 0)
    if "text_encoder_use_lora" in arguments and bool(arguments["text_encoder_use_lora"]) != bool(rank):
        clashes.append(f"text_encoder_use_lora={arguments['text_encoder_use_lora']}, the tensors hold rank {rank}")
    if rank and arguments.get("lora_rank", rank) != rank:
        clashes.append(f"lora_rank={arguments['lora_rank']}, the tensors say {rank}")
    pooling = arguments.get("text_pooling_type", "cls_token")
    if pooling not in POOLINGS:
        clashes.append(f"text_pooling_type={pooling!r}, expected one of {', '.join(POOLINGS)}")
    if clashes:
        raise ValueError(
            "the arguments of the run and its tensors contradict each other: "
            + "; ".join(clashes)
            + "; give the hparams.yaml of this checkpoint"
        )
    if rank and "lora_alpha" not in arguments:
        raise ValueError(
            f"its text encoder has LoRA of rank {rank}, whose scale no tensor says; put the run's hparams.yaml beside "
            "the checkpoint, or give --lora-alpha (64 in the published code)"
        )
    others = {setting: arguments[name] for name, setting in OTHERS.items() if arguments.get(name) is not None}
    return PathFLIP2Config(
        **sizes,
        layers=_count(state, rf"{re.escape(bert)}encoder\.layer\.(\d+)\."),
        heads=max(words[1] // 64, 1) if heads is None else heads,
        intermediate=intermediate[0],
        vocab_size=words[0],
        max_positions=positions[0],
        tokens=tokens[1] - 1,
        token_layers=_count(state, r"slide_encoder\.encoder_layers\.(\d+)\."),
        text_pooling=POOLINGS[pooling],
        text_lora_rank=rank,
        text_lora_alpha=float(arguments.get("lora_alpha", PathFLIP2Config.text_lora_alpha)),
        region_head="attention" if attention else "soft_topk",
        **{name: type(getattr(PathFLIP2Config, name))(value) for name, value in others.items()},
    )


def assumed_arguments(config: PathFLIP2Config, arguments: Mapping[str, Any]) -> list[str]:
    """The settings that no tensor tells and the run's arguments do not say: the published defaults."""
    silent = {name: setting for name, setting in OTHERS.items() if arguments.get(name) is None}
    silent |= {} if "text_pooling_type" in arguments else {"text_pooling_type": "text_pooling"}
    head = ("text_region_heads",) if config.region_head == "attention" else ("top_k", "topk_temperature")
    told = [setting for setting in silent.values() if setting in ("token_heads", "text_pooling", *head)]
    if not told:
        return []
    said = ", ".join(f"{setting} {getattr(config, setting)}" for setting in told)
    return [f"{said} (the published code's: no arguments of the run say it; --hparams names its hparams.yaml)"]


def _count(state: StateDict, pattern: str) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, state) if match), default=-1)


def complete(state: StateDict, config: PathFLIP2Config) -> dict[str, np.ndarray]:
    """The `state_dict` with the scales and biases that a run of another loss did not have, at their initial values.

    Trained with `infonce`, a model has no `global_logit_*`; no embedding or map depends on them.
    """
    initial = {"scale": config.scale_init, "bias": config.bias_init}
    filled = {
        f"{level}_logit_{name}": np.float32(value) for level in ("global", "local") for name, value in initial.items()
    }
    return {name: np.asarray(value) for name, value in filled.items()} | dict(state)


def merge_lora(state: StateDict, alpha: float) -> dict[str, np.ndarray]:
    """The `state_dict` with LoRA added to the kernels, under the names that BERT has without PEFT."""
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
