"""Grounding pictures of the benchmark: for each class, and for all, the slide of median ROC AUC."""

import io
from pathlib import Path

from PIL import Image

from pathflip_jax.data.readers.outlines import of_concept, read_outlines
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.json_files import read_json
from pathflip_jax.evaluate.tasks import map_scores
from pathflip_jax.grounding import heatmap
from pathflip_jax.grounding.canvas import canvas_of
from pathflip_jax.inference.load import load
from real_tissue_parts.mosaics import OUTLINES
from real_tissue_parts.scores import median_slides
from real_tissue_parts.steps import Places

SMALL_WIDTH, SMALL_BYTES = 1400, 300_000  # of the picture for the README


def draw_classes(places: Places, run: Path, scores: Path) -> list[Path]:
    """Write a picture per class into the folder of an evaluation: the slide, its outlines and the class's map."""
    texts, how = read_json(places.slides / "grounding.json"), read_json(scores / "scores.json")["grounding"]["how"]
    records, predictor = Records(places.records), load(run)
    written = []
    for concept, (slide_id, auc) in median_slides(scores).items():
        slide = open_slide(records, records.position(slide_id))
        options = {key: how[key] for key in ("method", "window", "context")}
        found = map_scores.concept_scores(predictor, slide, {concept: texts[concept]}, **options)
        outline = of_concept(read_outlines(places.slides / OUTLINES / f"{slide_id}.geojson"), concept)
        file = places.slides / f"{slide_id}.tiff"
        canvas = canvas_of(slide, file if file.exists() else None)
        panel = heatmap.Panel(f"“{texts[concept][0]}”", found[0], outline, f"{concept}: ROC AUC {auc:.2f}")
        figure = heatmap.draw_panels(
            canvas, [panel], slide.coords, slide.patch_size, mpp=slide.mpp, heading=slide_id, reference=outline,
            smooth=how["smooth"],
        )  # fmt: skip
        written.append(scores / f"median_{concept.replace(' ', '_')}.png")
        figure.savefig(written[-1], dpi=160, facecolor="white")
    return written


def shrink(picture: Path, out: Path, width: int = SMALL_WIDTH, most: int = SMALL_BYTES) -> None:
    """Write a picture as a JPEG of this width, of the highest quality that takes at most `most` bytes.

    Raises ValueError where even the lowest quality takes more.
    """
    with Image.open(picture) as opened:
        small = opened.convert("RGB")
        small.thumbnail((width, small.height))
        for quality in range(90, 20, -5):
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= most:
                out.write_bytes(buffer.getvalue())
                return
    raise ValueError(f"{picture}: a picture {width} pixels wide does not fit into {most} bytes")
