"""Grounding files for other tools: GeoJSON for QuPath, JSON, and attention maps in CLAM's format.

Every file is written atomically.
"""

import io
import uuid
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from pathflip_jax.data.readers.outlines import Polygon
from pathflip_jax.grounding.boxes import Box
from pathflip_jax.grounding.pictures import write_atomically

# Distinguishable on pink tissue, with colour blindness too: Okabe and Ito's palette without yellow and grey.
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (86, 180, 233), (148, 33, 146))

FOR_READERS = {
    "indent": 1,
    "ensure_ascii": False,
    "allow_nan": False,
}  # JSON that people also read


def colour_of(texts: Sequence[str], text: str) -> tuple[int, int, int]:
    """Colour (red, green, blue; 0 to 255) of one of several texts."""
    return COLOURS[list(texts).index(text) % len(COLOURS)]


def as_geojson(slide_id: str, texts: Sequence[str], boxes: Sequence[Box], bounds: tuple[int, int] = (0, 0)) -> dict:
    """Areas as a FeatureCollection of QuPath annotations: outlines in level-0 pixels, with the text as class.

    QuPath crops slides that state their bounds (MRXS and some others) and counts pixels from there: `bounds` is that
    corner.
    """
    counts: dict[str, int] = {}
    features = []
    for box in boxes:
        counts[box.text] = counts.get(box.text, 0) + 1
        name = f"{box.text} {counts[box.text]}"
        parts = [_rings(polygon, bounds) for polygon in box.outline]
        measured = {"score": box.score, "peak": box.peak, "patches": box.patches}
        if box.area_mm2 is not None:
            measured["area mm^2"] = box.area_mm2
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{slide_id}/{name}")),
                "geometry": {
                    "type": "MultiPolygon" if len(parts) > 1 else "Polygon",
                    "coordinates": parts if len(parts) > 1 else parts[0],
                },
                "properties": {
                    "objectType": "annotation",
                    "name": name,
                    "classification": {"name": box.text, "color": list(colour_of(texts, box.text))},
                    "measurements": measured,
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _rings(polygon: Polygon, bounds: tuple[int, int]) -> list[list[list[float]]]:
    return [np.round(ring - np.asarray(bounds), 1).tolist() for ring in (polygon.ring, *polygon.holes)]


def as_facts(grounding, thresholds: Sequence[float], smooth: float, boxes: Sequence[Box]) -> dict:
    """Machine-readable results of a grounding: its settings, and the boxes of each text with its threshold."""
    found = []
    for number, text in enumerate(grounding.texts):
        mine = [
            {k: v for k, v in box._asdict().items() if k not in ("text", "outline")}
            for box in boxes
            if box.text == text
        ]
        found.append({"text": text, "threshold": thresholds[number], "boxes": mine})
    return {
        "slide_id": grounding.slide_id,
        "method": grounding.method,
        "negative": list(grounding.negative),
        "smooth": smooth,
        "patch_size": grounding.patch_size,
        "mpp": grounding.mpp or None,
        "width": grounding.width or None,
        "height": grounding.height or None,
        "patches": len(grounding.coords),
        "texts": found,
    }


def write_attention(path: Path, grounding, number: int) -> Path:
    """Write one text's scores as CLAM's `<slide>_blockmap.h5`: `attention_scores` [N, 1], `coords` [N, 2] at level 0.

    CLAM's heatmap code reads both by name and gets the patch size from its caller; attributes record it, and the text.
    """
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        scores = np.asarray(grounding.patch_scores[number], np.float32)[:, None]
        file.create_dataset("attention_scores", data=scores)
        coords = file.create_dataset("coords", data=np.asarray(grounding.coords, np.int64))
        coords.attrs["patch_size_level0"] = grounding.patch_size
        file.attrs["text"] = grounding.texts[number]
        file.attrs["method"] = grounding.method
    return write_atomically(path, stream.getvalue())
