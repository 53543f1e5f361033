"""The language stage as the training loop takes it: slides of an aligner's run in front of a decoder's folder.

A run folder of this stage holds what was trained (projector, LoRA, ...), the tokenizer and the names of the two
sources with hashes of them: what is frozen is read from there again.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from pathflip_jax import fingerprints, settings
from pathflip_jax.convert.decoder import check_tokenizer, init_decoder, load_decoder
from pathflip_jax.convert.decoder_folders import PROJECTOR, read_decoder_config
from pathflip_jax.convert.lora import load_peft
from pathflip_jax.convert.versions import refusal, signed, version_of
from pathflip_jax.data.batches.patches import PatchSampler
from pathflip_jax.data.batches.pipeline import look_up
from pathflip_jax.data.records.records import Records, manifest_hash
from pathflip_jax.data.storage import json_files
from pathflip_jax.data.storage.files import as_path, make_folder, read_bytes
from pathflip_jax.data.texts.cases import slides_of_case
from pathflip_jax.data.texts.conversations import read_conversations, read_mixture
from pathflip_jax.inference.embed import checkpoint_hash
from pathflip_jax.inference.predictor import load
from pathflip_jax.llm.adapter import SlideLanguageModel, is_trained, language_operations, language_stage
from pathflip_jax.llm.batches import (
    EmbeddedSlides,
    Example,
    LanguageBatches,
    collect_examples,
    read_embeddings,
)
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.llm.prompts import choose_template
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import Params, flatten
from pathflip_jax.model.versions import UnknownSettings
from pathflip_jax.monitoring.metrics import VALIDATION
from pathflip_jax.optim import OptimConfig
from pathflip_jax.run_data import COUNTS, SplitSlides, count_slides, cut_facts, say_counts, split_slides
from pathflip_jax.runs import checkpoints, files
from pathflip_jax.runs import folder as runs_folder
from pathflip_jax.runtime import memory, sharding
from pathflip_jax.stage import Stage, Training
from pathflip_jax.validation import Mark, over_batches, require_score

log = logging.getLogger(__name__)


def language_training(config: ConfigDict, mesh: jax.sharding.Mesh, begun: bool = False) -> Training:
    """Answers about slides: what `lm.trains` names learns, the rest is read from aligner, decoder and `lm.start`.

    `begun`: whether the run goes on, as in `split_slides`.
    Raises ValueError and OSError for settings, folders and tables that cannot be used, with the cure.
    """
    lm, data = config.lm, config.data
    trains = split_names(lm.trains)
    stage = language_stage(trains)
    check_language_config(config)
    require_score(config.train.select, ("loss",))
    records = Records(data.records)
    aligner, decoder_hash = read_aligner(lm.aligner, records, data.records), weights_hash(lm.decoder)
    decoder = read_decoder_config(lm.decoder, compute_dtype=lm.compute_dtype, remat=lm.remat)
    check_tokenizer(lm.decoder, decoder)
    tokenizer = DecoderTokenizer(lm.decoder)
    template = choose_template(tokenizer, data.template)
    started = read_start(lm.start, lm.decoder, aligner.hash, decoder_hash) if lm.start else None
    lora = _lora(config, trains, started)
    shape = Shape(aligner.model, decoder, lora, lm.dtype)

    split = split_slides(data, records, begun)
    training, validation, means = _open_batches(
        config, records, aligner, tokenizer, template, decoder.max_positions, mesh, split
    )
    resolved = config.to_dict()
    resolved["data"] |= _facts(data, records, training, template, means)
    told = [batches and batches.slides_of_examples(records) for batches in (training, validation)]
    resolved["data"][COUNTS] = count_slides(data, records, split, told)
    say_counts(resolved["data"], validation is not None)
    resolved["lm"] |= {"aligner_hash": aligner.hash, "decoder_hash": decoder_hash}
    resolved["lm"] |= {"start_hash": started.hash if started else ""}

    def build(learned: Params, frozen: Params) -> SlideLanguageModel:
        return shape.build(learned | frozen)

    def require_room(step) -> None:
        setup, shards = config.train, sharding.batch_shards(mesh)
        memory.check_step(step, setup.batch_size, setup.accumulate, lm.remat, shards, 0, "lm")

    return Training(
        stage=stage,
        shapes=shape.abstract(stage.trainable),
        build=build,
        initial=lambda places: initial_parameters(config, shape, aligner, started, places, mesh),
        keeps=stage.trainable,
        batches=training,
        validate=_make_validation(stage, build, validation, mesh) if validation else None,
        compute_dtype=lm.compute_dtype,
        useful_operations=language_operations(aligner.model, decoder, trains),
        require_room=require_room,
        resolved=resolved,
        describe=lambda folder: describe_language_run(folder, shape, resolved, tokenizer),
    )


def check_language_config(config: ConfigDict) -> None:
    """Raise ValueError for what is wrong in a config of the language stage, whatever its folders. Computes nothing."""
    settings.check(config)
    OptimConfig(**config.optim)
    trains = split_names(config.lm.trains)
    language_stage(trains)
    _lora(config, trains, None)
    if config.data.embeddings and "aligner" in trains:
        raise ValueError("data.embeddings: slides that were embedded before teach the aligner nothing; leave it unset")
    if config.lm.random_decoder and "decoder" not in trains:
        raise ValueError("lm.random_decoder: a decoder that starts from scratch must learn; add decoder to lm.trains")


class Aligner(NamedTuple):
    """The run that slides come from: its shape, and its parameters on the host."""

    model: PathFLIPConfig
    params: dict[str, np.ndarray]
    hash: str


def read_aligner(folder: str, records: Records | None = None, where: str = "") -> Aligner:
    """Read the best checkpoint of an alignment run.

    Raises FileNotFoundError and ValueError for what is none, and for `records` (called `where`) of features that it was
    not trained on.
    """
    if "lm" in json_files.read_json(files.run_folder(folder) / files.CONFIG):
        raise ValueError(f"lm.aligner={folder}: a run of the language stage; name the alignment run that it stands on")
    predictor = load(folder)
    if predictor.patchwise:
        raise ValueError(
            f"lm.aligner={folder}: a PathFLIP2, which knows no regions; the language stage reads a slide and its "
            "regions: name a run of a PathFLIP (align_base)"
        )
    if records is not None:
        predictor.check_features(where, records.feature_dim, records.encoder)
    params = jax.device_get(flatten(predictor.model))
    return Aligner(predictor.model.config, params, checkpoint_hash(predictor))


def _lora(config: ConfigDict, trains: tuple[str, ...], started: "Started | None") -> LoRAConfig | None:
    """The adapters of this run: those that it starts from, or as its settings say; None without any."""
    lm = config.lm
    if "lora" not in trains:
        return None if started is None else started.lora
    lora = LoRAConfig(lm.lora_rank, lm.lora_alpha, lm.lora_dropout, split_names(lm.lora_targets))
    if started is not None and started.lora is not None:
        if {**vars(started.lora), "dropout": 0.0} != {**vars(lora), "dropout": 0.0}:
            raise ValueError(f"lm.start={lm.start}: has {started.lora}, this config {lora}; set lm.lora_... alike")
    return lora


class Started(NamedTuple):
    """What a run starts from: the parameters that another one trained, or an adapter of PEFT; and its LoRA, if any."""

    lora: LoRAConfig | None
    params: dict[str, np.ndarray]
    hash: str


def read_start(folder: str, decoder: str, aligner_hash: str, decoder_hash: str) -> Started:
    """Read what a run of the language stage trained, or an adapter that PEFT did, of the decoder in that folder.

    Raises ValueError where it stands on another aligner or decoder.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        flat, lora = load_peft(folder, decoder)
        if (Path(folder) / PROJECTOR).is_file():
            log.warning(
                "lm.start=%s: of this export the adapter alone is read, the projector starts at random; "
                "`pathflip convert` makes a run of it, which starts both",
                folder,
            )
        params = {f"decoder/{name}": x for name, x in flat.items()}
        return Started(lora, params, checkpoints.content_hash(params))
    shape, config, params = read_trained(folder)
    wrong = [
        f"another {name}, {config['lm'].get(name)}"
        for name, found in (("aligner", aligner_hash), ("decoder", decoder_hash))
        if config["lm"].get(f"{name}_hash") != found
    ]
    if wrong:
        raise ValueError(f"lm.start={folder}: stands on {' and on '.join(wrong)}; name the same ones, or no lm.start")
    return Started(shape.lora, params, checkpoints.content_hash(params))


