"""The schedule, decay by name, and AdamW against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pathflip_jax.training.optim import OptimConfig, decays, exchange, learning_rate, make_optimizer

PARAMS = {"a/kernel": jnp.ones((3, 2)), "a/bias": jnp.ones(2), "norm/scale": jnp.ones(2), "logit_scale": jnp.ones(())}


def test_schedule_warms_up_and_falls_per_step():
    schedule = learning_rate(OptimConfig(), steps=1000, steps_per_epoch=100)
    rates = np.array([schedule(step) for step in range(1001)])
    np.testing.assert_allclose(rates[[0, 100, 200, 600, 1000]], [1e-6, 5.05e-5, 1e-4, 5.25e-5, 5e-6], rtol=1e-4)
    assert (np.diff(rates[:201]) > 0).all() and (np.diff(rates[200:]) < 0).all()


def test_released_schedule_falls_per_epoch():
    schedule = learning_rate(OptimConfig(preset="released"), steps=1000, steps_per_epoch=100)
    rates = np.array([schedule(step) for step in range(1000)])
    np.testing.assert_allclose(rates[[0, 50, 99]], [1e-6, 5.05e-5, 9.901e-5], rtol=1e-4)  # one epoch, not 200 steps
    for epoch in range(1, 10):
        expected = 5e-6 + (1e-4 - 5e-6) * 0.5 * (1 + np.cos(np.pi * epoch / 10))
        np.testing.assert_allclose(rates[epoch * 100 : epoch * 100 + 100], expected, rtol=1e-5)


def test_only_weights_decay_unless_released():
    assert [name for name, decayed in decays(OptimConfig(), PARAMS).items() if decayed] == ["a/kernel"]
    assert all(decays(OptimConfig(preset="released"), PARAMS).values())
    with pytest.raises(ValueError, match="optim.preset=paper: expected one of ours, released"):
        OptimConfig(preset="paper")


@pytest.mark.parametrize("preset", ["ours", "released"])
def test_adamw_is_that_of_torch(preset):
    torch = pytest.importorskip("torch")
    config = OptimConfig(preset=preset, weight_decay=0.5, clip=1.0)
    params = {name: x * 0.7 for name, x in PARAMS.items()}
    optimizer = make_optimizer(config, lambda step: 1e-2)
    state = optimizer.init(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in params.items()}
    decayed = decays(config, params)
    groups = [
        {"params": [p for name, p in theirs.items() if decayed[name] == wanted], "weight_decay": 0.5 * wanted}
        for wanted in (True, False)
    ]
    reference = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    rng = np.random.default_rng(0)
    for _ in range(5):
        gradients = {name: rng.normal(size=x.shape).astype(np.float32) * 3 for name, x in params.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients), state, params)
        params = optax.apply_updates(params, updates)
        for name, p in theirs.items():
            p.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        reference.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_average_of_weights_follows_them_and_changes_no_step():
    schedule = learning_rate(OptimConfig(learning_rate=0.1, warmup_steps=0), steps=100, steps_per_epoch=10)
    plain, averaged = (make_optimizer(OptimConfig(weight_average=decay), schedule) for decay in (0.0, 0.9))
    params, expected, states = PARAMS, PARAMS, [plain.init(PARAMS), averaged.init(PARAMS)]
    for n in range(30):
        gradients = jax.tree.map(lambda x, n=n: x * jnp.cos(n), PARAMS)
        updates, states[0] = plain.update(gradients, states[0], params)
        again, states[1] = averaged.update(gradients, states[1], params)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, updates, again))
        params = optax.apply_updates(params, updates)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, params)
    shown, beside = exchange(params, states[1])
    for name, value in expected.items():
        np.testing.assert_allclose(shown[name], value, rtol=1e-5, err_msg=name)
    assert exchange(shown, beside) == (params, states[1]) and exchange(params, states[0]) == (params, states[0])
