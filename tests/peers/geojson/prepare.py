"""Areas of a hand-made grounding, as `pathflip ground` writes them: `python prepare.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from pathflip_jax.grounding import files
from pathflip_jax.grounding.boxes import find_boxes
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.grounding.surface import make_surface

GRID = np.stack(np.meshgrid(np.arange(12), np.arange(9)), -1).reshape(-1, 2)
RING = {(x, y) for x in (7, 8, 9) for y in (4, 5, 6)} - {(8, 5)}
AREAS = {"tumor": RING | {(0, 0), (1, 1)}, "fat": {(2, 2), (2, 3)}}  # a hole; parts that touch at a corner


def main() -> None:
    """Write areas.geojson, and areas.json with the text, the area and the patches of each."""
    out = Path(sys.argv[1])
    cells = list(map(tuple, GRID.tolist()))
    scores = np.array([[cell in hot for cell in cells] for hot in AREAS.values()], np.float32)
    place = {"coords": (GRID * 64 + 500).astype(np.int32), "patch_size": 64, "mpp": 0.5, "width": 0, "height": 0}
    found = Grounding("S1", tuple(AREAS), scores, method="slide", region_scores=scores[:, :1], **place)
    boxes = find_boxes(found, make_surface(found, smooth=0), 0.5)
    files.write_json(out / "areas.geojson", files.as_geojson("S1", found.texts, boxes))
    facts = [{"text": x.text, "area_mm2": x.area_mm2, "bounds": [x.x, x.y, x.width, x.height]} for x in boxes]
    (out / "areas.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
