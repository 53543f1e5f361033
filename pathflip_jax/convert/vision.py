"""Weights of published patch encoders: from files as they are published to the parameters of a VisionTransformer.

Nothing in a file is ever executed, and PyTorch is not needed. Every tensor of a file is accounted for: used, known to
be of another part of the model, or named in an error.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pathflip_jax.convert.decoder_folders import open_file, open_set
from pathflip_jax.convert.vision_names import Names, Source, names_of, respelled, without_leading_ones
from pathflip_jax.data.readers.torch_archive import read_archive
from pathflip_jax.data.storage.folders import describe_placeholder
from pathflip_jax.model.parameters import flatten, unflatten
from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.recipes import RECIPES, Recipe
from pathflip_jax.vision.transformer import VisionTransformer

_CONTAINERS = ("state_dict", "model", "teacher", "module")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_MOST_NAMED = 4


@dataclass(frozen=True)
class LoadedEncoder:
    """Network of a recipe with its weights; `config` has the size of the file's position table.

    `sha256` is over the parameters that are used, in float32, so that files of two formats with the same weights agree.
    """

    recipe: Recipe
    config: VisionConfig
    network: VisionTransformer
    sha256: str


def load_vision(recipe: Recipe, weights: Path, dtype: DTypeLike = jnp.float32, sharding: Any = None) -> LoadedEncoder:
    """Network of a recipe with the weights of a file, or of a folder of the published files.

    Kernels are stored in `dtype`, everything else in float32, on the devices of `sharding` (default: the first).
    Raises FileNotFoundError for a folder without the weights, ValueError for a file that is damaged or of another
    encoder, naming the one that it fits.
    """
    path = find_weights(recipe, weights)
    names, tensors = _matched(recipe, path, open_weights(path))
    config = _with_grid(recipe, names, tensors)
    digest, parameters = hashlib.sha256(), {}
    for source in sorted(names.sources):
        array = _parameter(source, tensors, config)
        digest.update(source.path.encode())
        digest.update(np.ascontiguousarray(array))
        stored = array.astype(dtype) if source.path.endswith("/kernel") else array
        parameters[source.path] = jax.device_put(stored, sharding)
    network = unflatten(jax.eval_shape(lambda: VisionTransformer(config)), parameters)
    return LoadedEncoder(recipe, config, network, digest.hexdigest())


def check_vision(recipe: Recipe, weights: Path) -> Path:
    """Path of the weights of a recipe, after comparing names and shapes of all tensors; no number is read.

    Raises as `load_vision`.
    """
    path = find_weights(recipe, weights)
    _matched(recipe, path, open_weights(path))
    return path


def fitting(weights: Path) -> dict[str, Path]:
    """Names of the encoders whose weights a file or folder holds, and the file of each; no number is read.

    Several encoders may have the same shape. Raises ValueError, naming the closest encoder, where it fits none.
    """
    opened: dict[Path, Mapping[str, Any]] = {}
    found, faults, matching = {}, {}, {}
    for recipe in RECIPES.values():
        try:
            path = find_weights(recipe, weights)
        except FileNotFoundError:
            continue
        if path not in opened:
            opened[path] = open_weights(path)
        _, _, wrong = _compared(recipe, opened[path])
        faults[recipe.name] = wrong
        matching[recipe.name] = len(opened[path]) - sum("is missing" not in fault for fault in wrong)
        if not wrong:
            found[recipe.name] = path
    if not faults:
        raise FileNotFoundError(f"{weights}: no weights of a registered encoder ({', '.join(_SUFFIXES)})")
    if not found:
        closest = max(faults, key=lambda name: (matching[name], -len(faults[name])))
        raise ValueError(
            f"{weights}: fits no registered encoder; the closest is {closest}, but {len(faults[closest])} tensors "
            f"differ: {'; '.join(faults[closest][:_MOST_NAMED])}"
        )
    return found


def find_weights(recipe: Recipe, place: Path) -> Path:
    """File or index of shards with a recipe's weights: `place` itself, or in the folder `place`.

    In a folder, the published names come first, then a single file of weights, whatever its name.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such file or folder of weights of {recipe.name}; {how_to_get(recipe)}")
    for name in recipe.files:
        for candidate in (place / name, place / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    found = sorted(path for path in place.iterdir() if path.name.endswith((*_SUFFIXES, ".index.json")))
    indices = [path for path in found if path.name.endswith(".index.json")]
    if len(indices or found) == 1:
        return (indices or found)[0]
    listed = ", ".join(path.name for path in found[:_MOST_NAMED]) or "no file of weights"
    raise FileNotFoundError(
        f"{place}: expected {' or '.join(recipe.files)} of {recipe.repository}, found {listed}; {how_to_get(recipe)}"
    )


def how_to_get(recipe: Recipe) -> str:
    """Commands that download the weights of a recipe."""
    login = f"accept the terms at https://huggingface.co/{recipe.repository}, run `hf auth login`, then "
    download = f"download them: `hf download {recipe.repository} {recipe.files[0]} --local-dir {recipe.name}`"
    return login + download if recipe.gated else download


def open_weights(path: Path) -> Mapping[str, Any]:
    """Tensors of a file or set of shards by name: arrays, or slices of a file, read when they are indexed.

    Raises ValueError for a placeholder, such as a Git LFS pointer or a web page, a damaged file, or one without
    tensors.
    """
    return open_set(path, _open_one) if path.name.endswith(".index.json") else _open_one(path)


def _open_one(path: Path) -> Mapping[str, Any]:
    if placeholder := describe_placeholder(path):
        raise ValueError(f"{path}: {placeholder}, or download it with `hf download`")
    if path.suffix == ".safetensors":
        return open_file(path)
    found = _state_dict(read_archive(path))
    if not found:
        raise ValueError(f"{path}: holds no tensors by name; expected a state_dict, as torch.save(model.state_dict())")
    return found


def _state_dict(content: Any) -> dict[str, np.ndarray]:
    """Tensors by name: of the dictionary itself, or of the one under a usual name in it."""
    while isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}
        inner = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            return tensors
        content = inner
    return {}


