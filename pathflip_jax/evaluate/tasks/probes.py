"""Probes on frozen embeddings: linear, k nearest neighbours, and attention MIL over the regions of a slide.

Each is trained on the labelled slides of `train`, may choose its one setting on `val`, and returns class probabilities
of the slides of `test` [n, C], without their labels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from sklearn.linear_model import LogisticRegression

from pathflip_jax.evaluate.protocols import Attention
from pathflip_jax.ops.attention import softmax_where
from pathflip_jax.ops.dropout import drop
from pathflip_jax.runtime.buckets import bucket
from pathflip_jax.scores.retrieval import normalise

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # inverse regularisation C of the linear probe on rows of unit length
NEIGHBOURS = (1, 3, 5, 9, 15, 25)
VOTE_TEMPERATURE = 0.1  # of the cosine that weights a neighbour's vote, as in the slide loss
FIXED_STRENGTH, FIXED_NEIGHBOURS = 1.0, 5  # without validation slides
POOL_BATCH = 64  # bags per batch in prediction


class Labelled(NamedTuple):
    """The features of slides and their classes; for attention MIL `x` is a list of region embeddings [R, D]."""

    x: Float[np.ndarray, "n D"] | Sequence[Float[np.ndarray, "R D"]]
    y: Int[np.ndarray, "n"]


def linear(train: Labelled, val: Labelled | None, test: Float[np.ndarray, "n D"], classes: int) -> np.ndarray:
    """Logistic regression on rows of unit length; its regularisation is chosen on `val`, else fixed."""

    def fit(strength: float) -> Callable:
        return LogisticRegression(C=strength, max_iter=5000).fit(normalise(train.x), train.y).predict_proba

    def predict_all(predict: Callable, x) -> np.ndarray:
        found = np.zeros((len(x), classes))
        found[:, np.unique(train.y)] = predict(normalise(x))
        return found

    if val is None:
        return predict_all(fit(FIXED_STRENGTH), test)
    fitted = [fit(strength) for strength in STRENGTHS]
    return predict_all(fitted[_best([predict_all(predict, val.x) for predict in fitted], val.y)], test)


def nearest(train: Labelled, val: Labelled | None, test: Float[np.ndarray, "n D"], classes: int) -> np.ndarray:
    """Votes of the nearest training slides by cosine, weighted by similarity; their number is chosen on `val`."""

    def vote(x, count: int) -> np.ndarray:
        cosine = (normalise(x) @ normalise(train.x).T).astype(np.float64)
        near = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
        close = np.take_along_axis(cosine, near, 1)
        votes = np.exp((close - close[:, :1]) / VOTE_TEMPERATURE)
        found = np.stack([(votes * (train.y[near] == c)).sum(1) for c in range(classes)], axis=1)
        return found / found.sum(1, keepdims=True)

    counts = [count for count in NEIGHBOURS if count <= len(train.y)]
    if val is None:
        return vote(test, min(FIXED_NEIGHBOURS, counts[-1]))
    return vote(test, counts[_best([vote(val.x, count) for count in counts], val.y)])


def _best(probabilities: Sequence[np.ndarray], labels: np.ndarray) -> int:
    """The setting with the highest log likelihood of the true classes, each class weighted equally."""
    weights = 1.0 / np.bincount(labels)[labels]
    return int(np.argmax([(weights * np.log(b[np.arange(len(labels)), labels] + 1e-6)).sum() for b in probabilities]))


def attention_mil(
    train: Labelled,
    val: Labelled | None,
    test: Sequence[Float[np.ndarray, "R D"]],
    classes: int,
    *,
    seed: int,
    settings: Attention,
    room: tuple[int, int],
) -> Float[np.ndarray, "n C"]:
    """Gated attention MIL (Ilse et al., ICML 2018) over region embeddings: probabilities in the round chosen on `val`.

    If `val` is None, those of the last round are returned. `room` is the largest number of regions of a slide and the
    total number, so that one compiled program serves all draws.
    """
    on_val, on_test = attention_rounds(train, val, test, classes, seed=seed, settings=settings, room=room)
    chosen = len(on_test) - 1 if on_val is None else _best(on_val, val.y)
    return on_test[chosen]


def attention_rounds(
    train: Labelled, val: Labelled | None, test, classes: int, *, seed: int, settings: Attention, room: tuple[int, int]
) -> tuple[np.ndarray | None, np.ndarray]:
    """The class probabilities of `val` and `test` by attention MIL after every round [rounds, n, C]."""
    unseen, objective = [*(val.x if val is not None else []), *test], Objective(_cross_entropy, classes)
    logits = train_attention(train.x, train.y, unseen, objective, seed=seed, settings=settings, room=room)
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    count = len(unseen) - len(test)
    return (probabilities[:, :count] if val is not None else None), probabilities[:, count:]


class Objective(NamedTuple):
    """A loss of attention MIL: a function of the outputs [b, C] and targets of a batch, and the number of outputs."""

    loss: Callable
    outputs: int


def _cross_entropy(logits: Float[Array, "b C"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_attention(
    train: Sequence[Float[np.ndarray, "R D"]],
    targets: Any,
    unseen: Sequence[Float[np.ndarray, "R D"]],
    objective: Objective,
    *,
    seed: int,
    settings: Attention,
    room: tuple[int, int],
) -> Float[Array, "rounds n C"]:
    """The outputs for unseen bags after every round of training on the bags `train` for their `targets`.

    `targets` is an array with one row for each bag of `train`, or a tree of them; `room` as for `attention_mil`.
    """
    bags, n = [*train, *unseen], len(train)
    rows = np.concatenate([[0], np.cumsum([len(bag) for bag in bags])])
    flat = np.zeros((bucket(max(room[1], int(rows[-1]))), bags[0].shape[1]), np.float32)
    flat[: rows[-1]] = normalise(np.concatenate(bags)) * np.sqrt(flat.shape[1])  # entries of about unit size
    slots = np.full((len(bags), bucket(room[0])), -1, np.int32)
    for slot, first, end in zip(slots, rows, rows[1:], strict=False):
        slot[: end - first] = np.arange(first, end)
    few = bucket(max(n, POOL_BATCH))  # small numbers of shots share a compiled program
    given = jax.tree.map(lambda rows: _padded(rows, few, 0), targets)
    learnt, padded = _padded(slots[:n], few, -1), _padded(slots[n:], bucket(len(unseen)), -1)
    rng = np.random.default_rng(seed)
    steps = max(-(-n // settings.batch), settings.least_steps)
    epochs = -(-steps * settings.batch // n)
    order = np.stack(
        [
            np.concatenate([rng.permutation(n) for _ in range(epochs)])[: steps * settings.batch]
            for _ in range(settings.rounds)
        ]
    ).reshape(settings.rounds, steps, settings.batch)
    dropped = rng.integers(0, 2**32, (settings.rounds, steps, 2, 2), np.uint32)  # dropout seeds of each step
    start, plan = _start(rng, flat.shape[1], settings.hidden, objective.outputs), (order.astype(np.int32), dropped)
    return _train(start, flat, learnt, given, plan, padded, settings=settings, loss_of=objective.loss)[:, : len(unseen)]


def _padded(rows: np.ndarray, count: int, value: int) -> np.ndarray:
    """The rows with others of `value` below them, `count` in all, in 32 bits."""
    rows = np.asarray(rows)
    kind = np.float32 if rows.dtype.kind == "f" else np.int32
    found = np.full((count, *rows.shape[1:]), value, bool if rows.dtype == bool else kind)
    found[: len(rows)] = rows
    return found


@functools.partial(jax.jit, static_argnames=("settings", "loss_of"))
def _train(start, flat, slots, targets, plan, unseen, *, settings: Attention, loss_of: Callable):
    """The outputs for unseen bags after every round of training; `plan` is the order of batches and dropout seeds."""
    params, tree = ravel_pytree(start)  # one vector, which compiles faster
    adam = optax.scale_by_adam()
    decay = optax.add_decayed_weights(settings.decay)
    steps = plan[0].shape[0] * plan[0].shape[1]
    rate = optax.scale_by_learning_rate(
        settings.learning_rate if settings.l2 else optax.cosine_decay_schedule(settings.learning_rate, steps)
    )
    optimizer = optax.chain(decay, adam, rate) if settings.l2 else optax.chain(adam, decay, rate)

    def loss(params, chosen, seeds):
        found = _pool(tree(params), flat, slots[chosen], settings.dropout, seeds)
        return loss_of(found, jax.tree.map(lambda rows: rows[chosen], targets))

    def step(state, given):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, *given), moments, params)
        return (params + updates, moments), None

    def one_round(state, given):
        state, _ = jax.lax.scan(step, state, given)
        pool = functools.partial(_pool, tree(state[0]), flat)
        return state, jax.lax.map(lambda bag: pool(bag[None])[0], unseen, batch_size=min(POOL_BATCH, len(unseen)))

    return jax.lax.scan(one_round, (params, optimizer.init(params)), plan)[1]


def _start(rng: np.random.Generator, width: int, hidden: int, classes: int) -> dict[str, np.ndarray]:
    """Initial weights as in PyTorch's Linear, uniform within 1/sqrt(inputs); zero biases.

    The attention has no bias, which would shift the scores of all regions equally.
    """
    sizes = {"content": (width, hidden), "gate": (width, hidden), "attend": (hidden, 1), "classify": (width, classes)}
    params = {name: (rng.uniform(-1, 1, size) / size[0] ** 0.5).astype(np.float32) for name, size in sizes.items()}
    return params | {f"{name}_bias": np.zeros(sizes[name][1], np.float32) for name in ("content", "gate", "classify")}


def _pool(
    params,
    flat: Float[Array, "P D"],
    slots: Int[Array, "b R"],
    rate: float = 0.0,
    seeds: Int[Array, "2 2"] | None = None,
) -> Float[Array, "b C"]:
    """The logits of bags: a linear classifier on the mean of regions weighted by gated attention."""
    regions = flat[slots]  # [b, R, D]
    content = jnp.tanh(regions @ params["content"] + params["content_bias"])
    gate = jax.nn.sigmoid(regions @ params["gate"] + params["gate_bias"])
    if seeds is not None and rate > 0:
        content, gate = drop(content, rate, seeds[0]), drop(gate, rate, seeds[1])
    weights = softmax_where((content * gate @ params["attend"])[..., 0], slots >= 0)  # [b, R]
    return jnp.einsum("br,brd->bd", weights, regions) @ params["classify"] + params["classify_bias"]
