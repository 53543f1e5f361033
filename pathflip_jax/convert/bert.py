"""Q-Former initialisation from a BERT: any Hugging Face folder with weights (BioBERT, ClinicalBERT, MiniLM).

Word and position embeddings, self-attention and feed-forward networks come from the folder; the queries' feed-forward
networks start as copies of BERT's, and cross-attention keeps its own initialisation (DESIGN section 3.2).
"""

from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.convert.checkpoint_files import read_tensors
from pathflip_jax.convert.families import conversion_of
from pathflip_jax.convert.names import Name, bert_names, query_copy
from pathflip_jax.convert.weight_sets import plain_names
from pathflip_jax.data.storage.json_values import parse_json
from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.parameters import abstract_params

WORDS, POSITIONS = "qformer/word_embeddings/embedding", "qformer/position_embeddings/embedding"
TABLES = ("/word_embeddings/embedding", "/position_embeddings/embedding")
TYPES = "embeddings.token_type_embeddings.weight"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Values that this architecture requires; transformers assumes them too when config.json does not state them.
ASSUMED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12}


def bert_settings(folder: str | Path) -> dict[str, Any]:
    """Fields of PathFLIPConfig that a BERT folder's config.json determines.

    Raises ValueError when the Q-Former cannot be initialised from this BERT.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a Hugging Face BERT folder (config.json and weights)")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        faults = [
            f"{key} is {config[key]!r}, expected {value!r}"
            for key, value in ASSUMED.items()
            if config.get(key, value) != value
        ]
        settings = {
            "hidden": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": config["num_attention_heads"],
            "intermediate": config["intermediate_size"],
            "vocab_size": config["vocab_size"] + 1,
            "max_positions": config["max_position_embeddings"],
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid model config ({error}); copy the folder again") from error
    except KeyError as error:
        raise ValueError(f"{path}: missing key {error}; expected the config.json of a BERT") from error
    if faults:
        raise ValueError(f"{path}: cannot initialise the Q-Former from this model: {'; '.join(faults)}")
    return settings


def bert_parameters(folder: str | Path, config: ModelConfig, *, fold_token_types: bool = True) -> dict[str, np.ndarray]:
    """Parameters initialised from BERT, under our names: `flatten(model) | bert_parameters(...)`.

    The text encoder of a PathFLIP2 is the folder's BERT unchanged. The Q-Former of a PathFLIP has no token types, but
    every BERT was trained with the embedding of type 0 added to each word: folded into the position embeddings, it
    reproduces BERT's features exactly. `fold_token_types=False` drops it, as the released code does. The row of [DEC]
    is the mean of the word embeddings. Raises ValueError listing every mismatch with the config.
    """
    folder = Path(folder)
    settings = bert_settings(folder)
    faults = [
        f"model.{name} is {getattr(config, name)}, expected {settings[name]}"
        for name in ("hidden", "layers", "heads", "intermediate")
        if getattr(config, name) != settings[name]
    ]
    if faults:
        raise ValueError(f"{folder}: this BERT and the model config differ: {'; '.join(faults)}")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder}: found neither {' nor '.join(WEIGHTS)}; download the weights too")
    tensors = {_current_name(name): tensor for name, tensor in plain_names(read_tensors(weights), weights).items()}

    shapes = abstract_params(config)
    path, whole = conversion_of(config).bert
    wanted = list(bert_names(config.layers, path=path))
    if whole:
        wanted.append(Name(f"{path}/type_embeddings/embedding", TYPES))
    flat: dict[str, np.ndarray] = {}
    for name in wanted:
        expected = name.torch_shape(tuple(shapes[name.path].shape))
        tensor = tensors.get(name.torch)
        if name.path.endswith(TABLES):
            rows = expected[0] - (name.path == WORDS)  # the row of [DEC] is appended below
            expected = (rows, *expected[1:])
            tensor = None if tensor is None else tensor[:rows]  # some folders pad their tables
        if tensor is None:
            faults.append(f"{name.torch}: missing")
        elif tensor.shape != expected:
            faults.append(f"{name.torch}: has shape {tensors[name.torch].shape}, expected {expected}")
        else:
            flat[name.path] = np.array(name.to_jax(tensor), order="C")
    types = tensors.get(TYPES)
    if fold_token_types and not whole and (types is None or types.shape[1:] != (config.hidden,)):
        faults.append(f"{TYPES}: missing, or not {config.hidden} wide")
    if faults:
        raise ValueError(f"{weights}: {len(faults)} tensors do not fit the model config\n  " + "\n  ".join(faults))

    if whole:
        return flat
    flat[WORDS] = np.concatenate([flat[WORDS], flat[WORDS].mean(0, keepdims=True)])
    if fold_token_types:
        flat[POSITIONS] += types[0]
    return flat | {copy: flat[path].copy() for path in flat if (copy := query_copy(path))}


def _current_name(name: str) -> str:
    """Tensor name without the prefix of models with a head, with LayerNorm's PyTorch names."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
