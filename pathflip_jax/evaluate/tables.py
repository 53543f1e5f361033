"""The CSVs of an evaluation: a row for every query, slide or map that a figure was made of."""

import numpy as np

from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.summary import Outcome
from pathflip_jax.evaluate.tasks import map_scores as grounding
from pathflip_jax.evaluate.tasks.truth import Outlined
from pathflip_jax.scores import retrieval


def rank_rows(names, found: list[dict[str, retrieval.Ranks]], slide_ids: list[str], patients) -> list[dict]:
    """Every query of a retrieval: the rank of its match in both directions, and how many are above it or tied."""
    rows = []
    for name, ranks in zip(names, found, strict=True):
        places = {key: retrieval.expected_rank(one) for key, one in ranks.items()}
        sizes = retrieval.gallery_sizes(next(iter(ranks.values())))
        for i, (slide_id, patient) in enumerate(zip(slide_ids, patients, strict=True)):
            row = {"run": name, "slide_ids": slide_id, "patient_id": patient}
            row |= {f"{key}_rank": float(place[i]) for key, place in places.items()}
            row |= {f"{key}_above": int(one.above[i]) for key, one in ranks.items()}
            row |= {f"{key}_tied": int(one.tied[i]) for key, one in ranks.items()}
            rows.append(row | {"gallery": int(sizes[i])})
    return rows


def prediction_rows(names, outcomes: list[Outcome], cohort: Cohort, classes: list[str]) -> list[dict]:
    """Every slide of a zero-shot classification: its label, the predicted one, the probability of each class."""
    rows = []
    for name, outcome in zip(names, outcomes, strict=True):
        for i, slide_id in enumerate(cohort.slide_ids):
            believed = outcome.probabilities[i]
            row = {"run": name, "slide_id": slide_id, "patient_id": cohort.patients[i], "label": cohort.labels[i]}
            row["predicted"] = classes[int(believed.argmax())]
            rows.append(row | {f"p_{label}": round(float(p), 6) for label, p in zip(classes, believed, strict=True)})
    return rows


def grounding_rows(names, outcomes: list[Outcome], cohort: Cohort, outlined: Outlined, by_colour) -> list[dict]:
    """Every map of a concept that its slide has: the metrics of the run's, of the one without text, of colour's."""
    patient = dict(zip(cohort.slide_ids, cohort.patients, strict=True))
    rows = []
    for name, outcome in zip(names, outcomes, strict=True):
        sources = {"": outcome.maps, "no_text_": outcome.no_text}
        if by_colour is not None:
            sources["mean_colour_"] = by_colour
        for i, (slide_id, (inside, counts)) in enumerate(outlined.truth.items()):
            for c, concept in enumerate(outlined.concepts):
                if np.isfinite(outcome.maps.auc[i, c]):
                    row = {"run": name, "slide_id": slide_id, "patient_id": patient[slide_id], "concept": concept}
                    row |= {"patches": int(counts.sum()), "inside": int((inside[c] & counts).sum())}
                    for source, maps in sources.items():
                        values = {source + metric: getattr(maps, metric)[i, c] for metric in grounding.METRICS}
                        row |= {key: round(float(v), 6) if np.isfinite(v) else "" for key, v in values.items()}
                    rows.append(row)
    return rows
