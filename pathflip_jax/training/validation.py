"""Validation during a run: losses and retrieval on held-out slides, and the choice of the best checkpoint."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pathflip_jax.data.batches.pipeline import Batches, look_up
from pathflip_jax.model.parameters import Params
from pathflip_jax.monitoring.metrics import CHANCE, STDERR, VALIDATION
from pathflip_jax.runtime import memory, sharding
from pathflip_jax.settings.sections import TrainSettings
from pathflip_jax.training.stage import Stage

if TYPE_CHECKING:
    from pathflip_jax.scores.retrieval import Ranks

Mark = Callable[[str], None]  # enters a phase of the validation (`training.monitors.PHASES`)
RECALLS = (1, 5)
MEASURED = (*(f"recall_at_{k}" for k in RECALLS), "mean_reciprocal_rank", "loss")


def require_score(select: str, measured: Sequence[str]) -> None:
    """Raise ValueError if `train.select` is not among the scores that a validation measures."""
    names = [VALIDATION + name for name in measured]
    if select not in names:
        raise ValueError(f"train.select={select!r}: choose one of {', '.join(names)}")


def make_validation(stage: Stage, build: Callable, batches, mesh) -> Callable[[Params, Params, Mark], dict[str, float]]:
    """validate(learned, frozen, mark) -> losses and retrieval on held-out slides, named val/...

    Slides, regions, patches and texts are the same each time, without dropout. Retrieval is over all slides of the
    split; slides of one case, or with the same caption, are not distractors. Each score comes with its chance level
    (`CHANCE`): the losses with every similarity 0, retrieval with all candidates tied. Retrieval also has a standard
    error over slides (`STDERR`).
    """
    from pathflip_jax.scores.retrieval import rank

    key = jax.random.key(0)

    def measure(learned: Params, frozen: Params, batch, features):
        model, batch = build(learned, frozen), look_up(batch, features)
        embeddings = jax.tree.map(lambda x: x[: batches.batch_size], stage.encode(model, batch, None))
        cut = {name: getattr(batch, name)[: batches.batch_size] for name in ("patch_mask", "related", "wording")}
        batch = batch._replace(**cut)
        _, metrics = stage.objective(model, embeddings, batch, key)
        _, chance = stage.objective(model, jax.tree.map(jnp.zeros_like, embeddings), batch, key)
        metrics |= {name + CHANCE: value for name, value in chance.items() if "loss" in name}
        return metrics, embeddings["slide"], embeddings["captions"], batch.related

    measured = measure_batches(measure, batches, mesh)

    def validate(learned: Params, frozen: Params, mark: Mark) -> dict[str, float]:
        metrics, slides, captions, related = zip(*measured(learned, frozen, mark), strict=True)
        mark("ranking the validation slides")
        scores = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        slides, captions, related = (np.concatenate(x) for x in (slides, captions, related))
        both = [rank(slides, captions, related), rank(captions, slides, related)]
        scores |= score_retrieval(both)
        return {VALIDATION + name: value for name, value in scores.items()}

    return validate


def score_retrieval(both: Sequence["Ranks"]) -> dict[str, float]:
    """Recall and mean reciprocal rank over both directions, each with its standard error over slides and its chance.

    Chance is the expected score of a random order of the candidates, masked slides, of one case or caption, left out.
    """
    from pathflip_jax.scores import retrieval

    measures = {
        f"recall_at_{k}": (functools.partial(retrieval.recall, k=k), functools.partial(retrieval.chance, k=k))
        for k in RECALLS
    }
    measures["mean_reciprocal_rank"] = (
        lambda ranks: 1 / retrieval.expected_rank(ranks),
        retrieval.chance_reciprocal_rank,
    )
    scores = {}
    for name, (measure, chance) in measures.items():
        slides = np.mean([measure(ranks) for ranks in both], axis=0)
        scores[name] = float(np.mean([measure(ranks).mean() for ranks in both]))
        scores[name + CHANCE] = float(np.mean([chance(ranks) for ranks in both]))
        scores[name + STDERR] = float(slides.std(ddof=1) / np.sqrt(len(slides))) if len(slides) > 1 else 0.0
    return scores


def measure_batches(measure: Callable, batches, mesh) -> Callable[[Params, Params, Mark], list]:
    """measured(learned, frozen, mark) -> results of `measure` for each batch of a split, on the host.

    `mark` is called for each batch, so that a validation that takes hours does not count as a hang. At most one batch
    is computed while the next is read, so that results do not accumulate on the devices.
    """
    features = place_features(mesh, batches)
    measure = jax.jit(measure, out_shardings=NamedSharding(mesh, P()))
    program = None

    def measured(learned: Params, frozen: Params, mark: Mark) -> list:
        nonlocal program
        found, under_way = [], []
        for number in range(batches.steps_per_epoch):
            mark("reading a validation batch")
            batch = sharding.place_batch(mesh, batches.batch(number))
            if program is None:
                mark("compiling the validation")
                program = measure.lower(learned, frozen, batch, features).compile()
            mark("validating")
            found += jax.device_get(under_way)
            under_way = [program(learned, frozen, batch, features)]
        mark("validating")
        return found + jax.device_get(under_way)

    return measured


def place_features(mesh, batches: Batches) -> jax.Array | None:
    """Features of a cohort on the devices, if batches refer to them by row; MemoryError if they do not fit."""
    features = batches.take_features()
    if features is None:
        return None
    memory.check_features(features.nbytes // mesh.size)
    return sharding.place_rows(mesh, features)


def choose_best(best: dict | None, step: int, scores: Mapping[str, float], setup: TrainSettings) -> tuple[dict, bool]:
    """Best checkpoint after a validation, and whether it is the new one.

    With few validation slides the score is noisy from step to step. Scores within `train.select_margin` of each other
    (0: a standard error) count as equal: of these `train.select_tie` takes the earliest, so that a new checkpoint has
    to exceed the best by more than the margin, or the latest, which only has to come within the margin of the top score
    so far.
    """
    score, sign = scores[setup.select], -1 if "loss" in setup.select else 1
    margin = setup.select_margin
    if setup.select_tie == "earliest" and not margin:
        margin = scores.get(setup.select + STDERR, 0.0)
    if best is None:
        return {"step": step, "value": score, "top": score}, True
    top = max(best["top"], score, key=lambda value: sign * value)
    if setup.select_tie == "earliest":
        improved = sign * (score - best["value"]) > margin
    else:  # without a margin the first of equal scores is kept
        improved = sign * (score - best["top"]) >= -margin and (margin > 0 or score != best["top"])
    return ({"step": step, "value": score, "top": top}, True) if improved else (best | {"top": top}, False)
