"""Partial likelihood of the Cox model with Efron's correction for ties (Efron, JASA 1977), in strata.

A higher risk means an earlier event. Patients of different strata are never compared with each other: each stratum has
its own baseline hazard, and the log likelihoods add up.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def log_partial_likelihood(
    risk: Float[Array, "n"],
    time: Int[Array, "n"],
    event: Bool[Array, "n"],
    stratum: Int[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """The log partial likelihood of log hazards `risk`; 0 without events.

    `time` are ranks of the times of event or censoring, equal for ties: only their order counts, and integers keep it
    exactly. Patients censored at the time of an event are still at risk. Takes n x n memory.
    """
    together = jnp.ones((len(risk), len(risk)), bool) if stratum is None else stratum[:, None] == stratum
    at_risk = (time >= time[:, None]) & together  # [n, n], row: whose event it is
    tied = (time == time[:, None]) & event & together
    earlier = jnp.tril(jnp.ones_like(tied), -1) & tied  # events of the tie that have left the risk set
    removed = earlier.sum(1) / jnp.maximum(tied.sum(1), 1)
    weights = at_risk - removed.astype(risk.dtype)[:, None] * tied
    total = jax.nn.logsumexp(jnp.broadcast_to(risk, weights.shape), axis=1, b=weights)
    return jnp.where(event, risk - total, 0).sum()
