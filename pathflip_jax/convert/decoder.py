"""Conversion of decoders from and to Hugging Face folders (DESIGN section 9).

A folder holds config.json, weights as safetensors, and a tokenizer. Nothing in it is ever executed: an `auto_map` to
custom code is ignored, pickled weights are refused.
"""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from tokenizers import Tokenizer

from pathflip_jax.convert.decoder_folders import (
    CONFIG,
    FLOATS,
    local_folder,
    open_tensors,
    read_decoder_config,
    read_object,
    read_slice,
    write_model,
)
from pathflip_jax.convert.decoder_names import CLASSES, HEAD, TABLE, Name, is_buffer, names
from pathflip_jax.convert.lora import adapters, is_adapter, merged
from pathflip_jax.convert.weight_sets import plain_names
from pathflip_jax.data.storage.atomic_folders import atomic_folder
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.llm.tokenizer import DecoderTokenizer, train_bpe
from pathflip_jax.model.parameters import flatten, unflatten
from pathflip_jax.runtime.sharding import infer_shardings

STORED = ("float32", "bfloat16")
SHARD_BYTES = 5 * 10**9
PROMPTS = 32  # copies of the prompt among the texts that a small vocabulary is learnt from, to cover its words
# Files besides config and weights that belong to the model: tokenizer, generation settings, licence.
COMPANION_FILES = re.compile(
    r"(tokenizer.*|vocab|merges|special_tokens_map|added_tokens|chat_templates?|generation_config)\.(json|txt|model|jinja)"
    r"|(LICENSE|NOTICE|USE_POLICY)(\.\w+)?"
)


def init_decoder(
    config: DecoderConfig,
    seed: int,
    *,
    mesh: Mesh | None = None,
    lora: LoRAConfig | None = None,
    dtype: str = "float32",
) -> Decoder:
    """Initialise a decoder with random parameters directly on their devices; adapters are always float32."""
    template, shapes = _abstract(config, lora, dtype)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(Decoder(config, nnx.Rngs(key), lora))
        return {name: array.astype(shapes[name].dtype) for name, array in flat.items()}

    return unflatten(template, jax.jit(make, out_shardings=_shardings(mesh, shapes))(jax.random.key(seed)))


def load_decoder(
    folder: str | Path,
    *,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
    lora: LoRAConfig | None = None,
    seed: int = 0,
    remat: bool = False,
) -> Decoder:
    """Load the decoder in a Hugging Face folder, its parameters stored as `dtype` and computed in `compute_dtype`.

    Tensor by tensor, each process reads only the slices that its devices hold, directly into their shards on the mesh
    (without a mesh: onto the first device). `lora` adds new float32 adapters, initialised from `seed`. Raises
    FileNotFoundError where files are missing, ValueError listing every tensor that is missing, unknown, or of another
    shape or type than config.json says.
    """
    folder = local_folder(folder)
    config = read_decoder_config(folder, compute_dtype=compute_dtype or dtype, remat=remat)
    template, shapes = _abstract(config, lora, dtype)
    shardings = _shardings(mesh, shapes)
    table, tensors = names(config), plain_names(open_tensors(folder), folder)
    repeated = tensors.pop(HEAD, None) if config.tied else None  # some files repeat the embedding as the head
    _check(folder, config, table, shapes, tensors)
    flat = {
        name.path: _load(
            folder, name, tensors[name.torch], repeated if name.torch == TABLE else None, shape, shardings[name.path]
        )
        for name in table
        for shape in [shapes[name.path]]
    }
    if lora is not None:
        drawn = jax.jit(
            lambda key: adapters(flatten(Decoder(config, nnx.Rngs(key), lora))), out_shardings=adapters(shardings)
        )
        flat |= drawn(jax.random.key(seed))
    return unflatten(template, flat)


def _abstract(
    config: DecoderConfig, lora: LoRAConfig | None, dtype: str
) -> tuple[Decoder, dict[str, jax.ShapeDtypeStruct]]:
    """Abstract decoder without values, and shape and dtype of each parameter."""
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r}: parameters are stored as {' or '.join(STORED)}")
    template = jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0), lora))
    shapes = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype if is_adapter(name) else jnp.dtype(dtype))
        for name, shape in jax.eval_shape(lambda: flatten(Decoder(config, nnx.Rngs(0), lora))).items()
    }
    return template, shapes


def _shardings(mesh: Mesh | None, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Sharding]:
    if mesh is not None:
        return infer_shardings(mesh, shapes)
    return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))


def _check(folder: Path, config: DecoderConfig, table: list[Name], shapes: dict, tensors: dict[str, Any]) -> None:
    wanted = {name.torch: name.torch_shape(shapes[name.path].shape) for name in table}
    faults = [f"{name}: missing" for name in wanted if name not in tensors]
    faults += [f"{name}: unknown" for name in sorted(tensors.keys() - wanted.keys()) if not is_buffer(name)]
    for name, shape in wanted.items():
        if name in tensors and tuple(tensors[name].get_shape()) != shape:
            faults.append(f"{name}: has shape {tuple(tensors[name].get_shape())}, expected {shape}")
        elif name in tensors and tensors[name].get_dtype() not in FLOATS:
            faults.append(f"{name}: is of type {tensors[name].get_dtype()}, expected {', '.join(FLOATS)}")
    if faults:
        raise ValueError(
            f"{folder}: {len(faults)} tensors do not match the {config.family} that its {CONFIG} describes; download "
            "config and weights of the same model\n  " + "\n  ".join(faults)
        )


