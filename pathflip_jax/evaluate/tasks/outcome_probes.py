"""Probes of outcomes on frozen embeddings: Cox models of survival, ridge regression of values, attention MIL for both.

Each is trained on `train`, chooses its one setting on `val` (else it is fixed), and predicts for `unseen` without their
outcomes. A higher risk means an earlier event.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from pathflip_jax.evaluate.protocols import Attention
from pathflip_jax.evaluate.tasks.probes import Objective, train_attention
from pathflip_jax.losses.survival import log_partial_likelihood
from pathflip_jax.scores.survival import Outcomes, import_survival

# Ridge penalties on rows of unit mean squared length: 1 expects log hazards, or values in standard deviations, that
# vary by about 1 between patients, 100 by about 0.1, 0.01 by about 10.
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
FIXED_PENALTY = 1.0  # without validation patients
NEWTON_COLUMNS = 100
BATCH = 64  # patients of a batch of attention MIL, whose events are compared with each other

Bags = Sequence[Float[np.ndarray, "R D"]]


class Survived(NamedTuple):
    """Patients for a survival probe: rows of features, or for attention MIL lists of regions, and their outcomes."""

    x: Float[np.ndarray, "n D"] | Bags
    y: Outcomes


class Measured(NamedTuple):
    """Slides for a regression probe: rows of features, or for attention MIL lists of regions, and their values."""

    x: Float[np.ndarray, "n D"] | Bags
    y: Float[np.ndarray, "n"]


def scaling(x: Float[np.ndarray, "n D"]) -> Callable[[np.ndarray], np.ndarray]:
    """Centring and scaling of rows by those of training, to unit mean squared length, in their principal directions.

    A ridge penalty does not depend on the directions, of which there are no more than rows. All columns are scaled
    alike, as distances between embeddings are.
    """
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    _, _, directions = np.linalg.svd(x - mean, full_matrices=False)
    length = np.sqrt(((x - mean) ** 2).sum(1).mean()) or 1.0
    return lambda rows: (np.asarray(rows, np.float64) - mean) @ directions.T / length


def fit_cox(x: Float[np.ndarray, "n D"], outcomes: Outcomes, penalty: float) -> Float[np.ndarray, "D"]:
    """The coefficients of a Cox model with Efron's ties: maximum of the log partial likelihood - penalty / 2 |b|^2.

    scikit-survival fits it. SciPy maximises the same function where that does not know how (the sum over several
    strata) or takes minutes (its Hessian of hundreds of columns).
    """
    if len(np.unique(outcomes.stratum)) == 1 and x.shape[1] <= NEWTON_COLUMNS:
        import_survival()
        from sksurv.linear_model import CoxPHSurvivalAnalysis
        from sksurv.util import Surv

        given = Surv.from_arrays(outcomes.event, outcomes.time)
        return CoxPHSurvivalAnalysis(penalty, ties="efron", tol=1e-12).fit(x, given).coef_
    with jax.enable_x64(True):
        how = {"maxiter": 2000, "maxfun": 4000, "ftol": 0.0, "gtol": 1e-10}
        given = (np.asarray(x, np.float64), float(penalty), _order(outcomes))
        return minimize(_cost, np.zeros(x.shape[1]), given, jac=True, method="L-BFGS-B", options=how).x


@jax.jit
@jax.value_and_grad
def _cost(b: Float[Array, "D"], x: Float[Array, "n D"], penalty: float, order: dict[str, Array]) -> Float[Array, ""]:
    return penalty / 2 * b @ b - log_partial_likelihood(x @ b, **order)


def likelihood(risk: Float[np.ndarray, "n"], outcomes: Outcomes) -> float:
    """The log partial likelihood of risks in double precision."""
    with jax.enable_x64(True):
        return float(log_partial_likelihood(np.asarray(risk, np.float64), **_order(outcomes)))


def _order(outcomes: Outcomes) -> dict[str, np.ndarray]:
    """The outcomes with ranks in place of times."""
    time = np.unique(outcomes.time, return_inverse=True)[1]
    return {"time": time, "event": outcomes.event, "stratum": outcomes.stratum}


def cox(
    train: Survived, val: Survived | None, unseen: Sequence[Float[np.ndarray, "n D"]]
) -> list[Float[np.ndarray, "n"]]:
    """The log hazards of each group of unseen patients by a Cox model with a ridge penalty.

    The penalty is the one under which the patients of `val` have the highest partial likelihood.
    """
    scale = scaling(train.x)
    fits = [fit_cox(scale(train.x), train.y, penalty) for penalty in (PENALTIES if val else [FIXED_PENALTY])]
    if val:
        fits = [fits[int(np.argmax([likelihood(scale(val.x) @ b, val.y) for b in fits]))]]
    return [scale(x) @ fits[0] for x in unseen]


def ridge(
    train: Measured, val: Measured | None, unseen: Sequence[Float[np.ndarray, "n D"]]
) -> list[Float[np.ndarray, "n"]]:
    """The values of each group of unseen slides by ridge regression, its penalty that of the least error on `val`."""
    scale, (mean, spread) = scaling(train.x), _moments(train.y)
    penalties = PENALTIES if val else [FIXED_PENALTY]
    fits = [Ridge(alpha=penalty).fit(scale(train.x), (train.y - mean) / spread) for penalty in penalties]
    if val:
        errors = [((fit.predict(scale(val.x)) * spread + mean - val.y) ** 2).mean() for fit in fits]
        fits = [fits[int(np.argmin(errors))]]
    return [fits[0].predict(scale(x)) * spread + mean for x in unseen]


def attention_cox(
    train: Survived, val: Survived | None, unseen: Sequence[Bags], *, settings: Attention, room: tuple[int, int]
) -> list[Float[np.ndarray, "n"]]:
    """The log hazards of each group of unseen patients by attention MIL over all regions of a patient.

    The loss is the partial likelihood of a batch per event; the round is the one with the highest on `val`, else the
    last.
    """
    targets = _order(train.y)
    rounds = _attention(train.x, targets, val, unseen, Objective(_cox_loss, 1), settings, room)
    chosen = -1 if val is None else int(np.argmax([likelihood(risk, val.y) for risk in rounds[0]]))
    return [found[chosen] for found in rounds[1:]]


def attention_value(
    train: Measured, val: Measured | None, unseen: Sequence[Bags], *, settings: Attention, room: tuple[int, int]
) -> list[Float[np.ndarray, "n"]]:
    """The values of each group of unseen slides by attention MIL with a squared error; the round is chosen on `val`."""
    mean, spread = _moments(train.y)
    targets = (train.y - mean) / spread
    rounds = _attention(train.x, targets, val, unseen, Objective(_squared_error, 1), settings, room)
    rounds = [found * spread + mean for found in rounds]
    chosen = -1 if val is None else int(np.argmin([((one - val.y) ** 2).mean() for one in rounds[0]]))
    return [found[chosen] for found in rounds[1:]]


def _attention(bags, targets, val, unseen, objective, settings, room) -> list[Float[np.ndarray, "rounds n"]]:
    """The outputs for `val` (none without it) and each unseen group after every round."""
    groups = [list(val.x) if val else [], *map(list, unseen)]
    settings = settings._replace(batch=min(BATCH, len(bags)))
    every = [bag for group in groups for bag in group]
    found = train_attention(bags, targets, every, objective, seed=0, settings=settings, room=room)
    found = np.asarray(found, np.float64)[..., 0]
    return np.split(found, np.cumsum([len(group) for group in groups])[:-1], axis=1)


def _cox_loss(risk: Float[Array, "b 1"], targets: dict[str, Array]) -> Float[Array, ""]:
    return -log_partial_likelihood(risk[:, 0], **targets) / jnp.maximum(targets["event"].sum(), 1)


def _squared_error(values: Float[Array, "b 1"], targets: Float[Array, " b"]) -> Float[Array, ""]:
    return jnp.mean((values[:, 0] - targets) ** 2)


def _moments(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) or 1.0
