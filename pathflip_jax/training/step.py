"""Training step for any stage, exact under gradient accumulation.

Contrastive losses couple all slides of a batch, so gradients of microbatches cannot simply be summed: embeddings are
computed first, then the loss and its gradient with respect to them over the whole batch, then each microbatch again
with that gradient backpropagated through it (as in GradCache, arXiv 2101.06983). The result is exact.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pathflip_jax.model.parameters import Key, Params
from pathflip_jax.training.stage import Stage


def text_groups(batch: Any) -> int:
    """Number of text groups in a batch: the shortest leading axis, that of packed texts."""
    return min(len(x) for x in jax.tree.leaves(batch))


def split(tree: Any, accumulate: int, groups: int) -> Any:
    """Cut arrays [n, ...] into microbatches [accumulate, n / accumulate, ...].

    Texts are packed by group of slides, so groups stay intact: microbatch a takes groups a, a + accumulate, ... The
    assignment of slides to microbatches then depends neither on the devices nor on the sharding of the batch, and no
    slide moves between devices.
    """

    def cut(x):
        x = x.reshape(groups // accumulate, accumulate, len(x) // groups, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(accumulate, -1, *x.shape[3:])

    return jax.tree.map(cut, tree)


def join(tree: Any, groups: int) -> Any:
    """Inverse of `split`."""

    def glue(x):
        accumulate, size, *rest = x.shape
        x = x.reshape(accumulate, groups // accumulate, accumulate * size // groups, *rest)
        return x.swapaxes(0, 1).reshape(accumulate * size, *rest)

    return jax.tree.map(glue, tree)


def loss_and_gradients(
    stage: Stage, build: Callable[[Params], Any], params: Params, batch: Any, key: Key, accumulate: int = 1
):
    """((loss, metrics), gradients) over the whole batch, computed in `accumulate` microbatches.

    `build` makes the model from the trainable parameters. Memory is that of one microbatch plus all embeddings; the
    extra cost is one forward pass.
    """
    encode_key, objective_key = jax.random.split(key)

    def encode(params: Params, part: Any, number: jax.Array):
        return stage.encode(build(params), part, jax.random.fold_in(encode_key, number))

    def objective(params: Params, embeddings: Any):
        return stage.objective(build(params), embeddings, batch, objective_key)

    if accumulate == 1:
        return jax.value_and_grad(lambda p: objective(p, encode(p, batch, 0)), has_aux=True)(params)

    groups = text_groups(batch)
    micro, numbers = split(batch, accumulate, groups), jnp.arange(accumulate)
    parts = jax.lax.map(lambda x: encode(params, *x), (micro, numbers))
    value_and_grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    value, (gradients, cotangents) = value_and_grad(params, join(parts, groups))

    def pull_back(total: Params, x):
        part, number, cotangent = x
        _, vjp = jax.vjp(lambda p: encode(p, part, number), params)  # the same key, hence the same dropout
        return jax.tree.map(jnp.add, total, vjp(cotangent)[0]), None

    gradients, _ = jax.lax.scan(pull_back, gradients, (micro, numbers, split(cotangents, accumulate, groups)))
    return value, gradients


def make_step(
    stage: Stage,
    build: Callable[[Params, Params], Any],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int,
    seed: int,
) -> Callable:
    """step(params, frozen, opt_state, batch, number) -> (params, opt_state, metrics).

    Dropout and sampled negatives are a function of (seed, number), independent of the devices.
    """

    def step(params: Params, frozen: Params, opt_state: Any, batch: Any, number: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), number)
        (_, metrics), gradients = loss_and_gradients(stage, lambda p: build(p, frozen), params, batch, key, accumulate)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(number)}
            return optax.apply_updates(params, updates), opt_state, metrics

    return step
