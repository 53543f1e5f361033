"""Checkpoint files of either code base: tensors by name, and the arguments of the run that wrote them.

The files are untrusted: nothing in a file is ever executed. Safetensors files need no torch; it is imported
only to read the other formats.
"""

import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import yaml

from pathflip_jax.convert.weight_sets import RAW, choose_set, containers, same_model, split_sets
from pathflip_jax.data.storage.json_values import parse_json

CONTAINERS = ("state_dict", "model", "module")  # Lightning, plain training scripts, DeepSpeed
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HPARAMS = "hparams.yaml"

StateDict = dict[str, np.ndarray]


class _Read(NamedTuple):
    """Tensors of a file by their location in it, the model's own first, and its arguments if any."""

    tensors: dict[str, StateDict]
    arguments: dict[str, Any]


def read_tensors(path: str | Path) -> StateDict:
    """Read every tensor of a .safetensors, .pt, .pth, .ckpt or .bin file, or of a folder; floats come as float32.

    A folder holds one such file, or a set of shards with its index. Raises ValueError for a file that is damaged, holds
    no tensors, or could only be read by running code in it, and for an incomplete set; ImportError where a format needs
    torch and it is not installed.
    """
    return next(iter(_read(Path(path)).tensors.values()))


def _read(path: Path) -> _Read:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a checkpoint ({', '.join(SUFFIXES)}) or its folder")
    return _Read({RAW: _read_safetensors(path)}, {}) if path.suffix == ".safetensors" else _read_torch(path)


def _read_folder(folder: Path) -> _Read:
    index = next((path for path in sorted(folder.glob("*.index.json"))), None)
    if index is not None:
        return _Read({RAW: _read_shards(index)}, {})
    if (folder / "zero_to_fp32.py").exists() or list(folder.glob("**/*_model_states.pt")):
        raise ValueError(
            f"{folder}: the parts of this DeepSpeed checkpoint are not merged; merge them with the script that "
            "DeepSpeed put there, `python zero_to_fp32.py . pytorch_model.bin`, and pass pytorch_model.bin"
        )
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(path.name for path in files[:5]) or "none"
        raise ValueError(f"{folder}: found {len(files)} weight files ({found}), expected one; pass the file to read")
    return _read(files[0])


