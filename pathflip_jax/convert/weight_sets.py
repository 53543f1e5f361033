"""Tensor names free of wrappers, and the sets of weights that one checkpoint may hold.

PyTorch wrappers (compilation, FSDP, activation checkpointing, data parallelism) insert segments into names at the
wrapped module. Training code also often stores a moving average (EMA) or a teacher with the trained weights: different
values under the same names, so the set to use is never guessed.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pathflip_jax.convert.names import COUNTERS, is_unused

WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_ddp_module", "module")
)
PREFIXES = ("pathflip_align.", "pathflip_finetune.", "model.")  # attributes of training classes that hold the model
#: First name segments that identify a tensor's set of weights.
SETS = frozenset(
    """ema ema_model model_ema ema_state_dict state_dict_ema ema_network avg_model averaged_model swa_model
    student teacher online online_model target_model momentum_model""".split()
)
RAW = "raw"  # the set of tensors whose names identify none
DEPTH = 4  # nesting depth of containers in a file: callbacks, the callback, its state


def plain_name(name: str) -> str:
    """Tensor name without the segments that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(tensors: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Tensors of a file under their plain names. Raises ValueError naming both where two names collide."""
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        plain = plain_name(name)
        if plain in found:
            raise ValueError(
                f"{path}: holds two tensors of the same name: {origin[plain]} and {name} are both {plain}; save one "
                "model alone"
            )
        found[plain], origin[plain] = tensor, name
    return found


def split_name(name: str) -> tuple[str, str]:
    """(set, name within the model) of a tensor, without wrappers and the names of training classes."""
    rest, label = plain_name(name), RAW
    while True:
        if prefix := next((prefix for prefix in PREFIXES if rest.startswith(prefix)), None):
            rest = rest.removeprefix(prefix)
        elif rest.partition(".")[0] in SETS and "." in rest:
            label, _, rest = rest.partition(".")
        else:
            return label, rest


def split_sets(tensors: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Sets of weights in a state dict: for each, its tensors' names within the model and in the file.

    Raises ValueError naming both where the names of two tensors of one set collide.
    """
    sets: dict[str, dict[str, str]] = {}
    if flat := next((name for name in tensors if name.endswith("_flat_param")), None):
        raise ValueError(
            f"holds FSDP's flattened parameters ({flat}), whose names and shapes are lost; save it again under "
            "FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT)"
        )
    for name in tensors:
        label, short = split_name(name)
        names = sets.setdefault(label, {})
        if short in names and not is_unused(short):
            raise ValueError(f"holds two models: {names[short]} and {name} are both {short}; save one of them alone")
        names[short] = name
    alone = sets.get(RAW, {})
    if len(sets) > 1 and all(name in COUNTERS for name in alone):
        sets.pop(RAW, None)
    return sets


def containers(content: Any, is_tensor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(location, tensors by name) of every mapping in a file's content that holds only tensors, outermost first."""
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(name, str) and is_tensor(value) for name, value in content.items()):
        yield ".".join(path) or RAW, content
    elif len(path) < DEPTH:
        for name, value in content.items():
            yield from containers(value, is_tensor, (*path, str(name)))


def same_model(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether two state dicts belong to one model: most names of the smaller one are in the other too."""
    one, other = ({split_name(name)[1] for name in names} for names in (one, other))
    return len(one & other) * 2 > min(len(one), len(other))


def choose_set(sets: Mapping[str, Mapping[str, np.ndarray]], wanted: str) -> Mapping[str, np.ndarray]:
    """The set of that name, or the only one; sets of equal values count as one. ValueError lists the sets present."""
    if wanted:
        if wanted not in sets:
            raise ValueError(f"holds no weights named {wanted!r}, but {describe(sets)}; choose one of these")
        return sets[wanted]
    (_, first), *others = sets.items()
    if not all(_equal(first, other) for _, other in others):
        raise ValueError(f"holds {len(sets)} sets of weights, {describe(sets)}; choose one with --weights NAME")
    return first


def describe(sets: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Description of a checkpoint's sets by name, with the number of tensors in each."""
    return ", ".join(f"{label} ({len(tensors)} tensors)" for label, tensors in sets.items())


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(x, other[name]) for name, x in one.items())
