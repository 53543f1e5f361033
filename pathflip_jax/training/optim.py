"""AdamW with warm-up and cosine decay, and the released code's variant (DESIGN section 6)."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pathflip_jax.model.parameters import Params
from pathflip_jax.settings.sections import OptimConfig

# Biases, LayerNorm scales and the scalars of the region loss have no weight decay.
NO_DECAY = re.compile(r"(^|/)(bias|scale|logit_scale|logit_bias)$")


def learning_rate(config: OptimConfig, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up, then half-cosine decay to the final rate: per step, or per epoch as in the released code."""
    warmup = config.warmup_steps
    if config.preset == "released":
        warmup = min(warmup, steps_per_epoch)
    low, high, last = config.warmup_learning_rate, config.learning_rate, config.final_learning_rate

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = low + (high - low) * step / max(warmup, 1)
        if config.preset == "released":
            epochs = -(-steps // steps_per_epoch)
            done = jnp.floor(step / steps_per_epoch) / epochs
        else:
            done = (step - warmup) / max(steps - warmup, 1)
        falling = last + (high - last) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def decays(config: OptimConfig, params: dict[str, jax.Array]) -> dict[str, bool]:
    """Weight decay mask over parameters, by name."""
    return {name: config.preset == "released" or NO_DECAY.search(name) is None for name in params}


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Global-norm clipping followed by AdamW, over a flat dict of parameters."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: decays(config, params),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw
    return with_average(optimizer, config.weight_average) if config.weight_average else optimizer


class AveragedState(NamedTuple):
    """Optimizer state with a second set of weights: the average while training, the trained weights in a checkpoint."""

    count: jax.Array
    weights: Params
    inner: Any


def with_average(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Optimizer that also keeps an exponential moving average of the weights, of `decay` per step.

    In the first steps the decay is (1 + n) / (10 + n), so that the random weights of the start are soon forgotten.
    """

    def init(params: Params) -> AveragedState:
        return AveragedState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

    def update(gradients: Params, state: AveragedState, params: Params) -> tuple[Params, AveragedState]:
        updates, inner = optimizer.update(gradients, state.inner, params)
        now = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        average = optax.incremental_update(optax.apply_updates(params, updates), state.weights, 1 - now)
        return updates, AveragedState(state.count + 1, average, inner)

    return optax.GradientTransformation(init, update)


def exchange(learned: Params, opt_state: Any) -> tuple[Params, Any]:
    """Weights to validate and to save with the state that belongs beside them; its own inverse.

    With an average of weights it takes the place of the trained weights, which move into the state; otherwise both
    stay as they are.
    """
    if not isinstance(opt_state, AveragedState):
        return learned, opt_state
    return opt_state.weights, opt_state._replace(weights=learned)


def scheduled_optimizer(
    config: OptimConfig, steps: int, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Learning rate schedule of a run of `steps` steps, and the optimizer that uses it."""
    schedule = learning_rate(config, steps, steps_per_epoch)
    return schedule, make_optimizer(config, schedule)
