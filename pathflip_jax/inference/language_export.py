"""Exports of language-stage runs: a PEFT adapter on its decoder, or a whole decoder, with projector and aligner."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pathflip_jax.convert.checkpoint_files import read_tensors
from pathflip_jax.convert.decoder_folders import PROJECTOR, read_decoder_config, read_object, weights_hash
from pathflip_jax.convert.exported import ALIGNER, LANGUAGE
from pathflip_jax.convert.lora import SETTINGS, load_peft
from pathflip_jax.convert.released import Released, load_released
from pathflip_jax.convert.versions import READ, refusal, unknown_settings
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.llm.adapter import is_trained, split_names
from pathflip_jax.llm.shape import Shape
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.versions import UnknownSettings
from pathflip_jax.runs import files


def is_language_export(source: str | Path) -> bool:
    """Whether a folder is an export of a language run. Raises ValueError for any other PEFT adapter."""
    if is_url(source):
        return False
    folder = Path(source)
    if (folder / SETTINGS).is_file() and not (folder / LANGUAGE).is_file():
        raise ValueError(
            f"{folder}: a PEFT adapter without projector and aligner (no {LANGUAGE}); start a training run from it "
            f"with --config.lm.start={folder}, or export its original run again"
        )
    return (folder / LANGUAGE).is_file()


class LanguageExport(NamedTuple):
    """Run of the language stage as its export holds it.

    `params` are the trained parameters, on the host; `decoder` is the folder of its decoder, or of an adapter's base.
    """

    aligner: Released
    shape: Shape
    params: dict[str, np.ndarray]
    settings: dict[str, Any]
    decoder: Path
    notes: list[str]


def read_language_export(source: str | Path, decoder_folder: str | Path | None = None) -> LanguageExport:
    """Read what `pathflip export --to peft` or `--to huggingface` wrote of a run of the language stage.

    An adapter's base is `decoder_folder`, else the folder that it names; a whole decoder needs none. Raises
    FileNotFoundError and ValueError for parts that are missing or of other models.
    """
    source = Path(source)
    about = read_object(source / LANGUAGE)
    try:
        shape, found = Shape.from_dict(about["shape"]), _settings(about["settings"])
        trains = split_names(found["lm"]["trains"])
    except UnknownSettings as error:
        raise ValueError(refusal(source / LANGUAGE, error.names, about.get("version"))) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source / LANGUAGE}: not a valid export description ({error}); export it again") from None
    aligner = load_released(source / ALIGNER)
    params = {f"projector/{name}": x for name, x in _projector(source).items()}
    if (source / SETTINGS).is_file():
        decoder = _base(source, decoder_folder, found["lm"].get("decoder_hash", ""))
        adapter, lora = load_peft(source, decoder)
        if (stated := _scale(shape.lora)) != _scale(lora):
            raise ValueError(
                f"{source}: its adapter is {_scale(lora)}, {LANGUAGE} says {stated}; copy the export again"
            )
        params |= {f"decoder/{name}": x for name, x in adapter.items()}
        notes = []
    else:
        if decoder_folder is not None:
            raise ValueError(f"{source}: holds its own decoder; leave out --decoder")
        decoder = source
        shape, trains, notes = _whole_decoder(source, shape, trains)
        found["lm"] |= {"trains": ",".join(trains), "random_decoder": False}
    if "aligner" in trains:
        params |= {f"aligner/{name}": np.asarray(x) for name, x in flatten(aligner.model).items()}
    return LanguageExport(aligner, shape, _trained(params, shape, trains, source), found, decoder, notes)


def _settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Mutable settings of an export. UnknownSettings names those of a later version."""
    if unknown := unknown_settings(stated, READ):
        raise UnknownSettings("settings of its run", unknown)
    return {name: dict(part) if isinstance(part, dict) else part for name, part in stated.items() if part != {}}


def _projector(source: Path) -> dict[str, np.ndarray]:
    tensors = read_tensors(source / PROJECTOR)
    if tensors.keys() != {"weight", "bias"}:
        raise ValueError(f"{source / PROJECTOR}: holds {', '.join(tensors)}, expected weight and bias; copy it again")
    return {"kernel": np.ascontiguousarray(tensors["weight"].T), "bias": tensors["bias"]}


def _base(source: Path, given: str | Path | None, known: str) -> Path:
    """Folder of an adapter's base decoder. ValueError where it holds other weights than the run was trained on."""
    named = str(read_object(source / SETTINGS).get("base_model_name_or_path") or "")
    folder = Path(given) if given is not None else Path(named)
    if not (folder / files.CONFIG).is_file():
        raise FileNotFoundError(
            f"{source}: an adapter of {named or 'an unnamed decoder'}, but {folder} is not the folder of a decoder; "
            "pass that decoder's folder with --decoder"
        )
    if known and weights_hash(folder) != known:
        raise ValueError(
            f"{source}: its adapter was trained on another decoder than the one in {folder}; pass the folder of the "
            "weights that it was trained on with --decoder"
        )
    return folder


def _scale(lora: Any) -> str:
    return "none" if lora is None else f"rank {lora.rank}, alpha {lora.alpha:g} at {', '.join(sorted(lora.targets))}"


def _whole_decoder(source: Path, shape: Shape, trains: tuple[str, ...]) -> tuple[Shape, tuple[str, ...], list[str]]:
    """Shape and trained parts of a run whose decoder, adapter included, is exported as a whole."""
    stated = read_decoder_config(source, compute_dtype=shape.decoder.compute_dtype, remat=shape.decoder.remat)
    if stated != shape.decoder:
        raise ValueError(f"{source}: its config.json and {LANGUAGE} describe different decoders; copy the export again")
    notes = []
    if shape.lora is not None:
        rounded = ", rounded to bfloat16" if shape.dtype == "bfloat16" else ""
        notes.append(f"the adapter ({_scale(shape.lora)}) was merged into the decoder at export{rounded}")
    if kept := [part for part in trains if part in ("lora", "decoder")]:
        notes.append(f"{' and '.join(kept)}: trained before, now part of the decoder, read from {source}")
    values = read_object(source / files.CONFIG)
    dtype = str(values.get("dtype") or values.get("torch_dtype") or shape.dtype)
    parts = tuple(dict.fromkeys([*(part for part in trains if part not in ("lora", "decoder")), "projector"]))
    return shape._replace(lora=None, dtype=dtype), parts, notes


def _trained(params: dict, shape: Shape, trains: tuple[str, ...], source: Path) -> dict[str, np.ndarray]:
    """Parameters that a run with these trained parts saves. ValueError for missing ones or other shapes."""
    trainable = is_trained(trains)
    wanted = {name: x for name, x in shape.abstract(trainable).items() if trainable(name)}
    faults = [
        f"{name} is {params[name].shape if name in params else 'missing'}, expected {x.shape}"
        for name, x in wanted.items()
        if name not in params or params[name].shape != x.shape
    ]
    if faults:
        raise ValueError(f"{source}: {len(faults)} parameters do not fit its {LANGUAGE}: {'; '.join(faults[:4])}")
    return {name: np.asarray(params[name], x.dtype) for name, x in wanted.items()}