def _kind(tensor: Any) -> str:
    """Type of a tensor's numbers, as safetensors or NumPy call it."""
    return tensor.get_dtype() if hasattr(tensor, "get_dtype") else tensor.dtype.name


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


def _matched(recipe: Recipe, path: Path, tensors: Mapping[str, Any]) -> tuple[Names, dict[str, Any]]:
    """Names of a recipe, and the tensors under them; ValueError lists what is missing, unknown or of another shape."""
    names, found, faults = _compared(recipe, tensors)
    if faults:
        others = [name for name, other in RECIPES.items() if other != recipe and not _compared(other, tensors)[2]]
        fit = f" They fit {' or '.join(others)}: is that the encoder you mean?" if others else ""
        more = f", and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
        raise ValueError(
            f"{path}: not the weights of {recipe.name} ({recipe.repository}): {'; '.join(faults[:_MOST_NAMED])}{more}."
            f"{fit or ' If the download was interrupted, ' + how_to_get(recipe)}"
        )
    return names, found


def _compared(recipe: Recipe, tensors: Mapping[str, Any]) -> tuple[Names, dict[str, Any], list[str]]:
    """Names of a recipe, the tensors under them, and what is missing, unknown or of another shape."""
    names = names_of(recipe.layout, recipe.network)
    found = _renamed(names, tensors)
    return names, found, _faults(recipe, names, found)


def _renamed(names: Names, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors under the names of the layout: without the prefix that training code adds, and in today's spelling."""
    spelled = {respelled(name, names.spellings): tensor for name, tensor in tensors.items()}
    anchors = [name for name in spelled if name == names.anchor or name.endswith(f".{names.anchor}")]
    prefix = min(anchors, key=len).removesuffix(names.anchor) if anchors else ""
    return {name.removeprefix(prefix): tensor for name, tensor in spelled.items()}


def _faults(recipe: Recipe, names: Names, found: Mapping[str, Any]) -> list[str]:
    config = recipe.network
    shapes = {path: value.shape for path, value in abstract_parameters(config).items()}
    wanted, faults = set(), []
    for source in names.sources:
        expected = source.joined_shape(shapes[source.path][source.stacked :], config)
        for layer in range(config.depth if source.stacked else 1):
            every = source.of(layer)
            wanted.update(every)
            missing = [f"{name} is missing" for name in every if name not in found]
            faults += missing or _misfits(source, {name: found[name] for name in every}, expected, config)
    unused = re.compile(names.unused)
    return faults + [f"{name} is unknown" for name in sorted(found.keys() - wanted) if not unused.match(name)]


def _misfits(source: Source, tensors: Mapping[str, Any], expected: tuple[int, ...], config: VisionConfig) -> list[str]:
    """Faults of the tensors that make up a parameter: other numbers than floats, or another shape."""
    kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
    if others := [f"{name} holds {kind}, not floats" for name, kind in kinds.items() if kind not in _FLOATS]:
        return others
    (name, *more), (first, *shapes) = tensors, map(_shape, tensors.values())
    if source.path == "positions":  # of any image size
        rows = without_leading_ones(first)
        if len(rows) == 2 and rows[1] == config.width and _grid(rows[0], config):
            return []
        before = f"{config.prefix_positions} rows and " if config.prefix_positions else ""
        return [f"{name} is {list(first)}, expected {before}a square of patches, {config.width} wide"]
    if more:
        like = all(shape and shape[1:] == expected[1:] for shape in (first, *shapes))
        if like and sum(shape[0] for shape in (first, *shapes)) == expected[0]:
            return []
        return [f"{name} and {len(more)} more are {list(first)}, expected {list(expected)} together"]
    same = (without_leading_ones(first) if source.form == "flat" else first) == expected
    return [] if same else [f"{name} is {list(first)}, expected {list(expected)}"]


def _grid(rows: int, config: VisionConfig) -> int:
    """Side of a position table of this many rows; 0 where they are not a square of patches."""
    side = math.isqrt(max(0, rows - config.prefix_positions))
    return side if side**2 + config.prefix_positions == rows else 0


def _with_grid(recipe: Recipe, names: Names, tensors: Mapping[str, Any]) -> VisionConfig:
    """Config with the side of the position table in the file, which may be of another image size."""
    config = recipe.network
    if config.rope:
        return config
    (table,) = next(source.torch for source in names.sources if source.path == "positions")
    return replace(config, grid=_grid(_shape(tensors[table])[-2], config))


def _parameter(source: Source, tensors: Mapping[str, Any], config: VisionConfig) -> np.ndarray:
    def one(layer: int) -> np.ndarray:
        return source.to_jax([np.asarray(tensors[name][...], np.float32) for name in source.of(layer)])

    if not source.stacked:
        found = one(0)
        return found[None] if source.path == "registers" and config.registers == 1 else found
    first = one(0)
    every = np.empty((config.depth, *first.shape), np.float32)
    for layer in range(config.depth):
        every[layer] = first if layer == 0 else one(layer)
    return every


def abstract_parameters(config: VisionConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter of a network; nothing is computed."""
    return jax.eval_shape(lambda: flatten(VisionTransformer(config)))
