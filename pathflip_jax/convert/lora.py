"""Low-rank adapters (DESIGN section 7): extraction, attachment, merging into kernels, and PEFT folders.

An adapter is a flat dict of the parameters ".../lora/a" [inputs, rank] and ".../lora/b" [rank, outputs], and the
LoRAConfig that determines their scale.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from pathflip_jax.convert.checkpoint_files import read_tensors
from pathflip_jax.convert.decoder_folders import (
    local_folder,
    read_decoder_config,
    read_object,
    write_tensors,
)
from pathflip_jax.convert.decoder_names import CLASSES, adapter_names
from pathflip_jax.convert.weight_sets import plain_names
from pathflip_jax.data.storage.atomic_folders import atomic_folder
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.llm.config import TARGETS, DecoderConfig, LoRAConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.model.parameters import flatten
from pathflip_jax.runtime.sharding import infer_shardings

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and load that folder"
# PEFT settings that change what an adapter computes, and the values that match the computation here.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    # Other initialisations (pissa, olora, corda, loftq, ...) also change the base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

Flat = Mapping[str, Any]


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(("/lora/a", "/lora/b"))


def adapters(flat: Flat) -> dict[str, Any]:
    """Adapter parameters of a decoder."""
    return {name: array for name, array in flat.items() if is_adapter(name)}


def merged(flat: Flat, name: str, lora: LoRAConfig) -> jax.Array:
    """Decoder parameter plus the adapter's update, summed in float32 and returned in its original dtype."""
    stem, _, last = name.rpartition("/")
    kernel = flat[name]
    if last != "kernel" or f"{stem}/lora/a" not in flat:
        return kernel
    a, b = (jnp.asarray(flat[f"{stem}/lora/{part}"], jnp.float32) for part in "ab")
    added = jnp.matmul(a, b, precision="highest") * (lora.alpha / lora.rank)
    return (jnp.asarray(kernel, jnp.float32) + added).astype(kernel.dtype)


def merge(flat: Flat, lora: LoRAConfig) -> dict[str, jax.Array]:
    """Merge the adapter into the decoder's parameters: the result computes the same without an adapter."""
    return {name: merged(flat, name, lora) for name in flat if not is_adapter(name)}


def attach(flat: Flat, adapter: Flat) -> dict[str, jax.Array]:
    """Attach this adapter to a decoder's parameters, replacing any previous one, on the decoder's devices.

    Raises ValueError listing every mismatch with its kernels.
    """
    base = {name: array for name, array in flat.items() if not is_adapter(name)}
    faults, placed = [], {}
    for name, array in adapter.items():
        kernel = base.get(f"{name.rpartition('/lora/')[0]}/kernel")
        if not is_adapter(name) or kernel is None:
            faults.append(f"{name}: the decoder has nothing to adapt there")
            continue
        axis = 0 if name.endswith("a") else 1
        if array.ndim != 2 or array.shape[axis] != kernel.shape[axis]:
            faults.append(f"{name}: has shape {tuple(array.shape)}, but the kernel has {tuple(kernel.shape)}")
        elif isinstance(place := getattr(kernel, "sharding", None), NamedSharding):
            placed[name] = jax.device_put(array, infer_shardings(place.mesh, {name: array})[name])
        else:
            placed[name] = jax.device_put(array, place)
    if faults:
        raise ValueError("this adapter does not fit this decoder:\n  " + "\n  ".join(faults))
    return base | placed


