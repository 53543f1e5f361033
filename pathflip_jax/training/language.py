"""Language stage for the training loop: an aligner run projected into a decoder.

A run folder of this stage holds the trained parameters (projector, LoRA, ...), the tokenizer, and the names and hashes
of its two sources, from which frozen parameters are read again.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from pathflip_jax.convert.decoder import check_tokenizer, init_decoder, load_decoder
from pathflip_jax.convert.decoder_folders import read_decoder_config, weights_hash
from pathflip_jax.data.batches.patches import PatchSampler
from pathflip_jax.data.batches.pipeline import look_up
from pathflip_jax.data.records.records import Records, manifest_hash
from pathflip_jax.data.storage.files import as_path, read_bytes
from pathflip_jax.data.texts.cases import slides_of_case
from pathflip_jax.data.texts.conversations import Conversation, read_conversations, read_mixture
from pathflip_jax.inference.language_run import (
    Aligner,
    InitialParameters,
    describe_language_run,
    read_aligner,
    read_initial_parameters,
)
from pathflip_jax.llm.adapter import SlideLanguageModel, is_trained, split_names
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.llm.prompts import choose_template
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.model.parameters import Params, flatten
from pathflip_jax.monitoring.metrics import CHANCE, VALIDATION
from pathflip_jax.runtime import memory, sharding
from pathflip_jax.settings.kinds import LanguageSettings
from pathflip_jax.settings.networks import LanguageDataSettings, LanguageModelSettings
from pathflip_jax.training import fingerprints
from pathflip_jax.training.data import COUNTS, SplitSlides, count_slides, record_facts, report_counts, split_slides
from pathflip_jax.training.language_batches import (
    EmbeddedSlides,
    Example,
    LanguageBatches,
    collect_examples,
    read_embeddings,
    unigram_loss,
)
from pathflip_jax.training.language_objective import language_flops, language_stage
from pathflip_jax.training.stage import Stage, Training
from pathflip_jax.training.validation import Mark, measure_batches, require_score

log = logging.getLogger(__name__)


def language_training(settings: LanguageSettings, mesh: jax.sharding.Mesh, begun: Mapping[str, Any]) -> Training:
    """Language-stage training of the parts in `lm.trains`; the rest comes from aligner, decoder and `lm.start`.

    `begun` as in `stages.open_training`. Raises ValueError and OSError for unusable settings, folders and tables, with
    the cure.
    """
    lm, data = settings.lm, settings.data
    trains = split_names(lm.trains)
    stage = language_stage(trains)
    check_language_settings(settings)
    require_score(settings.train.select, ("loss",))
    records = Records(data.records)
    aligner, decoder_hash = read_aligner(lm.aligner, records, data.records), weights_hash(lm.decoder)
    decoder = read_decoder_config(lm.decoder, compute_dtype=lm.compute_dtype, remat=lm.remat)
    check_tokenizer(lm.decoder, decoder)
    tokenizer = DecoderTokenizer(lm.decoder)
    template = choose_template(tokenizer, data.template)
    started = read_initial_parameters(lm.start, lm.decoder, aligner.hash, decoder_hash) if lm.start else None
    lora = _lora(lm, trains, started)
    shape = Shape(aligner.model, decoder, lora, lm.dtype)

    split = split_slides(data, records, begun=bool(begun["data"]))
    mixture, means = _read_conversations(data, split, tokenizer)
    examples = _collect_examples(records, mixture, tokenizer, template, split, data)
    found = _read_embeddings(settings, records, examples, aligner.hash)
    training, validation = _make_batches(
        settings, records, examples, found, decoder.max_positions, sharding.shards_of(mesh)
    )
    resolved = settings.to_dict()
    resolved["data"] |= _facts(data, records, training, template, means)
    slides = [batches and batches.slides_of_examples(records) for batches in (training, validation)]
    resolved["data"][COUNTS] = count_slides(data, records, split, slides)
    report_counts(resolved["data"], validation is not None)
    resolved["lm"] |= {"aligner_hash": aligner.hash, "decoder_hash": decoder_hash}
    resolved["lm"] |= {"start_hash": started.hash if started else ""}

    def build(learned: Params, frozen: Params) -> SlideLanguageModel:
        return shape.build(learned | frozen)

    def check_memory(step) -> None:
        setup, shards = settings.train, sharding.batch_shards(mesh)
        memory.check_step(step, setup.batch_size, setup.accumulate, lm.remat, shards, 0, "lm")

    return Training(
        stage=stage,
        shapes=shape.abstract(stage.trainable),
        build=build,
        initial=lambda shardings: initial_parameters(settings, shape, aligner, started, shardings, mesh),
        is_checkpointed=stage.trainable,
        batches=training,
        validate=_make_validation(stage, build, validation, mesh, examples) if validation else None,
        compute_dtype=lm.compute_dtype,
        model_flops=language_flops(aligner.model, decoder, trains),
        check_memory=check_memory,
        resolved=resolved,
        describe=lambda folder: describe_language_run(folder, shape, resolved, tokenizer),
    )


def check_language_settings(settings: LanguageSettings) -> None:
    """Raise ValueError for invalid settings, independent of the content of their folders and without computation."""
    trains = split_names(settings.lm.trains)
    language_stage(trains)
    _lora(settings.lm, trains, None)
    if settings.data.embeddings and "aligner" in trains:
        raise ValueError("data.embeddings: the aligner cannot be trained on precomputed embeddings; leave it unset")
    if settings.lm.random_decoder and "decoder" not in trains:
        raise ValueError("lm.random_decoder: a randomly initialised decoder must be trained; add decoder to lm.trains")


def _lora(lm: LanguageModelSettings, trains: tuple[str, ...], started: "InitialParameters | None") -> LoRAConfig | None:
    """LoRA configuration of this run: that of the run it starts from, or from its settings; None without LoRA."""
    if "lora" not in trains:
        return None if started is None else started.lora
    lora = LoRAConfig(lm.lora_rank, lm.lora_alpha, lm.lora_dropout, split_names(lm.lora_targets))
    if started is not None and started.lora is not None:
        if {**vars(started.lora), "dropout": 0.0} != {**vars(lora), "dropout": 0.0}:
            raise ValueError(
                f"lm.start={lm.start}: its LoRA is {started.lora}, that of this config {lora}; set the same lm.lora_..."
            )
    return lora


def initial_parameters(
    settings: LanguageSettings, shape: Shape, aligner: Aligner, started: InitialParameters | None, shardings: dict, mesh
) -> Params:
    """All parameters, sharded: aligner and decoder as read, a random projector, overridden by those of `lm.start`."""
    lm, seed = settings.lm, settings.train.seed
    if lm.random_decoder:
        decoder = init_decoder(shape.decoder, seed, mesh=mesh, lora=shape.lora)
    else:
        decoder = load_decoder(
            lm.decoder, dtype=shape.dtype, compute_dtype=lm.compute_dtype, mesh=mesh, lora=shape.lora
        )
    params = {f"decoder/{name}": x for name, x in flatten(decoder).items()}
    read = {f"aligner/{name}": x for name, x in aligner.params.items()}
    params |= {name: jax.device_put(x, shardings[name]) for name, x in read.items()}
    projector = {name: shardings[name] for name in shardings if name.startswith("projector/")}
    params |= jax.jit(shape.projector, out_shardings=projector)(jax.random.key(seed))
    wanted = shape.abstract(is_trained(split_names(lm.trains)))
    cast = {name: x.astype(wanted[name].dtype) for name, x in params.items()}
    started_params = {} if started is None else started.params
    return cast | {name: jax.device_put(x, shardings[name]) for name, x in started_params.items()}


class _Examples(NamedTuple):
    """Examples for training, and held-out examples."""

    training: list[Example]
    held_out: list[Example]


def _read_conversations(
    data: LanguageDataSettings, split: SplitSlides, tokenizer: DecoderTokenizer
) -> tuple[list[tuple[list[Conversation], int]], dict]:
    """Conversations of each table, matched to slides, with their weights in the mixture and their hashes."""
    mixture = [(read_conversations(path), times) for path, times in read_mixture(data.texts)]
    means = {"texts": fingerprints.conversations(mixture), "times": [times for _, times in mixture]}
    means["tokenizer"] = fingerprints.tokenizer(tokenizer.described)
    if split.table:
        means["slides"] = fingerprints.slide_rows(split.table.rows.values())
        of_case = slides_of_case(split.table.rows.values())
        mixture = [([talk._replace(slide_ids=talk.slide_ids or of_case(talk.case_id)) for talk in talks], times)
                   for talks, times in mixture]  # fmt: skip
    return mixture, means


def _collect_examples(
    records: Records, mixture: list, tokenizer: DecoderTokenizer, template: str, split: SplitSlides,
    data: LanguageDataSettings,
) -> _Examples:  # fmt: skip
    """Examples of both splits; held-out ones once each, with their sentences in the original order."""
    training = collect_examples(records, mixture, tokenizer, template, split.training, data.sentence_orders)
    if not split.validation:
        return _Examples(training, [])
    once = [(conversations, 1) for conversations, _ in mixture]
    return _Examples(training, collect_examples(records, once, tokenizer, template, split.validation))


def _read_embeddings(settings: LanguageSettings, records: Records, examples: _Examples, aligner_hash: str):
    """Precomputed embeddings of all slides, from `data.embeddings`; None if it is not set."""
    if not settings.data.embeddings:
        return None
    every = [*examples.training, *examples.held_out]
    return read_embeddings(settings.data.embeddings, records, every, settings.lm.aligner, aligner_hash)


def _make_batches(
    settings: LanguageSettings, records: Records, examples: _Examples, found, positions: int, shards: sharding.Shards
) -> tuple[LanguageBatches, LanguageBatches | None]:
    """Batches of training and validation, from slides' patches or from their precomputed rows in `found`."""
    data, size = settings.data, settings.train.batch_size
    if found is not None:
        slides = [EmbeddedSlides(found, data.regions)] * 2
    else:
        slots = data.patch_slots or max(int(example.regions.count.max()) for example in examples.training)
        slides = [PatchSampler(records, data.regions, slots, data.threads) for _ in range(2)]
    shared = {"shards": shards, "most_positions": positions}
    training = LanguageBatches(examples.training, slides[0], data, size, seed=settings.train.seed, **shared)
    validation = None
    if examples.held_out:
        shown = replace(data, no_slide_share=0.0)
        validation = LanguageBatches(examples.held_out, slides[1], shown, size, seed=None, **shared)
    for batches in (training, validation):
        if batches is not None and data.resident:
            batches.load(on_device=data.resident == "device")
    return training, validation


