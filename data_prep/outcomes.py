"""Outcomes of the embedded cohort: survival of its patients and a value of its slides that depend on their concepts.

Necrosis, ulcers and undifferentiated tumours shorten survival, lymphoid aggregates and papillary tumours lengthen it,
and so does a low stage, which no slide shows. Nothing in it is true of patients.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Log hazard per share of the tissue.
_HAZARDS = {"necrosis": 8.0, "ulcer": 4.0, "lymphoid aggregates": -8.0}
_HAZARDS |= {"solid sheets": 2.5, "keratin pearls": 0.8, "papillary fronds": -2.5, "mucin pools": -0.8}
_STAGES = {"1a": -0.6, "1b": -0.4, "2": -0.1, "3": 0.3, "4a": 0.7}  # log hazard of each T stage
_SCALE, _SHAPE = 40.0, 1.4  # Weibull: months, and a hazard that rises with time
_FOLLOW_UP = (12.0, 96.0)  # months after which patients were last seen


def survival(
    rng: np.random.Generator, extents: Sequence[Mapping[str, float]], case: Mapping[str, object]
) -> dict[str, str]:
    """Columns of a patient's survival: `os_months`, and `os_event`, 0 for a patient who was alive when last seen.

    `extents` are the shares of the concepts in each of the patient's slides, `case` holds its T stage.
    """
    shares = {concept: np.mean([extent.get(concept, 0.0) for extent in extents]) for concept in _HAZARDS}
    hazard = sum(weight * shares[concept] for concept, weight in _HAZARDS.items()) + _STAGES[str(case["t"])]
    until = _SCALE * (rng.exponential() * np.exp(-hazard)) ** (1 / _SHAPE)
    last = rng.uniform(*_FOLLOW_UP)
    return {"os_months": f"{max(0.1, min(until, last)):.1f}", "os_event": str(int(until <= last))}


def immune_score(rng: np.random.Generator, extent: Mapping[str, float]) -> str:
    """A score of a slide between about 0 and 60, higher with lymphoid aggregates and lower with fat, and noise."""
    value = 20 + 120 * extent.get("lymphoid aggregates", 0.0) - 50 * extent.get("fat", 0.0) + 3 * rng.normal()
    return f"{value:.1f}"
