"""Stages of training as the loop takes them: how a batch becomes embeddings, what is asked of them, which parameters
learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pathflip_jax.model.parameters import Key, Params


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