def _load(
    folder: Path, name: Name, tensor: Any, repeated: Any, shape: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.Array:
    """Load a parameter from its tensor; slices that several devices hold are read once."""
    read: dict[tuple, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in read:
            cut = index[::-1] if name.form == "transpose" else index
            part = read_slice(tensor, cut)
            if repeated is not None and (
                repeated.get_shape() != tensor.get_shape() or not np.array_equal(part, read_slice(repeated, cut))
            ):
                raise ValueError(
                    f"{folder / CONFIG}: tie_word_embeddings is true, but {HEAD} differs from {TABLE}; set it to false"
                )
            read[key] = np.ascontiguousarray(name.to_jax(part), shape.dtype)
        return read[key]

    return jax.make_array_from_callback(shape.shape, sharding, piece)


def save_decoder(
    decoder: Decoder,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a decoder as a Hugging Face folder that transformers loads; an adapter is merged in.

    `source` is the folder that it came from: its config.json, tokenizer and licence are copied. Weights are written
    unchanged, or as `dtype`, one tensor in host memory at a time, in files of at most `shard_bytes`. The folder is
    written atomically. Raises FileExistsError for an existing folder that is not empty, ValueError when `source` is
    another model or other processes hold part of the parameters.
    """
    config, flat = decoder.config, flatten(decoder)
    values = _hf_config(config) if source is None else _source_config(config, source)
    remote = [name for name, x in flat.items() if isinstance(x, jax.Array) and not _is_local(x)]
    if remote:
        raise ValueError(
            f"{folder}: other processes hold parts of {remote[0]} and of {len(remote) - 1} other parameters; save a "
            "checkpoint, then write the folder from it in a single process"
        )
    table = {name.torch: name for name in names(config)}
    shapes = {
        torch: jax.ShapeDtypeStruct(name.torch_shape(flat[name.path].shape), dtype or flat[name.path].dtype)
        for torch, name in table.items()
    }
    values["dtype"] = values["torch_dtype"] = str(shapes[TABLE].dtype)

    def value(torch: str) -> np.ndarray:
        path = table[torch].path
        return table[torch].to_torch(np.asarray(merged(flat, path, decoder.lora) if decoder.lora else flat[path]))

    with atomic_folder(folder) as part:
        write_model(part, shapes, value, shard_bytes)
        write_json(part / CONFIG, values)
        for path in sorted(Path(source).iterdir()) if source is not None else ():
            if path.is_file() and COMPANION_FILES.fullmatch(path.name):
                shutil.copyfile(path, part / path.name)


def make_decoder_folder(texts: list[str], folder: str | Path, *, vocab_size: int, width: int, layers: int) -> None:
    """Write the folder of a small Qwen3 to be trained from scratch: a vocabulary learnt from texts, and config.json.

    Heads are 64 wide. Raises ValueError for a width that is not a multiple of 64, and as `train_bpe`.
    """
    if width < 64 or width % 64 or layers < 1:
        raise ValueError(
            f"decoder of width {width} with {layers} layers: expected a multiple of 64, and at least one layer"
        )
    prompt = "Instruction: Is there? Describe the input pathology whole slide image.\nA. Yes\nB. No\nResponse: "
    train_bpe([*texts, *[prompt] * PROMPTS], folder, vocab_size)
    heads, words = width // 64, DecoderTokenizer(folder).vocab_size
    config = DecoderConfig(
        family="qwen3", vocab_size=words, width=width, layers=layers, heads=heads, kv_heads=heads, head_dim=64,
        intermediate=3 * width, max_positions=1024, rope_theta=1e4, norm_eps=1e-6, tied=True, query_norm=True,
    )  # fmt: skip
    write_json(Path(folder) / CONFIG, _hf_config(config))


def _is_local(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


def _source_config(config: DecoderConfig, source: str | Path) -> dict[str, Any]:
    """config.json of the folder that a decoder was loaded from, after a check that it matches; without custom code."""
    found = read_decoder_config(source, compute_dtype=config.compute_dtype, remat=config.remat)
    differing = [
        f"{field.name} is {getattr(found, field.name)!r}, expected {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(found, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise ValueError(
            f"{Path(source) / CONFIG}: does not describe this decoder: {'; '.join(differing)}; pass the folder that "
            "the decoder came from"
        )
    values = read_object(Path(source) / CONFIG)
    values.pop("auto_map", None)
    return values


def _hf_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json as transformers 5 writes it; `rope_theta` and `rope_scaling` are repeated for version 4."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    values = {
        "architectures": [CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tied,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": {name: rope[name] for name in rope if name != "rope_theta"} if config.rope_scaling else None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if DecoderConfig.from_hf(values, compute_dtype=config.compute_dtype, remat=config.remat) != config:
        raise ValueError(
            f"Hugging Face's {config.family} has no such biases and norms: {config}; write it as another family"
        )
    return values


def check_tokenizer(folder: str | Path, config: DecoderConfig) -> None:
    """Raise ValueError when the folder's tokenizer has tokens that the decoder's embedding has no row for.

    Usually there are more rows than tokens: tables are padded for speed, and cutting them to size would break the head.
    """
    path = local_folder(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the tokenizer of the model into the folder")
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path}: not a tokenizer ({error}); copy it again") from error
    largest = max(vocabulary, key=vocabulary.get, default=None)
    if largest is None or vocabulary[largest] >= config.vocab_size:
        found = "it has no tokens" if largest is None else f"its token {largest!r} has the id {vocabulary[largest]}"
        raise ValueError(
            f"{path}: {found}, while the decoder's embedding has {config.vocab_size} rows; give the tokenizer of this "
            "model, without tokens added to it"
        )
