"""AdamW with warm-up and cosine decay, and the released code's variant (DESIGN section 6)."""

import re

import jax
import jax.numpy as jnp
import optax

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
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def scheduled_optimizer(
    config: OptimConfig, steps: int, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Learning rate schedule of a run of `steps` steps, and the optimizer that uses it."""
    schedule = learning_rate(config, steps, steps_per_epoch)
    return schedule, make_optimizer(config, schedule)
