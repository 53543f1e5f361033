"""Stages of training as the loop takes them: how a batch becomes embeddings, what is asked of them, which parameters
learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pathflip_jax.model.parameters import Key, Params


class Stage(NamedTuple):
    """The parts of training that differ between stages; the loop is the same for all.

    encode(model, batch, key) -> embeddings: float arrays whose leading axis is the batch; key None: no dropout.
    objective(model, embeddings, batch, key) -> (loss, metrics by name).
    trainable(name) -> whether the parameter of that name learns.
    """

    encode: Callable[[Any, Any, Key | None], Any]
    objective: Callable[[Any, Any, Any, Key], tuple[jax.Array, dict[str, jax.Array]]]
    trainable: Callable[[str], bool]


class Training(NamedTuple):
    """All that a run of a stage brings to the loop (`training.loop.fit`).

    `shapes` are all parameters by name; `initial(shardings)` makes them where they live. Checkpoints hold those that
    `is_checkpointed(name)`: what is frozen and was read from elsewhere is read from there again. `batches` are a
    function of the step (as `data.batches.pipeline.Batches`); one of the scores that `validate(learned, frozen, mark)`
    returns chooses the best checkpoint, and `mark(doing)` says where it is, in words of `monitors.PHASES`.
    `model_flops(batch)` counts inside of a compiled step; `check_memory(step)` raises MemoryError for one that does not
    fit. `resolved` are all settings and facts of the data, `describe(folder)` writes what a run folder holds beside its
    checkpoints.
    """

    stage: Stage
    shapes: dict[str, jax.ShapeDtypeStruct]
    build: Callable[[Params, Params], Any]
    initial: Callable[[dict[str, Any]], Params]
    is_checkpointed: Callable[[str], bool]
    batches: Any
    validate: Callable[[Params, Params, Callable[[str], None]], dict[str, float]] | None
    compute_dtype: str
    model_flops: Callable[[Any], jax.Array]
    check_memory: Callable[[Any], None]
    resolved: dict
    describe: Callable[[Path], None]

    def checkpointed(self, params: dict[str, Any]) -> dict[str, Any]:
        """Those of these parameters that a checkpoint holds."""
        return {name: x for name, x in params.items() if self.is_checkpointed(name)}
