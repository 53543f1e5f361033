"""Loading of language-stage runs: the trained parameters, and the aligner and decoder they build on.

A run folder of this stage holds the trained parameters (projector, LoRA, ...), the tokenizer and the names and hashes
of the two sources, from which frozen parameters are read again.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.convert.decoder_folders import PROJECTOR
from pathflip_jax.convert.lora import load_peft
from pathflip_jax.convert.versions import refusal, signed, version_of
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage import json_files
from pathflip_jax.data.storage.files import as_path, make_folder
from pathflip_jax.inference.embed import checkpoint_hash
from pathflip_jax.inference.load import load
from pathflip_jax.llm.adapter import SlideLanguageModel, is_trained
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.versions import UnknownSettings
from pathflip_jax.runs import files
from pathflip_jax.runs import folder as runs_folder
from pathflip_jax.runs.checksums import content_hash

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
    if "lm" in json_files.read_json(files.run_folder(folder) / files.CONFIG):
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

    `decoder` and `aligner` name those folders if they have moved; `dtype` is that of the decoder's weights and of
    computation. Raises ValueError where a source's weights have changed.
    """
    shape, config, trained = read_trained(folder, which)
    lm = config["lm"]
    shape = shape._replace(decoder=replace(shape.decoder, remat=False))
    if dtype:
        shape = shape._replace(dtype=dtype, decoder=replace(shape.decoder, compute_dtype=dtype))
    names = {"aligner": aligner or lm["aligner"], "decoder": decoder or lm["decoder"]}
    source = read_aligner(names["aligner"])
    hashes = {"aligner": source.hash, "decoder": weights_hash(names["decoder"])}
    for part, found in hashes.items():
        if found != lm[f"{part}_hash"]:
            raise ValueError(
                f"{folder}: was trained on another {part} than {names[part]} holds now; name the folder of the weights "
                f"that it was trained on with --{part}"
            )
    params = {f"aligner/{name}": x for name, x in source.params.items()}
    if not lm["random_decoder"]:
        loaded = load_decoder(names["decoder"], dtype=shape.dtype, compute_dtype=shape.decoder.compute_dtype)
        params |= {f"decoder/{name}": x for name, x in flatten(loaded).items()}
    params |= trained
    if dtype:
        stored = {name: x.astype(dtype) for name, x in params.items() if name.startswith("decoder/")}
        params |= {name: x for name, x in stored.items() if "/lora/" not in name}
    model = shape.build(jax.device_put(params))
    return model, config, DecoderTokenizer(files.run_folder(folder) / files.TOKENIZER)


def split_names(text: str) -> tuple[str, ...]:
    """Names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


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


def describe_language_run(folder: Path, shape: Shape, resolved: dict, tokenizer: DecoderTokenizer) -> None:
    """Write config.json, model.json and tokenizer/ of a run of the language stage."""
    make_folder(as_path(folder))
    tokenizer.save(folder / files.TOKENIZER)
    json_files.write_json(folder / files.CONFIG, signed(resolved))
    json_files.write_json(folder / files.MODEL, shape.to_dict())