def _read_shards(index: Path) -> StateDict:
    """Tensors of a sharded checkpoint, as transformers and DeepSpeed write it."""
    try:
        shard_of = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        shard_of = {str(name): Path(str(file)).name for name, file in shard_of.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a valid index of shards ({error!r:.100}); copy it again") from None
    names = sorted(set(shard_of.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing ({', '.join(missing[:5])}); copy them"
        )
    tensors: StateDict = {}
    for name in names:
        tensors |= read_tensors(index.parent / name)
    if absent := sorted(set(shard_of) - set(tensors)):
        raise ValueError(
            f"{index}: the shards lack {len(absent)} tensors of the index ({', '.join(absent[:3])}); copy them again"
        )
    return tensors


def _read_safetensors(path: Path) -> StateDict:
    try:
        views = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: incomplete or damaged safetensors file ({error}); copy it again") from error
    tensors = {}
    for name, view in views:
        if view["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {view['dtype']}; expected one of {', '.join(DTYPES)}")
        array = np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"])
        tensors[name] = array if array.dtype.kind == "i" else array.astype(np.float32)
    return tensors


def import_torch(path: str | Path):
    """The torch module, or an ImportError naming the file that needs it and the installation command."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: this format needs PyTorch; pip install 'pathflip-jax[torch]', or use .safetensors instead"
        ) from error
    return torch


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_torch(path: Path) -> _Read:
    torch = import_torch(path)
    try:
        with torch.serialization.safe_globals([Namespace]):  # Lightning stores the command line; it is inert
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which is unsafe for an untrusted file.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found.group(1) if found else _first_line(error)
        raise ValueError(
            f"{path}: contains objects other than tensors ({what}), or is damaged; only tensors are read, since "
            "loading anything else can run code. In the environment that wrote the file, save the weights alone: "
            'torch.save(checkpoint["state_dict"], "weights.pt")'
        ) from error
    except Exception as error:  # on damaged bytes torch's unpickler may raise anything
        raise ValueError(f"{path}: incomplete or damaged PyTorch file ({_first_line(error)}); copy it again") from error
    arguments = _arguments_within(content)
    candidates = dict(containers(content, torch.is_tensor))
    location, main = _main_state_dict(content, candidates)
    if not isinstance(main, Mapping) or not main:
        raise ValueError(f"{path}: holds a {type(main).__name__}, expected a state_dict (tensors by name)")
    other = [f"{name} ({type(value).__name__})" for name, value in main.items() if not torch.is_tensor(value)]
    if other:
        raise ValueError(
            f"{path}: not a state_dict, since some entries are not tensors ({', '.join(other)}); save "
            "model.state_dict() alone"
        )
    sets = {location: main} | {label: found for label, found in candidates.items() if same_model(main, found)}
    tensors = {
        label: {
            name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
            for name, tensor in found.items()
        }
        for label, found in sets.items()
    }
    return _Read(tensors, arguments)


def _main_state_dict(content: Any, candidates: Mapping[str, Any]) -> tuple[str, Any]:
    """Location and content of a file's main state dict: under a usual name, else the largest one present."""
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return name, content[name]
    if RAW not in candidates and candidates:
        location = max(candidates, key=lambda location: len(candidates[location]))
        return location, candidates[location]
    return RAW, content


def _arguments_within(content: Any) -> dict[str, Any]:
    """Arguments that Lightning stores in a file: a namespace, a mapping, or either under the key `args`."""
    found = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if isinstance(found, Mapping) and "args" in found:
        found = found["args"]
    found = vars(found) if isinstance(found, Namespace) else found
    return {str(name): value for name, value in found.items()} if isinstance(found, Mapping) else {}


class Checkpoint(NamedTuple):
    """`state_dict` of a model without the prefixes that training code adds, and the arguments it was trained with.

    `arguments` is empty where neither the file nor an hparams.yaml in its folder holds any.
    """

    tensors: StateDict
    arguments: dict[str, Any]


def read_checkpoint(path: str | Path, weights: str = "") -> StateDict:
    """Read a checkpoint of a released model: its `state_dict`, without the prefixes that training code adds."""
    return open_checkpoint(path, weights).tensors


def open_checkpoint(path: str | Path, weights: str = "") -> Checkpoint:
    """Read a checkpoint with its arguments: a file, a folder that holds one, or the folder of a set of shards.

    `weights` names the set of weights where there are several (`weight_sets`). Arguments come from the file
    (Lightning's `hyper_parameters`), else from the hparams.yaml in its folder or the one above, where Lightning
    writes it. Raises as `read_tensors`, and ValueError listing the sets where the choice is ambiguous.
    """
    found = _read(Path(path))
    sets: dict[str, StateDict] = {}
    try:
        for place, tensors in found.tensors.items():
            for label, names in split_sets(tensors).items():
                sets[place if label == RAW else label if label not in sets else f"{place}.{label}"] = {
                    short: tensors[name] for short, name in names.items()
                }
        chosen = choose_set(sets, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Checkpoint(dict(chosen), found.arguments or _arguments_beside(Path(path)))


def _arguments_beside(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        if (place / HPARAMS).is_file():
            return read_hparams(place / HPARAMS)
    return {}


def read_hparams(path: str | Path) -> dict[str, Any]:
    """Read a run's arguments as Lightning writes them: YAML, with an argparse namespace read as a plain mapping.

    Raises ValueError for anything but a mapping, and for any other Python object in it: no object is constructed.
    """
    path = Path(path)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Arguments)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not plain YAML ({' '.join(str(error).split())[:300]}); expected names and values, as "
            "Lightning writes them to hparams.yaml"
        ) from None
    found = found if found is not None else {}
    if isinstance(found, dict) and isinstance(found.get("args"), dict):
        found = found["args"]
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected names and values")
    return {str(name): value for name, value in found.items()}


class _Arguments(yaml.SafeLoader):
    """YAML loader without Python objects, except an argparse namespace, which becomes a dict."""


def _namespace(loader: _Arguments, node: yaml.Node) -> dict:
    return loader.construct_mapping(node, deep=True)


for _tag in ("object", "object/new", "object/apply"):
    _Arguments.add_constructor(f"tag:yaml.org,2002:python/{_tag}:argparse.Namespace", _namespace)