def save_peft(flat: Flat, lora: LoRAConfig, folder: str | Path, base: str) -> None:
    """Write the adapter of a decoder as PEFT does; `base` names its base model, a folder or a name on the Hub.

    The folder is written atomically. Raises FileExistsError for an existing folder that is not empty, ValueError
    listing what the adapter lacks.
    """
    found = adapters(flat)
    layers = 1 + max((int(name.split("/")[1]) for name in found), default=-1)
    table = {name.torch: name for name in adapter_names(max(layers, 1), lora.targets)}
    wanted = {name.path for name in table.values()}
    faults = [f"missing {name}" for name in sorted(wanted - found.keys())]
    faults += [f"unknown {name}" for name in sorted(found.keys() - wanted)]
    if faults:
        raise ValueError(f"the parameters are not those of adapters at {', '.join(lora.targets)}: {'; '.join(faults)}")
    shapes = {
        torch: jax.ShapeDtypeStruct(name.torch_shape(found[name.path].shape), jnp.float32)
        for torch, name in table.items()
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    with atomic_folder(folder) as part:
        write_tensors(part / WEIGHTS, shapes, lambda torch: table[torch].to_torch(np.asarray(found[table[torch].path])))
        write_json(part / SETTINGS, settings)


def load_peft(folder: str | Path, base_folder: str | Path | None = None) -> tuple[dict[str, np.ndarray], LoRAConfig]:
    """Load the adapter in a PEFT folder, for `attach`, and its config; with `base_folder`, checked against it.

    The adapted projections follow from the names of its tensors, so target_modules may also be a pattern. An rsLoRA is
    returned with the alpha that reproduces its scale. Raises FileNotFoundError where something is missing, ValueError
    listing everything unsupported and every mismatch.
    """
    folder = local_folder(folder)
    path = folder / SETTINGS
    settings = read_object(path)
    lora = _lora(path, settings)
    if not (folder / WEIGHTS).is_file():
        cure = "save it with safe_serialization=True" if (folder / "adapter_model.bin").is_file() else "copy it too"
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} in it; {cure}")
    tensors = plain_names(read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    every = {name.torch: name for name in adapter_names(_layers(tensors), tuple(TARGETS))}
    used = {name.path.split("/", 2)[2].partition("/lora/")[0] for torch, name in every.items() if torch in tensors}
    targets = tuple(target for target in TARGETS if TARGETS[target] in used)
    other = sorted(tensors.keys() - every.keys())
    if other or not targets:
        raise ValueError(
            f"{folder / WEIGHTS}: expected adapters of a decoder's {', '.join(TARGETS)} only, found "
            f"{', '.join(other) or 'none'}; {MERGE}"
        )
    lora = LoRAConfig(lora.rank, lora.alpha, lora.dropout, targets)
    base, about = None, ""
    if base_folder is not None:
        base = _base(path, settings, base_folder)
        trained_on = settings.get("base_model_name_or_path")
        about = f" {base_folder}; it was trained on {trained_on!r}, pass the folder of that model"
    faults, flat = [], {}
    expected = _shapes(base, lora) if base else {}
    for name in adapter_names(base.layers if base else _layers(tensors), targets):
        if name.torch not in tensors:
            faults.append(f"{name.torch}: missing (adapters of some layers only are not supported; {MERGE})")
            continue
        array = name.to_jax(tensors.pop(name.torch))
        rank = array.shape[1 if name.path.endswith("a") else 0] if array.ndim == 2 else None
        if base and array.shape != expected[name.path]:
            wanted = name.torch_shape(expected[name.path])
            faults.append(f"{name.torch}: has shape {name.torch_shape(array.shape)}, expected {wanted}")
        elif rank != lora.rank:
            faults.append(f"{name.torch}: has shape {name.torch_shape(array.shape)}, expected rank {lora.rank}")
        else:
            flat[name.path] = np.ascontiguousarray(array)
    faults += [f"{name}: not found in the base model" for name in sorted(tensors)]
    if faults:
        raise ValueError(f"{folder / WEIGHTS}: does not fit{about or ' its config'}\n  " + "\n  ".join(faults))
    return flat, lora


def _lora(path: Path, settings: Mapping[str, Any]) -> LoRAConfig:
    """Rank, scale and dropout from an adapter_config.json."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'; {MERGE}")
    faults = [
        f"{name} is {settings[name]!r}"
        for name, plain in PLAIN.items()
        if name in settings and not any(settings[name] is value or settings[name] == value for value in plain)
    ]
    if faults:
        raise ValueError(f"{path}: not supported: {'; '.join(faults)}; {MERGE}")
    try:
        rank, alpha = settings["r"], float(settings["lora_alpha"])
        if not isinstance(rank, int):
            raise ValueError(f"r is {rank!r}, expected a whole number")
        lora = LoRAConfig(rank, alpha, float(settings.get("lora_dropout") or 0))
    except KeyError as error:
        raise ValueError(f"{path}: missing key {error}; copy it again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; copy it again") from error
    if settings.get("use_rslora"):
        return LoRAConfig(rank, alpha * math.sqrt(rank), lora.dropout)
    return lora


def _layers(tensors: Mapping[str, np.ndarray]) -> int:
    """Number of layers: the highest layer index that occurs, plus one."""
    numbers = [name.split(".layers.", 1)[1].split(".")[0] for name in tensors if ".layers." in name]
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 5), default=0)


def _base(path: Path, settings: Mapping[str, Any], base_folder: str | Path) -> DecoderConfig:
    """Config of the base model. Raises ValueError where the adapter names another architecture."""
    base = read_decoder_config(base_folder)
    mapping = settings.get("auto_mapping")
    trained_on = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    named = Path(str(settings.get("base_model_name_or_path"))) / "config.json"
    if trained_on is None and named.is_file():
        trained_on = CLASSES.get(kind := read_object(named).get("model_type"), kind)
    if trained_on not in (None, CLASSES[base.family]):
        raise ValueError(
            f"{path}: trained on a {trained_on} ({settings.get('base_model_name_or_path')}), while {base_folder} is a "
            f"{CLASSES[base.family]}; give the folder of the base that it was trained on"
        )
    return base


def _shapes(base: DecoderConfig, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda: adapters(flatten(Decoder(base, nnx.Rngs(0), lora))))
    return {name: shape.shape for name, shape in shapes.items()}
