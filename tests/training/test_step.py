"""The training step: accumulation is exact, and two steps of a tiny run give the numbers they always gave."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.data.batches.packing import TextRows
from pathflip_jax.data.batches.pipeline import Batch
from pathflip_jax.losses.pathflip import LossConfig
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten, unflatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.training.objectives import alignment
from pathflip_jax.training.optim import OptimConfig, learning_rate, make_optimizer
from pathflip_jax.training.step import join, loss_and_gradients, make_step, split

B, R, S, F, K, G, L = 8, 3, 4, 12, 2, 4, 12
CONFIG = PathFLIPConfig(
    feature_dim=F, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=32, num_queries=2, vocab_size=32,
    max_positions=16, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in", dropout=0.0,
)  # fmt: skip
LOSS = LossConfig(normaliser="per_slide")


@pytest.fixture(scope="module")
def batch():
    """Two slides to a group; each group's six texts of four tokens in two rows; the first slides are of one case."""
    rng = np.random.default_rng(0)
    return Batch(
        patches=rng.normal(size=(B, R, S, F)).astype(np.float16),
        patch_mask=rng.random((B, R, S)) < 0.8,
        text_rows=(
            TextRows(
                tokens=rng.integers(1, 32, (G, 2, L), dtype=np.int32),
                segments=np.tile(np.repeat([1, 2, 3], 4), (G, 2, 1)).astype(np.int32),
                positions=np.tile(np.arange(4), (G, 2, 3)).astype(np.int32),
            ),
        ),
        text_index=np.tile(np.array([[0, 4, 8], [12, 16, 20]], np.int32), (B // 2, 1)),
        related=np.array([0, 0, 2, 3, 4, 5, 6, 7], np.int32),
        slide=np.arange(B, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: flatten(PathFLIP(CONFIG, nnx.Rngs(0))))()


def gradients_of(stage, config, params, batch, accumulate):
    def run(params):
        build = lambda p: unflatten(config, p)  # noqa: E731
        (loss, _), gradients = loss_and_gradients(stage, build, params, batch, jax.random.key(1), accumulate)
        return gradients | {"loss": loss}

    return jax.jit(run)(params)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], atol=max(1e-5 * size, 1e-7), err_msg=name)


def test_split_keeps_groups_whole_and_join_undoes_it(batch):
    parts = split(batch, 2, G)
    np.testing.assert_array_equal(parts.slide, [[0, 1, 4, 5], [2, 3, 6, 7]])
    tokens = batch.text_rows[0].tokens
    np.testing.assert_array_equal(parts.text_rows[0].tokens, np.stack([tokens[[0, 2]], tokens[[1, 3]]]))
    for whole, joined in zip(jax.tree.leaves(batch), jax.tree.leaves(join(parts, G)), strict=True):
        np.testing.assert_array_equal(whole, joined)


def test_accumulated_gradient_is_that_of_the_whole_batch(params, batch):
    expected = gradients_of(alignment(LOSS), CONFIG, params, batch, 1)
    found = gradients_of(alignment(LOSS), CONFIG, params, batch, 4)
    assert_close(found, expected)
    assert float(np.abs(found["logit_scale"])) > 1e-4  # the objective's own parameters learn too
    assert float(np.abs(found["text_region/query/kernel"]).max()) > 1e-6


@pytest.mark.slow
def test_accumulated_gradient_with_dropout_is_that_of_the_same_masks(params, batch):
    """Against plain differentiation through all microbatches at once, with the keys that they get."""
    config, accumulate = dataclasses.replace(CONFIG, dropout=0.3), 2
    stage = alignment(LOSS)

    def whole(params):
        model = unflatten(config, params)
        encode_key, objective_key = jax.random.split(jax.random.key(1))
        parts = split(batch, accumulate, G)
        found = [
            stage.encode(model, jax.tree.map(lambda x, i=i: x[i], parts), jax.random.fold_in(encode_key, i))
            for i in range(accumulate)
        ]
        embeddings = join(jax.tree.map(lambda *x: jnp.stack(x), *found), G)
        return stage.objective(model, embeddings, batch, objective_key)

    (loss, _), expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    assert_close(gradients_of(stage, config, params, batch, accumulate), expected | {"loss": loss})


# Losses and gradient norms of two steps, as first computed, without dropout. They change only where the mathematics
# does: model, losses, initial values, optimizer, the negatives drawn.
GOLDEN = ((3.503737, 0.750727, 4.254465, 61.530602), (2.521703, 0.727075, 3.248778, 27.518646))


def test_two_steps_give_the_golden_metrics(params, batch):
    schedule = learning_rate(OptimConfig(learning_rate=1e-3, warmup_steps=0), 10, 5)
    optimizer = make_optimizer(OptimConfig(), schedule)
    names = [name for name in params if not name.startswith("patch_projection")]  # and the rest is frozen
    learned, frozen = {n: params[n] for n in names}, {n: params[n] for n in params.keys() - names}
    step = jax.jit(make_step(alignment(LOSS), lambda p, f: unflatten(CONFIG, p | f), optimizer, schedule, 1, seed=7))
    state, found = optimizer.init(learned), []
    for number in range(2):
        learned, state, metrics = step(learned, frozen, state, batch, np.int32(number))
        found.append([float(metrics[name]) for name in ("loss_slide", "loss_region", "loss", "gradient_norm")])
    np.testing.assert_allclose(found, GOLDEN, rtol=1e-4)
