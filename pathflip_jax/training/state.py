"""Initial state of a run's loop: its newest intact checkpoint, or step 0."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from pathflip_jax.model.parameters import Params
from pathflip_jax.runs.checkpoints import Checkpoints
from pathflip_jax.runtime import sharding
from pathflip_jax.training.optim import exchange
from pathflip_jax.training.stage import Training


class State(NamedTuple):
    """Completed steps, trained and frozen parameters, optimizer state, and the best checkpoint so far."""

    step: int
    learned: Params
    frozen: Params
    opt_state: Any
    best: dict | None


def begin(
    training: Training,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    steps: int,
    phase: Callable[[str, int], None],
) -> State:
    """State of the newest intact checkpoint, else the initial state of a run of `steps` steps.

    Shapes and shardings are derived first, so that nothing is computed that a checkpoint holds. `phase` is called on
    entering each phase.
    """
    shapes = training.shapes
    shardings = sharding.infer_shardings(mesh, shapes)
    learns = {name for name in shapes if training.stage.trainable(name)}
    opt_shapes = jax.eval_shape(optimizer.init, {name: shapes[name] for name in learns})
    opt_shardings = sharding.infer_shardings(mesh, opt_shapes)

    def placed(shapes, shardings):
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)

    phase("reading the checkpoint", 0)
    wanted = training.checkpointed(placed(shapes, shardings)), placed(opt_shapes, opt_shardings)
    found = checkpoints.restore(*wanted, before=steps)
    phase("initialising the parameters", found[0] if found else 0)
    saved = found[1] if found else {}
    params = saved if len(saved) == len(shapes) else training.initial(shardings) | saved
    learned = {name: x for name, x in params.items() if name in learns}
    frozen = {name: x for name, x in params.items() if name not in learns}
    if not found:
        return State(0, learned, frozen, jax.jit(optimizer.init, out_shardings=opt_shardings)(learned), None)
    step, _, opt_state, facts = found
    if facts["best"] and facts["best"]["step"] == step:  # a process may end between the two saves
        checkpoints.save_best(step, saved, {"best": facts["best"]})
    if jax.process_index() == 0:
        print(f"{checkpoints.workdir}: resuming from step {step}", file=sys.stderr)
    learned, opt_state = exchange(learned, opt_state)
    return State(step, learned, frozen, opt_state, facts["best"])
