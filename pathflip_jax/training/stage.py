"""A training step for any stage, exact under gradient accumulation.

A stage says how a batch becomes embeddings, what is asked of the embeddings of the whole batch, and which parameters
learn. Contrastive losses couple all slides of a batch, so gradients of microbatches cannot simply be summed: here
embeddings are computed first, the loss and its gradient with respect to them over the whole batch, then each
microbatch again with that gradient pulled back through it (as in GradCache, arXiv 2101.06983). The result is exact.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pathflip_jax.losses.pathflip import (
    Embeddings,
    LossConfig,
    Spread,
    alignment_loss,
    at_once,
    draw_negatives,
    region_loss,
    slide_loss,
)
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig, pair_loss, sigmoid_slide_loss
from pathflip_jax.model.parameters import AlignmentModel, Key, Params
from pathflip_jax.model.pathflip import PathFLIP, SlideEncoding
from pathflip_jax.model.pathflip2 import PathFLIP2


class Stage(NamedTuple):
    """What is particular to a stage of training; the loop is the same for all.

    encode(model, batch, key) -> embeddings: float arrays whose leading axis is the batch; key None: no dropout.
    objective(model, embeddings, batch, key) -> (loss, metrics by name).
    trainable(name) -> whether the parameter of that name learns.
    """

    encode: Callable[[Any, Any, Key | None], Any]
    objective: Callable[[Any, Any, Any, Key], tuple[jax.Array, dict[str, jax.Array]]]
    trainable: Callable[[str], bool]


class Training(NamedTuple):
    """All that a run of a stage brings to the loop (`training.loop.fit`).

    `shapes` are all parameters by name; `initial(places)` makes them where they live. Checkpoints hold those that
    `keeps(name)`: what is frozen and was read from elsewhere is read from there again. `batches` are a function of the
    step (as `data.batches.pipeline.Batches`); one of the scores that `validate(learned, frozen, mark)` returns chooses
    the best checkpoint, and `mark(doing, timed=True)` tells the watchdog where it is. `useful_operations(batch)` counts
    inside of a compiled step; `require_room(step)` raises MemoryError for one that does not fit. `resolved` are all
    settings and facts of the data, `describe(folder)` writes what a run folder holds beside its checkpoints.
    """

    stage: Stage
    shapes: dict[str, jax.ShapeDtypeStruct]
    build: Callable[[Params, Params], Any]
    initial: Callable[[dict[str, Any]], Params]
    keeps: Callable[[str], bool]
    batches: Any
    validate: Callable[[Params, Params, Callable[..., None]], dict[str, float]] | None
    compute_dtype: str
    useful_operations: Callable[[Any], jax.Array]
    require_room: Callable[[Any], None]
    resolved: dict
    describe: Callable[[Path], None]


def _encode(model: AlignmentModel, batch, key: Key | None) -> tuple[SlideEncoding, jax.Array, jax.Array]:
    """The slides of a batch, their captions [B, D] and their subcaptions [B, K, D]."""
    slide_key, text_key = (None, None) if key is None else jax.random.split(key)
    slides = model.encode_slides(batch.patches, batch.patch_mask, key=slide_key)
    B, C = batch.text_index.shape  # C = 1 + K: the caption, then its subcaptions
    index = batch.text_index.reshape(len(batch.text_rows[0].tokens), -1)  # [G, B/G * C]
    states = model.read_texts(batch.text_rows, index, key=text_key).reshape(B, C, -1)
    keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(text_key, 1))
    captions = model.project_texts(states[:, 0], "slide", key=keys[0])
    return slides, captions, model.project_texts(states[:, 1:], "region", key=keys[1])


def alignment(config: LossConfig, spread: Spread = at_once) -> Stage:
    """Slides against captions, regions against subcaptions (DESIGN section 4); every parameter learns.

    `spread` says how the slides of a batch lie on devices: `runtime.sharding.by_slide` on a mesh.
    """

    def encode(model: PathFLIP, batch, key: Key | None) -> dict[str, jax.Array]:
        slides, captions, subcaptions = _encode(model, batch, key)
        embeddings = {"slide": slides.slide, "regions": slides.regions}
        return embeddings | {"captions": captions, "subcaptions": subcaptions}

    def objective(model: PathFLIP, embeddings: dict[str, jax.Array], batch, key: Key):
        B, K, _ = embeddings["subcaptions"].shape
        return alignment_loss(
            Embeddings(region_mask=jnp.any(batch.patch_mask, axis=-1), wording=batch.wording, **embeddings),
            model.text_region,
            draw_negatives(key, B, K),
            batch.related,
            model.logit_scale[...],
            None if model.logit_bias is None else model.logit_bias[...],
            config,
            spread,
        )

    return Stage(encode, objective, lambda name: True)


def sigmoid_alignment(
    config: SigmoidLossConfig, spread: Spread = at_once, frozen: Callable[[str], bool] = lambda name: False
) -> Stage:
    """A PathFLIP2: slides against captions, patches against subcaptions; all but the `frozen` parameters learn.

    With the loss over pairs a text pools its own slide only, so patches need not leave their microbatch.
    """
    flair = LossConfig(normaliser="per_positive", negatives_at_once=config.slides_at_once or None)

    def encode(model: PathFLIP2, batch, key: Key | None) -> dict[str, jax.Array]:
        slides, captions, subcaptions = _encode(model, batch, key)
        embeddings = {"slide": slides.slide, "captions": captions, "subcaptions": subcaptions}
        if not config.region_weight:
            return embeddings
        if config.region == "flair":
            return embeddings | {"regions": slides.regions}
        pooled, _ = model.text_region(subcaptions, slides.regions, slides.region_mask)
        return embeddings | {"pooled": pooled}

    def objective(model: PathFLIP2, embeddings: dict[str, jax.Array], batch, key: Key):
        slides, captions, subcaptions = (embeddings[name] for name in ("slide", "captions", "subcaptions"))
        metrics, loss = {}, jnp.zeros(())
        if config.slide_weight:
            if config.slide == "infonce":
                options = {"temperature": config.temperature, "label_smoothing": config.label_smoothing}
                metrics["loss_slide"] = slide_loss(slides, captions, batch.related, **options)
            else:
                known = model.slide_scale[...], model.slide_bias[...]
                metrics["loss_slide"] = sigmoid_slide_loss(slides, captions, batch.related, *known)
            loss += config.slide_weight * metrics["loss_slide"]
        if config.region_weight:
            known = model.region_scale[...], model.region_bias[...]
            if config.region == "flair":
                B, K, _ = subcaptions.shape
                mask = batch.patch_mask.reshape(B, -1)
                given = Embeddings(slides, embeddings["regions"], mask, captions, subcaptions, batch.wording)
                negatives = draw_negatives(key, B, K)
                found, cosines = region_loss(given, model.text_region, negatives, batch.related, *known, flair, spread)
            else:
                found, cosines = pair_loss(
                    embeddings["pooled"], subcaptions, batch.related, *known, config, spread, batch.wording
                )
            metrics |= {"loss_region": found} | cosines
            loss += config.region_weight * found
        return loss, metrics | {"loss": loss}

    return Stage(encode, objective, lambda name: not frozen(name))


def text_groups(batch: Any) -> int:
    """How many groups of slides a batch is made of: the shortest leading axis, that of packed texts."""
    return min(len(x) for x in jax.tree.leaves(batch))


def split(tree: Any, accumulate: int, groups: int) -> Any:
    """Cut arrays [n, ...] into microbatches [accumulate, n / accumulate, ...].

    Texts are packed by group of slides, so whole groups go together: microbatch a takes groups a, a + accumulate, ...
    Which slides share a microbatch then depends neither on the devices nor on how the batch lies on them, and no
    slide moves between devices.
    """

    def cut(x):
        x = x.reshape(groups // accumulate, accumulate, len(x) // groups, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(accumulate, -1, *x.shape[3:])

    return jax.tree.map(cut, tree)


def join(tree: Any, groups: int) -> Any:
    """The inverse of `split`."""

    def glue(x):
        accumulate, size, *rest = x.shape
        x = x.reshape(accumulate, groups // accumulate, accumulate * size // groups, *rest)
        return x.swapaxes(0, 1).reshape(accumulate * size, *rest)

    return jax.tree.map(glue, tree)


def loss_and_gradients(
    stage: Stage, build: Callable[[Params], Any], params: Params, batch: Any, key: Key, accumulate: int = 1
):
    """((loss, metrics), gradients) over the whole batch, computed in `accumulate` microbatches.

    `build` makes the model of the trainable parameters. Memory is that of one microbatch and of all embeddings; time
    is one forward pass more than without accumulation.
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
    value, (gradients, pulls) = value_and_grad(params, join(parts, groups))

    def pull_back(total: Params, x):
        part, number, pull = x
        _, vjp = jax.vjp(lambda p: encode(p, part, number), params)  # the same key: the same dropout
        return jax.tree.map(jnp.add, total, vjp(pull)[0]), None

    gradients, _ = jax.lax.scan(pull_back, gradients, (micro, numbers, split(pulls, accumulate, groups)))
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

    Dropout and the negatives drawn are a function of (seed, number), whatever the devices.
    """

    def step(params: Params, frozen: Params, opt_state: Any, batch: Any, number: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), number)
        (_, metrics), gradients = loss_and_gradients(stage, lambda p: build(p, frozen), params, batch, key, accumulate)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(number)}
            return optax.apply_updates(params, updates), opt_state, metrics

    return step
