"""Loading of language-stage runs: the trained parameters, and the aligner and decoder they build on.

A run folder of this stage holds the trained parameters (projector, LoRA, ...), the tokenizer and the names and hashes
of the two sources, from which frozen parameters are read again.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.convert.decoder_folders import PROJECTOR, weights_hash
from pathflip_jax.convert.exported import ALIGNER
from pathflip_jax.convert.lora import load_peft
from pathflip_jax.convert.versions import refusal, signed, version_of
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage import json_files
from pathflip_jax.data.storage.files import as_path, make_folder
from pathflip_jax.inference.embed import checkpoint_hash
from pathflip_jax.inference.language_export import is_language_export, read_language_export
from pathflip_jax.inference.load import load
from pathflip_jax.llm.adapter import SlideLanguageModel, is_trained, split_names
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.versions import UnknownSettings
from pathflip_jax.runs import files
from pathflip_jax.runs import folder as runs_folder
from pathflip_jax.runs.checksums import content_hash
from pathflip_jax.runs.places import find_run

log = logging.getLogger(__name__)


class Aligner(NamedTuple):
    """Alignment run that embeds slides: its shape, and its parameters on the host."""

    model: PathFLIPConfig
    params: dict[str, np.ndarray]
    hash: str


def read_aligner(folder: str, records: Records | None = None, where: str = "") -> Aligner:
    """Read the best checkpoint of an alignment run.

    Raises FileNotFoundError and ValueError for any other folder, and for `records` (called `where`) of features that it
    was not trained on.
    """
    home = files.run_folder(find_run(folder))
    if "lm" in json_files.read_json(home / files.CONFIG):
        raise ValueError(f"lm.aligner={folder}: a run of the language stage; pass the alignment run that it builds on")
    predictor = load(folder)
    if predictor.patchwise:
        raise ValueError(
            f"lm.aligner={folder}: a PathFLIP2, which has no regions; the language stage needs embeddings of a slide "
            "and of its regions: pass a run of a PathFLIP (align_base)"
        )
    if records is not None:
        predictor.check_features(where, records.feature_dim, records.encoder, records.recipe)
    params = jax.device_get(flatten(predictor.model))
    return Aligner(predictor.model.config, params, checkpoint_hash(predictor))


class InitialParameters(NamedTuple):
    """Initial parameters of a run: those that another run trained, or a PEFT adapter; and its LoRA, if any."""

    lora: LoRAConfig | None
    params: dict[str, np.ndarray]
    hash: str


def read_initial_parameters(folder: str, decoder: str, aligner_hash: str, decoder_hash: str) -> InitialParameters:
    """Read the parameters trained by a run of the language stage, or a PEFT adapter, for the decoder in that folder.

    Raises ValueError where it was trained on another aligner or decoder.
    """
    folder = str(find_run(folder))
    if (Path(folder) / "adapter_config.json").is_file():
        flat, lora = load_peft(folder, decoder)
        if (Path(folder) / PROJECTOR).is_file():
            log.warning(
                "lm.start=%s: only the adapter of this export is read, and the projector is initialised at random; "
                "to start from both, convert the export to a run with `pathflip convert`",
                folder,
            )
        params = {f"decoder/{name}": x for name, x in flat.items()}
        return InitialParameters(lora, params, content_hash(params))
    shape, config, params = read_trained(folder)
    wrong = [
        f"another {name} ({config['lm'].get(name)})"
        for name, found in (("aligner", aligner_hash), ("decoder", decoder_hash))
        if config["lm"].get(f"{name}_hash") != found
    ]
    if wrong:
        raise ValueError(f"lm.start={folder}: was trained with {' and '.join(wrong)}; pass the same, or no lm.start")
    return InitialParameters(shape.lora, params, content_hash(params))


def read_trained(folder: str | Path, which: str | int = "best") -> tuple[Shape, dict, dict[str, np.ndarray]]:
    """Read shape, settings and trained parameters (on the host) from a run folder of the language stage.

    Raises FileNotFoundError and ValueError for any other folder, or a damaged one.
    """
    home = files.run_folder(folder)
    config = files.read_run_config(home)
    if "lm" not in config:
        raise ValueError(
            f"{folder}: not a run of the language stage; give the --workdir of `pathflip train --config lm_...`"
        )
    try:
        shape = Shape.from_dict(json_files.read_json(home / files.MODEL))
    except UnknownSettings as error:
        raise ValueError(refusal(home / files.MODEL, error.names, version_of(config))) from None
    except ValueError as error:
        raise ValueError(f"{home / files.MODEL}: {error}") from None
    trainable = is_trained(split_names(config["lm"]["trains"]))
    shapes = {name: x for name, x in shape.abstract(trainable).items() if trainable(name)}
    return shape, config, jax.device_get(runs_folder.read_params(home, config, shapes, which))


def assemble(
    folder: str | Path, which: str | int = "best", *, decoder: str = "", aligner: str = "", dtype: str = ""
) -> tuple[SlideLanguageModel, dict, DecoderTokenizer]:
    """Assemble (model, config, tokenizer) of a run of the language stage from its trained parameters and its sources.

    The run may be a folder, an export of one, or either on the hub (`runs/places.py`). `decoder` and `aligner` name
    those folders if they have moved; `dtype` is that of the decoder's weights and of computation. Raises ValueError
    where a source's weights have changed.
    """
    home = find_run(folder)
    read = _read_export if is_language_export(home) else _read_run
    parts = read(home, which, decoder, aligner)
    shape = parts.shape._replace(decoder=replace(parts.shape.decoder, remat=False))
    if dtype:
        shape = shape._replace(dtype=dtype, decoder=replace(shape.decoder, compute_dtype=dtype))
    params = {f"aligner/{name}": x for name, x in parts.aligner.items()}
    if not parts.config["lm"]["random_decoder"]:
        loaded = load_decoder(parts.decoder, dtype=shape.dtype, compute_dtype=shape.decoder.compute_dtype)
        params |= {f"decoder/{name}": x for name, x in flatten(loaded).items()}
    params |= parts.trained
    if dtype:
        stored = {name: x.astype(dtype) for name, x in params.items() if name.startswith("decoder/")}
        params |= {name: x for name, x in stored.items() if "/lora/" not in name}
    return shape.build(jax.device_put(params)), parts.config, parts.tokenizer


class _Parts(NamedTuple):
    """Parts of a language run: shape, settings, the aligner's and the trained parameters, decoder folder, tokenizer."""

    shape: Shape
    config: dict
    aligner: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]
    decoder: str | Path
    tokenizer: DecoderTokenizer


