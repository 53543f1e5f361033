"""The partial likelihood against lifelines, a slow loop, finite differences, and its own strata."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pathflip_jax.losses.survival import log_partial_likelihood


def patients(n=40, seed=0):
    """Risks, tied times in months, events (about half) and two strata."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n).astype(np.float32)
    return risk, rng.integers(1, 12, n), rng.random(n) < 0.5, rng.integers(0, 2, n)


def slow(risk, time, event):
    """Efron's formula, written out time by time."""
    total = 0.0
    for t in set(time[event]):
        tied = (time == t) & event
        hazards, own, count = np.exp(risk[time >= t]).sum(), np.exp(risk[tied]).sum(), tied.sum()
        total += risk[tied].sum() - sum(np.log(hazards - k / count * own) for k in range(count))
    return total


@pytest.mark.parametrize("seed", range(4))
def test_it_is_efrons(seed):
    risk, time, event, _ = patients(seed=seed)
    assert log_partial_likelihood(risk, time, event) == pytest.approx(slow(risk.astype(float), time, event), rel=1e-5)


def test_strata_add_up_and_order_does_not_count():
    risk, time, event, stratum = patients()
    found = log_partial_likelihood(risk, time, event, stratum)
    alone = [log_partial_likelihood(risk[stratum == s], time[stratum == s], event[stratum == s]) for s in (0, 1)]
    assert found == pytest.approx(float(sum(alone)), rel=1e-5)
    order = np.random.default_rng(1).permutation(len(risk))
    again = log_partial_likelihood(risk[order], time[order], event[order], stratum[order])
    assert again == pytest.approx(float(found), rel=1e-5)
    # Only the order of times counts, and a constant added to all risks does not.
    assert log_partial_likelihood(risk + 3, time * 30, event, stratum) == pytest.approx(float(found), rel=1e-4)


def test_gradients_are_those_of_finite_differences():
    risk, time, event, stratum = patients(12)
    check_grads(lambda r: log_partial_likelihood(r, time, event, stratum), (jnp.asarray(risk),), order=2, modes=["rev"],
                atol=1e-2, rtol=1e-2)  # fmt: skip


def test_without_events_there_is_nothing_to_learn_and_large_risks_stay_finite():
    risk, time, event, _ = patients()
    value, slope = jax.value_and_grad(log_partial_likelihood)(risk, time, np.zeros_like(event))
    assert value == 0 and (slope == 0).all()
    value, slope = jax.value_and_grad(log_partial_likelihood)(risk * 200, time, event)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_it_is_lifelines_log_likelihood():
    lifelines = pytest.importorskip("lifelines")
    import pandas

    rng = np.random.default_rng(5)
    _, time, event, stratum = patients(60)
    x = rng.normal(size=(60, 3))
    table = pandas.DataFrame(x, columns=list("abc")).assign(time=time, event=event)
    for strata in (None, stratum):
        columns, by = (table, None) if strata is None else (table.assign(stratum=stratum), ["stratum"])
        fitted = lifelines.CoxPHFitter().fit(columns, "time", "event", strata=by)
        with jax.enable_x64(True):
            found = log_partial_likelihood(x @ fitted.params_.to_numpy(), time, event, strata)
        assert found == pytest.approx(fitted.log_likelihood_, rel=1e-10)
