"""Import of the released finetune stage (aligner, projector, PEFT LoRA) as a run of the language stage here.

The released code saves trained parameters without the frozen language model, which is read from its folder, as for
every run of the language stage. It fixes rank 16 and alpha 32. Its class has no text-region attention: the resulting
aligner embeds slides and regions, and grounds by `slide` or `cosine`, not by text-region attention.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.convert.checkpoint_files import open_checkpoint
from pathflip_jax.convert.decoder_folders import read_decoder_config
from pathflip_jax.convert.decoder_names import TARGETS, adapter_names
from pathflip_jax.convert.names import why_unused
from pathflip_jax.convert.pytorch import (
    infer_config,
    read_bert_heads,
    to_jax,
    torch_shapes,
)
from pathflip_jax.convert.recognise import FINETUNE, Tensor, account, recognise
from pathflip_jax.convert.released import UNKNOWN_ENCODER, assumed_sizes, require_own_bert
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.export.from_language_export import AlignerParts, write_language_run
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.llm.shape import Shape
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import unflatten
from pathflip_jax.training import settings

PROJECTOR, LANGUAGE_MODEL = "path_proj_llm.", "llm_model."
ALPHA, DROPOUT = 32.0, 0.05  # of the released code


class Adapter(NamedTuple):
    """Language-model part of a checkpoint: LoRA by our names, and its scale."""

    params: dict[str, np.ndarray]
    config: LoRAConfig


def convert_finetune(
    source: str | Path,
    out: str | Path,
    *,
    bert_folder: str | Path,
    decoder_folder: str | Path,
    heads: int | None = None,
    weights: str = "",
) -> tuple[list[Tensor], list[str]]:
    """Convert a finetune-stage checkpoint to a run of the language stage, with its aligner in `out`/aligner.

    `decoder_folder` is the language model that it was trained on, `weights` one of several sets of weights. Returns the
    account of every tensor, and the assumed settings. The folder is written atomically. Raises ValueError for another
    checkpoint, another decoder or BERT, and for a language model that was trained without LoRA.
    """
    state, _ = open_checkpoint(source, weights)
    decoder = read_decoder_config(decoder_folder)
    try:
        if recognise(state) != FINETUNE:
            raise ValueError("not a checkpoint of the finetune stage; convert it without --decoder")
        aligner = {n: x for n, x in state.items() if not n.startswith((PROJECTOR, LANGUAGE_MODEL))}
        config = infer_config(aligner, heads or read_bert_heads(Path(bert_folder)))
        projector = _projector(state, config.embed_dim, decoder.width, decoder_folder)
        adapter = _adapter(state, decoder.layers)
        model = unflatten(config, to_jax(_with_text_region(aligner, config), config))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    words = TextTokenizer(bert_folder)
    require_own_bert(source, config, bert_folder, words)
    used = set(torch_shapes(config)) | {f"{PROJECTOR}weight", f"{PROJECTOR}bias"}
    used |= {name for name in state if ".lora_" in name}
    rows = account(state, used, _why_unused)
    shape = Shape(config, decoder, adapter.config, "bfloat16")
    params = {f"projector/{name}": x for name, x in projector.items()}
    params |= {f"decoder/{name}": x for name, x in adapter.params.items()}
    _check_shapes(params, shape, source, decoder_folder)
    assumed = [
        *assumed_sizes(config, heads, Path(bert_folder), {}),
        f"lora_alpha {ALPHA:g} and lora_dropout {DROPOUT} of the language model (the released code's)",
        "captions of at most 384 tokens, and regions cut by scan, as in the released code",
        UNKNOWN_ENCODER,
    ]
    given = {"data": {"cut": "scan", "caption_length": 384}, "assumed": assumed}
    found = _settings(Path(source).name, assumed)
    write_language_run(out, AlignerParts(model, given, words), shape, params, found, decoder_folder, rows)
    return rows, assumed


def _projector(state: Mapping[str, np.ndarray], width: int, decoder_width: int, folder: str | Path) -> dict:
    weight, bias = state[f"{PROJECTOR}weight"], state.get(f"{PROJECTOR}bias")
    if bias is None or weight.shape != (decoder_width, width) or bias.shape != (decoder_width,):
        raise ValueError(
            f"its projector has shape {weight.shape}, but {folder} is a language model of width {decoder_width}, which "
            f"needs {(decoder_width, width)} and a bias; pass the language model that it was trained on"
        )
    return {"kernel": np.ascontiguousarray(weight.T), "bias": bias}


def _adapter(state: Mapping[str, np.ndarray], layers: int) -> Adapter:
    """LoRA parameters of the language model, under our names."""
    tensors = {
        name.removeprefix(LANGUAGE_MODEL).replace(".default.", "."): x
        for name, x in state.items()
        if name.startswith(LANGUAGE_MODEL) and ".lora_" in name
    }
    if not tensors:
        raise ValueError(
            "its language model was trained in full, without LoRA; save it with save_pretrained, and train the "
            "projector on it (lm_stage1)"
        )
    targets = tuple(target for target in TARGETS if any(f".{target}.lora_A" in name for name in tensors))
    table = {name.torch: name for name in adapter_names(layers, targets)}
    faults = [f"{name}: missing" for name in table if name not in tensors]
    faults += [f"{name}: not in this language model" for name in tensors if name not in table]
    ranks = {x.shape[0] for name, x in tensors.items() if ".lora_A." in name}
    if len(ranks) > 1:
        faults.append(f"found ranks {sorted(ranks)}, expected a single one")
    if faults:
        raise ValueError(f"its LoRA does not fit a language model of {layers} layers: {'; '.join(faults[:6])}")
    params = {table[name].path: np.ascontiguousarray(table[name].to_jax(x)) for name, x in tensors.items()}
    return Adapter(params, LoRAConfig(ranks.pop(), ALPHA, DROPOUT, targets))


def _with_text_region(state: Mapping[str, np.ndarray], config: PathFLIPConfig) -> dict[str, np.ndarray]:
    """Aligner parameters and what the class of this stage lacks: zero text-region attention, and the initial scale."""
    absent = {name: shape for name, shape in torch_shapes(config).items() if name.startswith("fg_head.")}
    filled = {name: np.zeros(shape, np.float32) for name, shape in absent.items()}
    return filled | {"logit_scale": np.float32(config.logit_scale_init).reshape(())} | dict(state)


def _why_unused(name: str) -> str | None:
    if name.startswith(LANGUAGE_MODEL) and ".lora_" not in name:
        return "the language model's own weight, read from its folder"
    return why_unused(name)


def _check_shapes(params: Mapping[str, np.ndarray], shape: Shape, source: str | Path, folder: str | Path) -> None:
    wanted = {name: x.shape for name, x in shape.abstract(lambda name: True).items()}
    faults = [f"{n} is {x.shape}, expected {wanted[n]}" for n, x in params.items() if x.shape != wanted[n]]
    if faults:
        raise ValueError(
            f"{source}: does not fit the language model in {folder} ({'; '.join(faults[:4])}); pass the one that it "
            "was trained on"
        )


def _settings(source: str, assumed: list[str]) -> dict:
    """Settings of the run: those of lm_joint."""
    found = settings.load_config("lm_joint").to_dict()
    found["data"] |= {"encoder": "", "cut": "scan", "edge_um": None, "edge_px": None}
    found["lm"] |= {"trains": "projector,lora"}
    return found | {"converted_from": source, "assumed": assumed}