def _read_run(folder: str | Path, which: str | int, decoder: str, aligner: str) -> _Parts:
    shape, config, trained = read_trained(folder, which)
    lm = config["lm"]
    names = {"aligner": aligner or lm["aligner"], "decoder": decoder or lm["decoder"]}
    source = read_aligner(names["aligner"])
    hashes = {"aligner": source.hash, "decoder": weights_hash(names["decoder"])}
    for part, found in hashes.items():
        if found != lm[f"{part}_hash"]:
            raise ValueError(
                f"{folder}: was trained on another {part} than {names[part]} holds now; name the folder of the weights "
                f"that it was trained on with --{part}"
            )
    tokenizer = DecoderTokenizer(files.run_folder(folder) / files.TOKENIZER)
    return _Parts(shape, config, source.params, trained, names["decoder"], tokenizer)


def _read_export(folder: str | Path, which: str | int, decoder: str, aligner: str) -> _Parts:
    if which not in ("best", "latest") or aligner:
        given = f"--aligner {aligner}" if aligner else f"step {which}"
        raise ValueError(f"{folder}: an export, which holds one set of weights and its aligner; leave out {given}")
    found = read_language_export(folder, decoder or None)
    for note in found.notes:
        log.info("%s: %s", folder, note)
    lm = {"aligner": str(Path(folder) / ALIGNER), "decoder": str(found.decoder), "start": ""}
    config = found.settings | {"lm": found.settings["lm"] | lm}
    params = jax.device_get(flatten(found.aligner.model))
    return _Parts(found.shape, config, params, found.params, found.decoder, DecoderTokenizer(found.decoder))


def describe_language_run(folder: Path, shape: Shape, resolved: dict, tokenizer: DecoderTokenizer) -> None:
    """Write config.json, model.json and tokenizer/ of a run of the language stage."""
    make_folder(as_path(folder))
    tokenizer.save(folder / files.TOKENIZER)
    json_files.write_json(folder / files.CONFIG, signed(resolved))
    json_files.write_json(folder / files.MODEL, shape.to_dict())
