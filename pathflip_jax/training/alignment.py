"""Alignment stage for the training loop: model, data, initialisation and validation from its settings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pathflip_jax.data.batches.checks import require_negatives
from pathflip_jax.losses.pathflip import ShardMap, pair_bytes
from pathflip_jax.losses.pathflip2 import pairs_bytes
from pathflip_jax.model import families
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.flops import model_flops
from pathflip_jax.model.parameters import AlignmentModel, Params, abstract_params, flatten, make_model, unflatten
from pathflip_jax.runs import files
from pathflip_jax.runtime import memory, sharding
from pathflip_jax.settings.kinds import AlignmentSettings
from pathflip_jax.training.augment import Augmentation
from pathflip_jax.training.data import open_data, report_counts
from pathflip_jax.training.objectives import alignment, sigmoid_alignment
from pathflip_jax.training.stage import Stage, Training
from pathflip_jax.training.validation import MEASURED, make_validation, require_score


def alignment_training(settings: AlignmentSettings, mesh: jax.sharding.Mesh, begun: Mapping[str, Any]) -> Training:
    """Training of slide-caption and region-subcaption alignment; `begun` as in `stages.open_training`.

    Raises ValueError and OSError for unusable settings and data, with the cure.
    """
    weights = {"loss_slide": settings.loss.slide_weight, "loss_region": settings.loss.region_weight}
    losses = [name for name, weight in weights.items() if weight]
    if not losses:
        raise ValueError(
            "loss.slide_weight and loss.region_weight are both 0, so there is no loss to train on: set one"
        )
    require_score(settings.train.select, (*MEASURED, *losses))
    family = family_of(settings)
    data = open_data(settings, sharding.shards_of(mesh), begun["data"].get("text_groups", 0))
    report_counts(data.facts, data.validation is not None)
    if not family.negatives_within(settings):
        require_negatives(data.train)
    model = model_config(settings, data.facts["feature_dim"], data.tokenizer.vocab_size)
    resolved = settings.to_dict()
    resolved["data"] |= data.facts
    resolved["model"] |= model.to_dict()
    stage = family.stage(settings, model, sharding.shard_by_slide(mesh))

    def build(learned: Params, frozen: Params) -> AlignmentModel:
        return unflatten(model, learned | frozen)

    def initial(shardings: dict) -> Params:
        params = initial_params(model, settings.model.bert, settings.train.seed, shardings)
        return standardise(params, data.train.sample_features()) if settings.data.standardise else params

    return Training(
        stage=stage,
        shapes=abstract_params(model),
        build=build,
        initial=initial,
        is_checkpointed=lambda name: True,
        batches=data.train,
        validate=make_validation(stage, build, data.validation, mesh) if data.validation else None,
        compute_dtype=settings.model.compute_dtype,
        model_flops=lambda batch: model_flops(model, batch.patch_mask, batch.text_rows),
        check_memory=lambda step: _check_memory(step, settings, model, sharding.batch_shards(mesh)),
        resolved=resolved,
        describe=lambda folder: files.describe_run(folder, model, resolved, data.tokenizer),
    )


class Family(NamedTuple):
    """Training-specific parts of a model family: its stage, and the memory of the pairs that its losses compare.

    `negatives_within`: whether a single slide provides all negatives that the losses need.
    """

    stage: Callable[[AlignmentSettings, ModelConfig, ShardMap], Stage]
    pair_bytes: Callable[[AlignmentSettings, ModelConfig, int], int]
    negatives_within: Callable[[AlignmentSettings], bool]


def _augmentation(settings: AlignmentSettings) -> Augmentation:
    return Augmentation(settings.data.feature_dropout, settings.data.feature_noise)


def _pathflip_stage(settings: AlignmentSettings, model: PathFLIPConfig, shard_map: ShardMap) -> Stage:
    return alignment(settings.loss, shard_map, _augmentation(settings))


def _pathflip_pairs(settings: AlignmentSettings, model: PathFLIPConfig, slides: int) -> int:
    sizes = settings.train.batch_size, model.text_region_heads, settings.data.regions
    return pair_bytes(settings.loss, slides, *sizes, model.embed_dim)


def _pathflip2_stage(settings: AlignmentSettings, model: PathFLIP2Config, shard_map: ShardMap) -> Stage:
    if model.text_pooling == "mean_padded":
        raise ValueError(
            "model.text_pooling=mean_padded reproduces a published checkpoint, whose mean includes padding; in "
            "training, texts are packed without padding: set model.text_pooling to mean or cls"
        )
    freeze = settings.model.freeze_text_encoder

    def frozen(name: str) -> bool:
        return name.startswith("text_encoder/") and (freeze or model.text_lora_rank > 0) and "/lora/" not in name

    return sigmoid_alignment(settings.loss, shard_map, frozen, _augmentation(settings))


def _pathflip2_pairs(settings: AlignmentSettings, model: PathFLIP2Config, slides: int) -> int:
    return pairs_bytes(settings.loss, slides, settings.train.batch_size, settings.data.subcaptions)


def _pathflip2_within(settings: AlignmentSettings) -> bool:
    """Whether a slide provides its own negatives: other subcaptions in the pair loss; the slide loss needs slides."""
    return not settings.loss.slide_weight and settings.loss.region == "pairs" and settings.data.subcaptions > 1


FAMILIES = {
    "pathflip": Family(_pathflip_stage, _pathflip_pairs, lambda settings: False),
    "pathflip2": Family(_pathflip2_stage, _pathflip2_pairs, _pathflip2_within),
}


def family_of(settings: AlignmentSettings) -> Family:
    """Model family of a run."""
    return FAMILIES[settings.model.family]


def model_config(settings: AlignmentSettings, feature_dim: int = 512, vocab_size: int = 30523) -> ModelConfig:
    """Frozen model config with its data-dependent sizes filled in. Raises ValueError if a given size disagrees.

    `vocab_size` counts `[DEC]`, which PathFLIP2 does not have.
    """
    values = asdict(settings.model)
    for name in ("bert", "freeze_text_encoder"):
        values.pop(name, None)
    words = vocab_size - 1 + families.FAMILIES[settings.model.family].added_words
    for name, found in (("feature_dim", feature_dim), ("vocab_size", words)):
        values[name] = values[name] or found
    return ModelConfig.from_dict(values)


def count_parameters(settings: AlignmentSettings) -> int:
    """Parameter count of a run's model, without computation; ValueError for sizes that contradict each other."""
    return sum(math.prod(x.shape) for x in abstract_params(model_config(settings)).values())