def _facts(data: LanguageDataSettings, records: Records, training: LanguageBatches, template: str, means: dict) -> dict:
    """Facts about the data for later readers of the run, with hashes that detect changes."""
    paths = [path for path, _ in read_mixture(data.texts)] + ([as_path(data.slides)] if data.slides else [])
    hashes = {str(path): hashlib.sha256(read_bytes(path)).hexdigest() for path in paths}
    facts = {"encoder": records.encoder, "patch_slots": training.patch_slots, "length": training.length}
    hashes = {"texts": sorted(hashes.values()), "records": manifest_hash(records)}
    return facts | record_facts(records) | {"template": template, "hashes": hashes, fingerprints.MEANINGS: means}


def _make_validation(stage: Stage, build: Callable, batches: LanguageBatches, mesh, examples: _Examples) -> Callable:
    """validate(learned, frozen, mark) -> mean loss over all response tokens of the split, without dropout.

    Its chance level is the loss of guessing tokens by their frequency in the training responses.
    """
    chance = unigram_loss(examples.training, examples.held_out)

    def measure(learned: Params, frozen: Params, batch, features):
        found = stage.encode(build(learned, frozen), look_up(batch, features), None)
        return found["loss"].sum(), found["tokens"].sum()

    measured = measure_batches(measure, batches, mesh)

    def validate(learned: Params, frozen: Params, mark: Mark) -> dict[str, float]:
        losses, tokens = (np.sum(x) for x in zip(*measured(learned, frozen, mark), strict=True))
        loss = f"{VALIDATION}loss"
        return {loss: float(losses / tokens), loss + CHANCE: chance, f"{VALIDATION}response_tokens": float(tokens)}

    return validate
