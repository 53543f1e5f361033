"""Map layers of the viewer: patch scores, the colour range, and areas above a threshold.

The page gives thresholds in percent of a layer's colour range, because scores of two texts are not comparable.
"""

from typing import Any, NamedTuple

import numpy as np

from pathflip_jax.grounding.boxes import find_boxes, split_threshold
from pathflip_jax.grounding.files import as_geojson
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.grounding.surface import Surface, make_surface

DIGITS = 4  # decimal places of a score
STEPS = range(10, 100, 10)  # thresholds, in percent, for which a static page stores areas


class Layer(NamedTuple):
    """One text on one slide: its grounding, the smoothed surface, and the score range of the colour map."""

    grounding: Grounding
    surface: Surface
    low: float
    high: float


def make_layer(grounding: Grounding, number: int = 0) -> Layer:
    """Layer of one text of a grounding. Its colours span the 1st to the 99th percentile of its patches."""
    only = slice(number, number + 1)
    grounding = grounding._replace(
        texts=grounding.texts[only],
        patch_scores=grounding.patch_scores[only],
        region_scores=grounding.region_scores[only],
    )
    low, high = (float(value) for value in np.quantile(grounding.patch_scores[0], [0.01, 0.99]))
    return Layer(grounding, make_surface(grounding), low, high if high > low else low + 1e-6)


def layer_facts(layer: Layer) -> dict[str, Any]:
    """Layer as JSON: a score per patch in the order of the slide's coordinates, and the initial threshold."""
    # Above 0 a patch is more similar to the text than to the negative ones.
    split = 0.0 if layer.grounding.negative else split_threshold(layer.surface.values[0])
    percent = 100 * (split - layer.low) / (layer.high - layer.low)
    return {
        "text": layer.grounding.texts[0],
        "negative": list(layer.grounding.negative),
        "scores": np.round(layer.grounding.patch_scores[0].astype(np.float64), DIGITS).tolist(),
        "low": layer.low,
        "high": layer.high,
        "threshold": int(np.clip(round(percent), 1, 99)),
    }


def areas(layer: Layer, percent: float) -> list[dict[str, Any]]:
    """Areas above a threshold as QuPath annotations (GeoJSON features), the highest peak first."""
    threshold = layer.low + (layer.high - layer.low) * percent / 100
    boxes = find_boxes(layer.grounding, layer.surface, threshold)
    return as_geojson(layer.grounding.slide_id, layer.grounding.texts, boxes)["features"]
