"""The alignment stage as the training loop takes it: model, data, start, validation, from a config."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from pathflip_jax.data.batches.checks import require_negatives
from pathflip_jax.losses.pathflip import LossConfig, Spread, pair_bytes
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig, pairs_bytes
from pathflip_jax.model import families
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.flops import useful_operations
from pathflip_jax.model.parameters import AlignmentModel, Params, abstract_params, flatten, make_model, unflatten
from pathflip_jax.runs import files
from pathflip_jax.runtime import memory, sharding
from pathflip_jax.training import settings
from pathflip_jax.training.data import open_data, say_counts
from pathflip_jax.training.objectives import alignment, sigmoid_alignment
from pathflip_jax.training.optim import OptimConfig
from pathflip_jax.training.stage import Stage, Training
from pathflip_jax.training.validation import MEASURED, make_validation, require_score


def alignment_training(config: ConfigDict, mesh: jax.sharding.Mesh, begun_groups: int = 0) -> Training:
    """Slides against captions, regions against subcaptions; `begun_groups` as in `open_data`.

    Raises ValueError and OSError for settings and data that cannot be used, with the cure.
    """
    losses = [f"loss_{part}" for part in ("slide", "region") if config.loss[f"{part}_weight"]]
    if not losses:
        raise ValueError("loss.slide_weight and loss.region_weight are both 0, so there is nothing to learn: set one")
    require_score(config.train.select, (*MEASURED, *losses))
    family = family_of(config)
    data = open_data(config, sharding.batch_shards(mesh), sharding.own_shards(mesh), begun_groups)
    say_counts(data.facts, data.validation is not None)
    if not family.negatives_within(config):
        require_negatives(data.train)
    model = model_config(config, data.facts["feature_dim"], data.tokenizer.vocab_size)
    resolved = config.to_dict()
    resolved["data"] |= data.facts
    resolved["model"] |= model.to_dict()
    stage = family.stage(config, model, sharding.by_slide(mesh))

    def build(learned: Params, frozen: Params) -> AlignmentModel:
        return unflatten(model, learned | frozen)

    return Training(
        stage=stage,
        shapes=abstract_params(model),
        build=build,
        initial=lambda places: initial_params(model, config.model.bert, config.train.seed, places),
        keeps=lambda name: True,
        batches=data.train,
        validate=make_validation(stage, build, data.validation, mesh) if data.validation else None,
        compute_dtype=config.model.compute_dtype,
        useful_operations=lambda batch: useful_operations(model, batch.patch_mask, batch.text_rows),
        require_room=lambda step: _require_room(step, config, model, sharding.batch_shards(mesh)),
        resolved=resolved,
        describe=lambda folder: files.describe_run(folder, model, resolved, data.tokenizer),
    )


class Family(NamedTuple):
    """What the families of models do not share in training: their stages, and what their losses compare.

    `negatives_within`: whether a slide by itself has all negatives that the losses of a config need.
    """

    stage: Callable[[ConfigDict, ModelConfig, Spread], Stage]
    pair_bytes: Callable[[ConfigDict, ModelConfig, int], int]
    negatives_within: Callable[[ConfigDict], bool]


def _pathflip_stage(config: ConfigDict, model: PathFLIPConfig, spread: Spread) -> Stage:
    return alignment(LossConfig(**config.loss), spread)


def _pathflip_pairs(config: ConfigDict, model: PathFLIPConfig, slides: int) -> int:
    sizes = config.train.batch_size, model.text_region_heads, config.data.regions
    return pair_bytes(LossConfig(**config.loss), slides, *sizes, model.embed_dim)


def _pathflip2_stage(config: ConfigDict, model: PathFLIP2Config, spread: Spread) -> Stage:
    if model.text_pooling == "mean_padded":
        raise ValueError(
            "model.text_pooling=mean_padded repeats what a published checkpoint computes, where padding counts; texts "
            "that are trained on are packed without: set mean or cls"
        )
    freeze = config.model.freeze_text_encoder

    def frozen(name: str) -> bool:
        return name.startswith("text_encoder/") and (freeze or model.text_lora_rank > 0) and "/lora/" not in name

    return sigmoid_alignment(SigmoidLossConfig(**config.loss), spread, frozen)


def _pathflip2_pairs(config: ConfigDict, model: PathFLIP2Config, slides: int) -> int:
    return pairs_bytes(SigmoidLossConfig(**config.loss), slides, config.train.batch_size, config.data.subcaptions)


def _pathflip2_within(config: ConfigDict) -> bool:
    """The loss over pairs takes the other subcaptions of a slide for negatives; the slide loss has none but slides."""
    return not config.loss.slide_weight and config.loss.region == "pairs" and config.data.subcaptions > 1


FAMILIES = {
    "pathflip": Family(_pathflip_stage, _pathflip_pairs, lambda config: False),
    "pathflip2": Family(_pathflip2_stage, _pathflip2_pairs, _pathflip2_within),
}


def family_of(config: ConfigDict) -> Family:
    """The family of a config's model. Raises ValueError for a name that is none."""
    name = config.model.get("family", "pathflip")
    if name not in FAMILIES:
        raise ValueError(f"model.family={name!r}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_config(config: ConfigDict, feature_dim: int = 512, vocab_size: int = 30523) -> ModelConfig:
    """The model's frozen config, its data-dependent sizes filled in. Raises ValueError where a given size disagrees.

    `vocab_size` counts `[DEC]`, which a PathFLIP2 does not have.
    """
    values = config.model.to_dict()
    for name in ("bert", "freeze_text_encoder"):
        values.pop(name, None)
    family = families.FAMILIES.get(values.get("family", PathFLIPConfig.family))
    words = vocab_size if family is None else vocab_size - 1 + family.added_words  # `from_dict` refuses another name
    for name, found in (("feature_dim", feature_dim), ("vocab_size", words)):
        values[name] = values[name] or found
    return ModelConfig.from_dict(values)


def check_config(name: str) -> int:
    """The number of parameters of a config's model; raises ValueError for what is wrong in it. Computes nothing."""
    config = settings.load_config(name)
    settings.check(config)
    OptimConfig(**config.optim)
    family_of(config)
    model = model_config(config)
    families.family_of(model).loss(**config.loss)
    return sum(math.prod(x.shape) for x in abstract_params(model).values())


def initial_params(model: ModelConfig, bert: str, seed: int, places: dict) -> Params:
    """Random parameters made where they live; with `bert`, what reads text starts from that Hugging Face folder."""
    make = jax.jit(lambda key: flatten(make_model(model, nnx.Rngs(key))), out_shardings=places)
    params = make(jax.random.key(seed))
    if bert:
        from pathflip_jax.convert.bert import bert_parameters

        params |= {name: jax.device_put(x, places[name]) for name, x in bert_parameters(bert, model).items()}
    return params


def _require_room(step, config: ConfigDict, model: ModelConfig, shards: int) -> None:
    """Raise MemoryError where a compiled step does not fit on a device, with the settings that would."""
    setup = config.train
    pairs = family_of(config).pair_bytes(config, model, setup.batch_size // shards)
    memory.check_step(step, setup.batch_size, setup.accumulate, model.remat, shards, pairs)
