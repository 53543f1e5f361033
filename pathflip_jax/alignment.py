"""The alignment stage as the training loop takes it: model, data, start, validation, from a config."""

import math

import jax
from flax import nnx
from ml_collections import ConfigDict

from pathflip_jax import checkpoint, memory, settings, sharding
from pathflip_jax.losses import LossConfig, pair_bytes
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.flops import useful_operations
from pathflip_jax.model.pathflip import PathFLIP, abstract_params, flatten, unflatten
from pathflip_jax.optim import OptimConfig
from pathflip_jax.run_data import open_data
from pathflip_jax.stage import Params, Training, alignment
from pathflip_jax.validation import MEASURED, make_validation, require_score


def alignment_training(config: ConfigDict, mesh: jax.sharding.Mesh, begun_groups: int = 0) -> Training:
    """Slides against captions, regions against subcaptions; `begun_groups` as in `open_data`.

    Raises ValueError and OSError for settings and data that cannot be used, with the cure.
    """
    losses = [f"loss_{part}" for part in ("slide", "region") if config.loss[f"{part}_weight"]]
    if not losses:
        raise ValueError("loss.slide_weight and loss.region_weight are both 0, so there is nothing to learn: set one")
    require_score(config.train.select, (*MEASURED, *losses))
    data = open_data(config, sharding.batch_shards(mesh), sharding.own_shards(mesh), begun_groups)
    model = model_config(config, data.facts["feature_dim"], data.tokenizer.vocab_size)
    resolved = config.to_dict()
    resolved["data"] |= data.facts
    resolved["model"] |= model.to_dict()
    stage = alignment(LossConfig(**config.loss), sharding.by_slide(mesh))

    def build(learned: Params, frozen: Params) -> PathFLIP:
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
        describe=lambda folder: checkpoint.describe_run(folder, model, resolved, data.tokenizer),
    )


def model_config(config: ConfigDict, feature_dim: int = 512, vocab_size: int = 30523) -> PathFLIPConfig:
    """The model's frozen config, its data-dependent sizes filled in. Raises ValueError where a given size disagrees."""
    values = config.model.to_dict()
    values.pop("bert")
    for name, found in (("feature_dim", feature_dim), ("vocab_size", vocab_size)):
        values[name] = values[name] or found
    return PathFLIPConfig.from_dict(values)


def check_config(name: str) -> int:
    """The number of parameters of a config's model; raises ValueError for what is wrong in it. Computes nothing."""
    config = settings.load_config(name)
    OptimConfig(**config.optim), LossConfig(**config.loss)
    return sum(math.prod(x.shape) for x in abstract_params(model_config(config)).values())


def initial_params(model: PathFLIPConfig, bert: str, seed: int, places: dict) -> Params:
    """Random parameters made where they live; with `bert`, the Q-Former starts from that Hugging Face folder."""
    make = jax.jit(lambda key: flatten(PathFLIP(model, nnx.Rngs(key))), out_shardings=places)
    params = make(jax.random.key(seed))
    if bert:
        from pathflip_jax.convert.bert import bert_parameters

        params |= {name: jax.device_put(x, places[name]) for name, x in bert_parameters(bert, model).items()}
    return params


def _require_room(step, config: ConfigDict, model: PathFLIPConfig, shards: int) -> None:
    """Raise MemoryError where a compiled step does not fit on a device, with the settings that would."""
    setup, loss = config.train, LossConfig(**config.loss)
    sizes = setup.batch_size // shards, setup.batch_size, model.text_region_heads, config.data.regions
    pairs = pair_bytes(loss, *sizes, model.embed_dim)
    memory.check_step(step, setup.batch_size, setup.accumulate, model.remat, shards, pairs)