def initial_params(model: ModelConfig, bert: str, seed: int, shardings: dict) -> Params:
    """Random parameters, created sharded; with `bert`, the text encoder is initialised from a Hugging Face folder."""
    make = jax.jit(lambda key: flatten(make_model(model, nnx.Rngs(key))), out_shardings=shardings)
    params = make(jax.random.key(seed))
    if bert:
        from pathflip_jax.convert.bert import bert_parameters

        params |= {name: jax.device_put(x, shardings[name]) for name, x in bert_parameters(bert, model).items()}
    return params


def standardise(params: Params, features: Float[np.ndarray, "N F"]) -> Params:
    """Parameters whose patch projection standardises features before it projects them.

    The mean and standard deviation of each feature over `features` are absorbed by the first layer: the network stays
    what it is. A constant feature is only centred.
    """
    kernel, bias = "patch_projection/linear/kernel", "patch_projection/linear/bias"
    mean, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    spread[spread < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0

    def absorbed(weights: Array, offset: Array) -> tuple[Array, Array]:
        scaled = weights / spread[:, None].astype(np.float32)
        return scaled, offset - mean.astype(np.float32) @ scaled

    places = params[kernel].sharding, params[bias].sharding
    scaled, moved = jax.jit(absorbed, out_shardings=places)(params[kernel], params[bias])
    return params | {kernel: scaled, bias: moved}


def _check_memory(step, settings: AlignmentSettings, model: ModelConfig, shards: int) -> None:
    """Raise MemoryError if a compiled step does not fit on a device, with settings that would make it fit."""
    setup = settings.train
    pairs = family_of(settings).pair_bytes(settings, model, setup.batch_size // shards)
    memory.check_step(step, setup.batch_size, setup.accumulate, model.remat, shards, pairs)