def read_trained(folder: str | Path, which: str | int = "best") -> tuple[Shape, dict, dict[str, np.ndarray]]:
    """Shape, settings and trained parameters, on the host, of a run folder of the language stage.

    Raises FileNotFoundError and ValueError for a folder that is none, or is damaged.
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


def initial_parameters(config: ConfigDict, shape: Shape, aligner: Aligner, started: Started | None, places: dict, mesh):
    """All parameters where they live: aligner and decoder as read, the projector random, then those of `lm.start`."""
    lm = config.lm
    if lm.random_decoder:
        decoder = init_decoder(shape.decoder, config.train.seed, mesh=mesh, lora=shape.lora)
    else:
        decoder = load_decoder(
            lm.decoder, dtype=shape.dtype, compute_dtype=lm.compute_dtype, mesh=mesh, lora=shape.lora
        )
    params = {f"decoder/{name}": x for name, x in flatten(decoder).items()}
    params |= {f"aligner/{name}": jax.device_put(x, places[f"aligner/{name}"]) for name, x in aligner.params.items()}
    projector = {name: places[name] for name in places if name.startswith("projector/")}
    params |= jax.jit(shape.projector, out_shardings=projector)(jax.random.key(config.train.seed))
    wanted = shape.abstract(is_trained(split_names(lm.trains)))
    cast = {name: x.astype(wanted[name].dtype) for name, x in params.items()}
    started_params = {} if started is None else started.params
    return cast | {name: jax.device_put(x, places[name]) for name, x in started_params.items()}


def assemble(
    folder: str | Path, which: str | int = "best", *, decoder: str = "", aligner: str = "", dtype: str = ""
) -> tuple[SlideLanguageModel, dict, DecoderTokenizer]:
    """(model, config, tokenizer) of a run of the language stage: what it trained, and its sources read again.

    `decoder` and `aligner` name those folders where they are not where they were; `dtype` is that of the decoder's
    weights and of computing. Raises ValueError where a source holds other weights than it did.
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
    """The names in a list written with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def weights_hash(folder: str | Path) -> str:
    """A hash of a decoder's folder: of config.json, and of name, size and table of contents of each file of weights.

    Weights of one shape that were saved over each other differ in what the tensors hold: so the start and the end of
    each file count too, without reading gigabytes.
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


