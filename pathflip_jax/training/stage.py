"""Training stages as seen by the loop: the embeddings of a batch, the objective on them, and the trainable
parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pathflip_jax.model.parameters import Key, Params


class Stage(NamedTuple):
    """Stage-specific parts of training; the loop is the same for all.

    encode(model, batch, key) -> embeddings: float arrays whose leading axis is the batch; key None: no dropout.
    objective(model, embeddings, batch, key) -> (loss, metrics by name).
    trainable(name) -> whether the parameter of that name learns.
    """

    encode: Callable[[Any, Any, Key | None], Any]
    objective: Callable[[Any, Any, Any, Key], tuple[jax.Array, dict[str, jax.Array]]]
    trainable: Callable[[str], bool]


class Training(NamedTuple):
    """Complete input of the loop for a run of a stage (`training.loop.fit`).

    `shapes` are all parameters by name; `initial(shardings)` creates them sharded. Checkpoints hold those for which
    `is_checkpointed(name)`: frozen parameters from another source are read from there again. `batches` are a function
    of the step (as `data.batches.pipeline.Batches`); one of the scores returned by `validate(learned, frozen, mark)`
    selects the best checkpoint, and `mark(doing)` enters one of `monitors.PHASES`. `model_flops(batch)` counts inside a
    compiled step; `check_memory(step)` raises MemoryError for one that does not fit. `resolved` holds all settings and
    facts of the data, `describe(folder)` writes the files of a run folder other than its checkpoints.
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
        """Subset of the parameters that a checkpoint holds."""
        return {name: x for name, x in params.items() if self.is_checkpointed(name)}
