"""Output files of `pathflip ground` for one slide."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.grounding.boxes import MIN_PATCHES, Box, find_boxes, thresholds_of
from pathflip_jax.grounding.canvas import DPI, Canvas
from pathflip_jax.grounding.files import FOR_READERS, as_facts, as_geojson, write_attention
from pathflip_jax.grounding.heatmap import draw_grounding
from pathflip_jax.grounding.maps import SMOOTH, Grounding
from pathflip_jax.grounding.pictures import short_name, write_atomically, write_picture
from pathflip_jax.grounding.placement import Measures
from pathflip_jax.grounding.sheet import draw_sheet
from pathflip_jax.grounding.surface import make_surface
from pathflip_jax.grounding.top_patches import TopPatches, list_patches


class Areas(NamedTuple):
    """Areas of a grounding's texts above their thresholds (`limits`)."""

    grounding: Grounding
    limits: list[float]
    boxes: list[Box]


def find_areas(
    grounding: Grounding, measures: Measures | None, threshold: float | None, smooth: float, min_patches: float
) -> Areas:
    """Areas as from `find_boxes`; the mpp of the slide file's `measures` replaces an unknown one."""
    if measures is not None and not grounding.mpp:
        grounding = grounding._replace(mpp=measures.mpp)
    surface = make_surface(grounding, smooth)
    limits = thresholds_of(surface, threshold)
    return Areas(grounding, limits, find_boxes(grounding, surface, limits, min_patches=min_patches))


def write_grounding(
    out: Path,
    grounding: Grounding,
    *,
    canvas: Canvas | None = None,
    best: Sequence[TopPatches] | None = None,
    measures: Measures | None = None,
    threshold: float | None = None,
    smooth: float = SMOOTH,
    min_patches: float = MIN_PATCHES,
) -> dict[str, str | list[str]]:
    """Write a grounding into `out` and return the files by kind.

    `<slide>.png` (maps), `.npz` (scores of patches and regions), `.json` (boxes), `.geojson` (areas, for QuPath) and a
    `_blockmap.h5` for each text (CLAM's format). Of a slide file, its thumbnail `canvas` is drawn under the maps,
    a sheet of the `best` patches of each text is written to `patches/<slide>/` (and listed with those that
    `write_patches` writes), and its `measures` tell the resolution. `threshold`, `smooth` and `min_patches` are those
    of `find_boxes` and `make_surface`.
    """
    name = grounding.slide_id
    out.mkdir(parents=True, exist_ok=True)
    grounding, limits, boxes = find_areas(grounding, measures, threshold, smooth, min_patches)
    outlines = {text: [ring for box in boxes if box.text == text for ring in box.outline] for text in grounding.texts}
    counts = [sum(box.text == text for box in boxes) for text in grounding.texts]
    notes = [f"areas above {limit:.3g}: {count}" for limit, count in zip(limits, counts, strict=True)]
    picture = draw_grounding(grounding, canvas, outlines=outlines, notes=notes, smooth=smooth)
    written: dict[str, str | list[str]] = {"picture": str(write_picture(out / f"{name}.png", picture, dpi=DPI))}
    stream = io.BytesIO()
    np.savez(
        stream, texts=grounding.texts, patch_scores=grounding.patch_scores, coords=grounding.coords,
        patch_size=grounding.patch_size, region_scores=grounding.region_scores,
    )  # fmt: skip
    written["scores"] = str(write_atomically(out / f"{name}.npz", stream.getvalue()))
    facts = as_facts(grounding, limits, smooth, boxes)
    bounds = (0, 0) if measures is None else measures.bounds
    areas = as_geojson(name, grounding.texts, boxes, bounds)
    written["geojson"] = str(out / f"{name}.geojson")
    write_json(out / f"{name}.geojson", areas, **FOR_READERS)
    written["attention"] = [
        str(write_attention(out / f"{name}_{short_name(number + 1, text)}_blockmap.h5", grounding, number))
        for number, text in enumerate(grounding.texts)
    ]
    if best is not None:
        folder = out / "patches" / name
        facts["top_patches"] = list_patches(folder, grounding, best)
        sheet = write_picture(folder / "sheet.png", draw_sheet(grounding, best), dpi=130)
        written["patches"] = [str(sheet), *(patch["file"] for patch in facts["top_patches"])]
    written["json"] = str(out / f"{name}.json")
    write_json(out / f"{name}.json", facts, **FOR_READERS)
    return written