def _open_batches(
    config: ConfigDict,
    records: Records,
    aligner: Aligner,
    tokenizer: DecoderTokenizer,
    template: str,
    positions: int,
    mesh: jax.sharding.Mesh,
    split: SplitSlides,
) -> tuple[LanguageBatches, LanguageBatches | None, dict]:
    """The batches of training and of validation, as the slide table splits them, and hashes of what data say."""
    data, size = config.data, config.train.batch_size
    mixture = [(read_conversations(path), times) for path, times in read_mixture(data.texts)]
    means = {"texts": fingerprints.conversations(mixture), "times": [times for _, times in mixture]}
    means["tokenizer"] = fingerprints.tokenizer(tokenizer.described)
    if split.table:
        means["slides"] = fingerprints.slide_rows(split.table.rows.values())
        of_case = slides_of_case(split.table.rows.values())
        mixture = [([talk._replace(slide_ids=talk.slide_ids or of_case(talk.case_id)) for talk in talks], times)
                   for talks, times in mixture]  # fmt: skip
    shared = {"length": data.length or None, "most_positions": positions, "threads": data.threads}
    shared |= {"shards": sharding.batch_shards(mesh), "own_shards": sharding.own_shards(mesh)}
    examples = collect_examples(records, mixture, tokenizer, template, split.training, data.sentence_orders)
    held_out: list[Example] = []
    if split.validation:
        once = [(conversations, 1) for conversations, _ in mixture]
        held_out = collect_examples(records, once, tokenizer, template, split.validation)
    if data.embeddings:
        found = read_embeddings(data.embeddings, records, [*examples, *held_out], config.lm.aligner, aligner.hash)
        slides = [EmbeddedSlides(found, data.regions)] * 2
    else:
        slots = data.patch_slots or max(int(example.regions.count.max()) for example in examples)
        slides = [PatchSampler(records, data.regions, slots, data.threads) for _ in range(2)]
    seed, share = config.train.seed, data.no_slide_share
    training = LanguageBatches(examples, slides[0], batch_size=size, seed=seed, no_slide_share=share, **shared)
    validation = LanguageBatches(held_out, slides[1], batch_size=size, fill=True, **shared) if held_out else None
    for batches in (training, validation):
        if batches is not None and data.resident:
            batches.load(on_device=data.resident == "device")
    return training, validation, means


def _facts(data: ConfigDict, records: Records, training: LanguageBatches, template: str, means: dict) -> dict:
    """What a later reader must know of the data, and hashes that tell whether it is still the same."""
    paths = [path for path, _ in read_mixture(data.texts)] + ([as_path(data.slides)] if data.slides else [])
    hashes = {str(path): hashlib.sha256(read_bytes(path)).hexdigest() for path in paths}
    facts = {"encoder": records.encoder, "patch_slots": training.patch_slots, "length": training.length}
    hashes = {"texts": sorted(hashes.values()), "records": manifest_hash(records)}
    return facts | cut_facts(records) | {"template": template, "hashes": hashes, fingerprints.MEANINGS: means}


def _make_validation(stage: Stage, build: Callable, batches: LanguageBatches, mesh) -> Callable:
    """validate(learned, frozen, mark) -> the mean loss of all response tokens of the split, without dropout."""

    def measure(learned: Params, frozen: Params, batch, features):
        found = stage.encode(build(learned, frozen), look_up(batch, features), None)
        return found["loss"].sum(), found["tokens"].sum()

    measured = over_batches(measure, batches, mesh)

    def validate(learned: Params, frozen: Params, mark: Mark) -> dict[str, float]:
        losses, tokens = (np.sum(x) for x in zip(*measured(learned, frozen, mark), strict=True))
        return {f"{VALIDATION}loss": float(losses / tokens), f"{VALIDATION}response_tokens": float(tokens)}

    return validate
