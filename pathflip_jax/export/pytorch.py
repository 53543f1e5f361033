"""Export of runs for PyTorch: weights, config, BERT folder, the model's code and a README."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from pathflip_jax.convert.checkpoint_files import StateDict, import_torch
from pathflip_jax.convert.exported import describe_export
from pathflip_jax.convert.families import conversion_of
from pathflip_jax.convert.pytorch import to_torch
from pathflip_jax.data.storage.atomic_folders import atomic_folder
from pathflip_jax.data.storage.durable import sync
from pathflip_jax.export.families import export_of
from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.families import family_of
from pathflip_jax.model.parameters import flatten


def write_checkpoint(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a `state_dict` atomically, as .safetensors or, with torch, as .pt."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path}: weights are written as .safetensors or .pt")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:  # not by the library, which makes files unreadable to other users
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
            f"{path}: not written ({error}); free disk space or fix permissions, and run the command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def export(
    run: str | Path, out: str | Path, *, which: str | int = "best", pt: bool = False, dtype: str = "float32"
) -> None:
    """Write a run for PyTorch users: weights, config, BERT folder, the model's code and a README.

    Weights are model.safetensors of `dtype`, with `pt` (needs torch) also model.pt. The folder is written atomically;
    FileExistsError for an existing folder that is not empty, ValueError for weights out of the range of float16.
    """
    from pathflip_jax.inference.load import load  # late import: writing weights alone needs no Orbax

    with atomic_folder(out) as part:
        found = load(run, which)
        write_export(part, found.model, found.config, found.tokenizer, pt=pt, dtype=dtype)


def write_export(part: Path, model, settings: dict, tokenizer, *, pt: bool = False, dtype: str = "float32") -> None:
    """Write the files that `export` lists, for a model with the settings and the tokenizer of its run."""
    state, config, more = merged_state(model, dtype)
    tokenizer.save(part / "bert")
    _complete_bert_folder(part / "bert", config)
    write_checkpoint(part / "model.safetensors", state)
    if pt:
        write_checkpoint(part / "model.pt", state)
    about = config.to_dict() | describe_export(config, settings, **more)
    (part / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    family = export_of(config)
    copy_code(family.code, part)
    (part / "README.md").write_text(family.readme(config, settings), encoding="utf-8")


def copy_code(module: str, part: Path) -> None:
    """Copy the PyTorch code of a family, a module of `convert/`, into a folder."""
    shutil.copyfile(Path(__file__).parents[1] / "convert" / f"{module}.py", part / f"{module}.py")


def merged_state(model, dtype: str = "float32") -> tuple[StateDict, ModelConfig, dict[str, list[str]]]:
    """Merge the text encoder's LoRA into a model: its `state_dict` in a dtype, the resulting config, and notes.

    Raises ValueError for weights out of the range of the dtype.
    """
    state, config, notes = conversion_of(model.config).merge(to_torch(flatten(model), model.config), model.config)
    if dtype != "float32":
        largest = np.finfo(dtype).max
        beyond = [name for name, tensor in state.items() if np.abs(tensor).max(initial=0) > largest]
        if beyond:
            raise ValueError(f"{beyond[0]}: has weights beyond the range of {dtype} ({largest:g}); export as float32")
        state = {name: tensor.astype(dtype) if tensor.dtype.kind == "f" else tensor for name, tensor in state.items()}
    return state, config, {"notes": [f"{note} at export" for note in notes]} if notes else {}


def _complete_bert_folder(folder: Path, config: ModelConfig) -> None:
    """Add what the released code reads from a BERT folder: vocab.txt and the sizes in config.json."""
    if not (folder / "vocab.txt").exists():
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        words = sorted(vocabulary, key=vocabulary.get)
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    sizes = {
        "model_type": "bert",
        "architectures": [export_of(config).bert],
        "vocab_size": config.vocab_size - family_of(config).added_words,  # the code that reads the folder adds [DEC]
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
