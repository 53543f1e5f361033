"""Runs written for PyTorch: weights, config, BERT folder, the model's own code and a README."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from pathflip_jax.convert.checkpoint_files import StateDict, import_torch
from pathflip_jax.convert.exported import describe_export
from pathflip_jax.convert.pathflip2 import merge_lora
from pathflip_jax.convert.pytorch import to_torch
from pathflip_jax.data.storage.durable import sync
from pathflip_jax.data.storage.whole_folders import whole_folder
from pathflip_jax.export.readmes import readme, readme2
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.parameters import flatten


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


def export(run: str | Path, out: str | Path, *, which: str | int = "best", pt: bool = False) -> None:
    """Write a run for PyTorch users: weights, config, BERT folder, the model's own code and a README.

    Weights are model.safetensors, with `pt` (needs torch) also model.pt. The folder appears whole or not at all;
    FileExistsError when there is one with content.
    """
    from pathflip_jax.runs.folder import load_run  # late: weights alone are written without Orbax

    with whole_folder(out) as part:
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
    shutil.copyfile(Path(__file__).parents[1] / "convert" / code, part / code)
    (part / "README.md").write_text(page(config, settings), encoding="utf-8")


def merged_state(model) -> tuple[StateDict, ModelConfig, dict[str, list[str]]]:
    """The `state_dict` of a model with the LoRA of its texts merged in, the config it then has, notes of it."""
    config = model.config
    state = to_torch(flatten(model), config)
    if not isinstance(config, PathFLIP2Config) or not config.text_lora_rank:
        return state, config, {}
    rank, alpha = config.text_lora_rank, config.text_lora_alpha
    notes = [f"the text encoder's LoRA (rank {rank}, alpha {alpha:g}) was merged into it at export"]
    return merge_lora(state, alpha), dataclasses.replace(config, text_lora_rank=0), {"notes": notes}


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
