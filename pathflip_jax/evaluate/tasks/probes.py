"""Probes on frozen embeddings: linear, k nearest neighbours, and attention MIL over the regions of a slide.

Each learns from the labelled slides of `train`, may choose its one setting on `val`, and gives its belief in every
class of the slides of `test` [n, C]. No label of `test` is seen here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from sklearn.linear_model import LogisticRegression

from pathflip_jax.ops.attention import softmax_where
from pathflip_jax.ops.dropout import drop
from pathflip_jax.runtime.buckets import bucket
from pathflip_jax.scores.retrieval import normalise

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # inverse regularisation C of the linear probe on rows of unit length
NEIGHBOURS = (1, 3, 5, 9, 15, 25)
VOTE_TEMPERATURE = 0.1  # of the cosine that weighs a neighbour's vote, as in the slide loss
FIXED_STRENGTH, FIXED_NEIGHBOURS = 1.0, 5  # where there is no slide to choose on
AT_ONCE = 64  # bags that are pooled in one go when nothing is learnt


class Labelled(NamedTuple):
    """Slides as a probe sees them, and their classes; for attention MIL `x` is a list of region embeddings [R, D]."""

    x: Float[np.ndarray, "n D"] | Sequence[Float[np.ndarray, "R D"]]
    y: Int[np.ndarray, "n"]


def linear(train: Labelled, val: Labelled | None, test: Float[np.ndarray, "n D"], classes: int) -> np.ndarray:
    """Logistic regression on rows of unit length; its strength is chosen on `val`, else fixed."""

    def fit(strength: float) -> Callable:
        return LogisticRegression(C=strength, max_iter=5000).fit(normalise(train.x), train.y).predict_proba

    def belief(predict: Callable, x) -> np.ndarray:
        found = np.zeros((len(x), classes))
        found[:, np.unique(train.y)] = predict(normalise(x))
        return found

    if val is None:
        return belief(fit(FIXED_STRENGTH), test)
    fitted = [fit(strength) for strength in STRENGTHS]
    return belief(fitted[_best([belief(predict, val.x) for predict in fitted], val.y)], test)


def nearest(train: Labelled, val: Labelled | None, test: Float[np.ndarray, "n D"], classes: int) -> np.ndarray:
    """The votes of the nearest training slides by cosine, nearer ones weighing more; how many is chosen on `val`."""

    def belief(x, count: int) -> np.ndarray:
        cosine = (normalise(x) @ normalise(train.x).T).astype(np.float64)
        near = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
        close = np.take_along_axis(cosine, near, 1)
        votes = np.exp((close - close[:, :1]) / VOTE_TEMPERATURE)
        found = np.stack([(votes * (train.y[near] == c)).sum(1) for c in range(classes)], axis=1)
        return found / found.sum(1, keepdims=True)

    counts = [count for count in NEIGHBOURS if count <= len(train.y)]
    if val is None:
        return belief(test, min(FIXED_NEIGHBOURS, counts[-1]))
    return belief(test, counts[_best([belief(val.x, count) for count in counts], val.y)])


def _best(beliefs: Sequence[np.ndarray], labels: np.ndarray) -> int:
    """The setting whose belief in the true classes is highest (log likelihood, classes weighing alike)."""
    weights = 1.0 / np.bincount(labels)[labels]
    return int(np.argmax([(weights * np.log(b[np.arange(len(labels)), labels] + 1e-6)).sum() for b in beliefs]))


class Attention(NamedTuple):
    """How attention MIL is trained: AdamW in rounds, after each of which the model may be kept.

    A round is an epoch, of at least `least_steps` steps. With `l2` the decay is part of the gradient, as Adam of
    PyTorch has it.
    """

    hidden: int = 128
    learning_rate: float = 1e-3
    decay: float = 1e-2
    l2: bool = False
    dropout: float = 0.25
    batch: int = 16
    rounds: int = 20
    least_steps: int = 20


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
    """Gated attention MIL (Ilse et al., ICML 2018) over region embeddings: the belief after the round chosen on `val`.

    Where `val` is None the last round counts. `room` is the most regions of any slide and the regions of all, so that
    one size of the compiled program serves all draws.
    """
    on_val, on_test = attention_rounds(train, val, test, classes, seed=seed, settings=settings, room=room)
    chosen = len(on_test) - 1 if on_val is None else _best(on_val, val.y)
    return on_test[chosen]


def attention_rounds(
    train: Labelled, val: Labelled | None, test, classes: int, *, seed: int, settings: Attention, room: tuple[int, int]
) -> tuple[np.ndarray | None, np.ndarray]:
    """The belief of attention MIL about the slides of `val` and `test` after every round [rounds, n, C]."""
    bags = [*train.x, *(val.x if val is not None else []), *test]
    rows = np.concatenate([[0], np.cumsum([len(bag) for bag in bags])])
    flat = np.zeros((bucket(max(room[1], int(rows[-1]))), bags[0].shape[1]), np.float32)
    flat[: rows[-1]] = normalise(np.concatenate(bags)) * np.sqrt(flat.shape[1])  # entries of about unit size
    slots = np.full((len(bags), bucket(room[0])), -1, np.int32)
    for slot, first, end in zip(slots, rows, rows[1:], strict=False):
        slot[: end - first] = np.arange(first, end)
    n, unseen = len(train.y), slots[len(train.y) :]
    labels = np.zeros(bucket(max(n, AT_ONCE)), np.int32)  # a few shots and some more share a program
    learnt = np.full((len(labels), slots.shape[1]), -1, np.int32)
    labels[:n], learnt[:n] = train.y, slots[:n]
    padded = np.full((bucket(len(unseen)), slots.shape[1]), -1, np.int32)
    padded[: len(unseen)] = unseen
    rng = np.random.default_rng(seed)
    steps = max(-(-n // settings.batch), settings.least_steps)
    epochs = -(-steps * settings.batch // n)
    order = np.stack(
        [
            np.concatenate([rng.permutation(n) for _ in range(epochs)])[: steps * settings.batch]
            for _ in range(settings.rounds)
        ]
    ).reshape(settings.rounds, steps, settings.batch)
    dropped = rng.integers(0, 2**32, (settings.rounds, steps, 2, 2), np.uint32)  # seeds of what falls in each step
    start = _start(rng, flat.shape[1], settings.hidden, classes)
    logits = _train_attention(start, flat, learnt, labels, order.astype(np.int32), dropped, padded, settings=settings)
    belief = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)[:, : len(unseen)]
    count = len(unseen) - len(test)
    return (belief[:, :count] if val is not None else None), belief[:, count:]


@functools.partial(jax.jit, static_argnames="settings")
def _train_attention(start, flat, slots, labels, order, dropped, unseen, *, settings: Attention):
    """Train on the bags `slots` in the given order of batches; the logits of unseen bags after every round."""
    params, tree = ravel_pytree(start)  # one vector: a program of fewer parts, which compiles sooner
    adam = optax.scale_by_adam()
    decay = optax.add_decayed_weights(settings.decay)
    steps = order.shape[0] * order.shape[1]
    rate = optax.scale_by_learning_rate(
        settings.learning_rate if settings.l2 else optax.cosine_decay_schedule(settings.learning_rate, steps)
    )
    optimizer = optax.chain(decay, adam, rate) if settings.l2 else optax.chain(adam, decay, rate)

    def loss(params, chosen, seeds):
        found = _pool(tree(params), flat, slots[chosen], settings.dropout, seeds)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels[chosen]).mean()

    def step(state, given):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, *given), moments, params)
        return (params + updates, moments), None

    def one_round(state, given):
        state, _ = jax.lax.scan(step, state, given)
        pool = functools.partial(_pool, tree(state[0]), flat)
        return state, jax.lax.map(lambda bag: pool(bag[None])[0], unseen, batch_size=min(AT_ONCE, len(unseen)))

    return jax.lax.scan(one_round, (params, optimizer.init(params)), (order, dropped))[1]


def _start(rng: np.random.Generator, width: int, hidden: int, classes: int) -> dict[str, np.ndarray]:
    """Weights as PyTorch starts a Linear, uniform within one over the root of its inputs; biases zero.

    The attention has no bias: it would shift the scores of all regions alike.
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
    """The logits of bags: regions weighed by gated attention, their weighted mean classified."""
    regions = flat[slots]  # [b, R, D]
    content = jnp.tanh(regions @ params["content"] + params["content_bias"])
    gate = jax.nn.sigmoid(regions @ params["gate"] + params["gate_bias"])
    if seeds is not None and rate > 0:
        content, gate = drop(content, rate, seeds[0]), drop(gate, rate, seeds[1])
    weights = softmax_where((content * gate @ params["attend"])[..., 0], slots >= 0)  # [b, R]
    return jnp.einsum("br,brd->bd", weights, regions) @ params["classify"] + params["classify_bias"]
