"""Hugging Face folders: config, and safetensors of any size.

A safetensors file is a little-endian uint64 length, a JSON header of that length, and the bytes of all tensors. A large
model is a set of files with an index from tensor to file. They are read by slices and written tensor by tensor, so that
no model needs to fit into host memory.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.storage.json_values import parse_json
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.llm.config import DecoderConfig

FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
CODES = {dtype: code for code, dtype in FLOATS.items()}
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
COPY_AGAIN = "copy it again"
PROJECTOR = "projector.safetensors"  # of a language run's export


def local_folder(place: str | Path) -> Path:
    """Path of a local folder. Raises FileNotFoundError where it does not exist, ValueError for a URL."""
    if is_url(place):
        raise ValueError(f"{place}: language models are read from and written to local disks; copy the folder here")
    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; pass one with config.json and weights, such as `hf download Qwen/Qwen3-0.6B "
            "--local-dir FOLDER` writes"
        )
    return folder


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises FileNotFoundError, or ValueError for anything but a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the whole folder")
    try:
        found = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected an object with named values; {COPY_AGAIN}")
    return found


def read_decoder_config(folder: str | Path, **more: Any) -> DecoderConfig:
    """Config of the decoder that a folder's config.json describes; `more` are fields that it does not determine.

    Raises FileNotFoundError, or ValueError naming the file and everything unsupported in it.
    """
    path = local_folder(folder) / CONFIG
    values = read_object(path)
    try:
        return DecoderConfig.from_hf(values, **more)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def open_tensors(folder: Path) -> dict[str, Any]:
    """Tensors of a folder by name, for `read_slice`; only the headers are read here.

    Raises FileNotFoundError where weights or a file of a set are missing, ValueError where weights are pickled, cut
    short, or not those that the index names.
    """
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    return open_set(folder / INDEX, open_file)


def open_set(index: Path, open_one: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors of a set of files by name, from the index that names the file of each; `open_one` opens a file.

    Raises FileNotFoundError for missing files, ValueError for an index that is damaged or of another model.
    """
    folder, where = index.parent, read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(_is_file_name(name) for name in where.values()):
        raise ValueError(f"{index}: no weight_map from tensors to files beside it; {COPY_AGAIN}")
    files = sorted(set(where.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder}: missing {', '.join(absent)} of the {len(files)} files that {index.name} names; copy them too"
        )
    found = {name: open_one(folder / name) for name in files}
    faults = [f"{name} is not in {file}" for name, file in where.items() if name not in found[file]]
    if faults:
        raise ValueError(
            f"{index}: index and files are of different models; copy all of them again\n  " + "\n  ".join(faults)
        )
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def open_file(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file by name, for `read_slice`; ValueError for one that is damaged."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: incomplete or damaged safetensors file ({error}); {COPY_AGAIN}") from error


def _no_weights(folder: Path) -> Exception:
    parts = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if parts:
        return FileNotFoundError(f"{folder}: {parts[0]} is one of several shards, but {INDEX} is missing; copy it too")
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        return ValueError(
            f"{folder}: its weights are pickled ({pickled[0]}), and unpickling can run code; only safetensors are "
            'read. If you trust them, convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    return FileNotFoundError(
        f"{folder}: found neither {SINGLE} nor {INDEX}; download the weights too, or start from random ones with "
        "init_decoder"
    )


def read_slice(tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Read a slice of a tensor from `open_tensors`, and no other bytes."""
    return tensor[index]


def write_tensors(path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], value: Callable[[str], np.ndarray]) -> None:
    """Write a safetensors file as PyTorch's readers expect it, asking `value` for one tensor at a time.

    The file is written atomically. Raises OSError on a full disk.
    """
    order = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))  # keeps each tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + shapes[name].size * shapes[name].dtype.itemsize
        code = CODES[np.dtype(shapes[name].dtype)]
        header[name] = {"dtype": code, "shape": list(shapes[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.ascontiguousarray(value(name), shapes[name].dtype)
            if array.shape != tuple(shapes[name].shape):
                raise ValueError(f"{name} is {array.shape}, expected {tuple(shapes[name].shape)}")
            file.write(array.view(np.uint8))


def write_model(
    folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], value: Callable[[str], np.ndarray], most_bytes: int
) -> None:
    """Write the weights of a model: one file, or a set with an index where it would be larger than `most_bytes`."""
    sizes = {name: shape.size * shape.dtype.itemsize for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[held] for held in files[-1]) + size > most_bytes:
            files.append([])
        files[-1].append(name)
    if len(files) == 1:
        write_tensors(folder / SINGLE, shapes, value)
        return
    where = {}
    for number, held in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(folder / file, {name: shapes[name] for name in held}, value)
        where |= dict.fromkeys(held, file)
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def weights_hash(folder: str | Path) -> str:
    """Hash of a decoder's folder: of config.json, and of name, size and header of each weights file.

    Weights of equal shape saved over each other differ only in tensor values, so the start and the end of each file are
    hashed too, without reading gigabytes.
    """
    found = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode())
            found.update(file.read(2**20))
            file.seek(max(path.stat().st_size - 2**20, 0))
            found.update(file.read())
    return found.hexdigest()
