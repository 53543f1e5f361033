"""Tissue detectors on slides whose tissue is known: what they lose of it, and what they take for it.

The slides are those of `tissue_truth.py`: 36 composed of real tiles on real glass, in 12 conditions, and one real slide
outlined by hand. They are written as pyramidal TIFF and read as `pathflip prepare` reads them. CLAM's default area
filter drops every piece of less than 26 megapixels, which is more than these slides have, so `clam` is measured without
it (`--smallest 0`), and `clam_areas` with it.

- dice: of the mask and the known tissue, in pixels of 2 um that are scored
- lost: share of the tissue that the mask lacks
- glass: share of everything else, artefacts included, that the mask takes as tissue
- artefact: share of the painted artefact, beside tissue, that the mask takes as tissue

    python benchmarks/tissue.py --data ../shared/data --json benchmarks/results/tissue.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from machine import describe
from PIL import Image
from tissue_truth import CONDITIONS, MPP, Known, known_slides

from data_prep.detectors import TissueSettings, find_tissue
from data_prep.slides import open_slide

PATCH = 256  # pixels: the resolution of the built-in detector and of Otsu is a sixteenth of it
SIDES = {
    "embedded": TissueSettings(),
    "otsu": TissueSettings("otsu"),
    "lazyslide": TissueSettings("lazyslide"),
    "clam": TissueSettings("clam", smallest_um2=0.0),
    "clam_areas": TissueSettings("clam"),
}
MEASURES = ("dice", "lost", "glass", "artefact")
STEP = 4  # level-0 pixels of a scored pixel


def write(path: Path, picture: np.ndarray) -> None:
    """Write a picture as a pyramidal TIFF."""
    with tifffile.TiffWriter(path) as out:
        for downsample in (1, 4, 16):
            level = picture if downsample == 1 else np.asarray(Image.fromarray(picture).reduce(downsample))
            out.write(
                level, photometric="rgb", tile=(256, 256), compression="jpeg", compressionargs={"level": 90},
                subfiletype=0 if downsample == 1 else 1, metadata=None, resolutionunit="CENTIMETER",
                resolution=(1e4 / (MPP * downsample),) * 2,
            )  # fmt: skip


def score(mask: np.ndarray, downsample: float, known: Known) -> dict[str, float | None]:
    """Measures of a mask."""
    tissue, artefact, scored = (part[::STEP, ::STEP] for part in (known.tissue, known.artefact, known.scored))
    row, column = (
        np.minimum(((np.arange(n) + 0.5) * STEP / downsample).astype(int), m - 1)
        for n, m in zip(tissue.shape, mask.shape, strict=True)
    )
    found = mask[row][:, column]
    both = (found & tissue & scored).sum()
    total = (found & scored).sum() + (tissue & scored).sum()

    def share(part: np.ndarray, whole: np.ndarray) -> float | None:
        return round(float(part[whole].mean()), 4) if whole.any() else None

    return {
        "dice": round(float(2 * both / total), 4),
        "lost": share(~found, tissue & scored),
        "glass": share(found, ~tissue & scored),
        "artefact": share(found, artefact & scored),
    }


def measure(data: Path, folder: Path) -> list[dict]:
    """Rows of all slides and detectors."""
    rows = []
    for known in known_slides(data):
        write(folder / "slide.tif", known.picture)
        for side, settings in SIDES.items():
            with open_slide(folder / "slide.tif") as slide:
                start = time.perf_counter()
                found = find_tissue(slide, PATCH / 16, (PATCH * MPP) ** 2, settings)
                seconds = time.perf_counter() - start
            row = {"slide": known.name, "condition": known.condition, "side": side, "seconds": round(seconds, 3)}
            rows.append(row | score(found.mask, found.downsample, known))
        print(known.name, *(f"{row['side']} {row['dice']:.3f}" for row in rows[-len(SIDES) :]), flush=True)
    return rows


def summary(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the slides of each condition and side."""
    found: dict[str, dict] = {}
    for condition in ("real slide", *CONDITIONS):
        for side in SIDES:
            own = [row for row in rows if (row["condition"], row["side"]) == (condition, side)]
            means = {}
            for name in MEASURES:
                values = [row[name] for row in own if row[name] is not None]
                if values:
                    means[name] = round(float(np.mean(values)), 3)
            found.setdefault(condition, {})[side] = means
    return found


def main() -> None:
    """Measure, print a table and write JSON."""
    default = Path(os.environ.get("PATHFLIP_TEST_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default, help="folder with slides/ and real/ (PATHFLIP_TEST_DATA)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.data, Path(folder))
    found = summary(rows)
    for condition, sides in found.items():
        for side, means in sides.items():
            print(f"{condition:27}{side:12}" + "".join(f"{name} {value:.3f}  " for name, value in means.items()))
    if options.json:
        text = json.dumps({"machine": describe("scikit-image", "scipy"), "conditions": found, "slides": rows}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
