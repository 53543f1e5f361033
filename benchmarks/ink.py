"""Pen strokes drawn over real slides: the fraction that the tissue mask excludes, and the tissue lost.

The slide of `--data` and mosaics of the real H&E tiles there (each class a separate slide) are written as TIFF without
strokes and with strokes of each colour (random lines, 60 to 300 um wide, opacity 0.6 to 1, uneven and blurred,
multiplied over the image). `before` is the mask without ink detection (`--keep-ink`), `after` the mask with it.

- recall: share of the strokes' area that the mask excludes, on glass and over tissue; patches there are not prepared
- precision: share of the excluded area, within tissue and strokes, that a stroke touches
- kept: share of the tissue untouched by strokes that the mask keeps
- lost: share of the tissue of a slide without strokes that ink detection excludes

    python benchmarks/ink.py --data ../shared/data --json ink.json
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from data_prep.slides import open_slide
from data_prep.tissue_mask import tissue_mask

MPP, DOWNSAMPLE = 0.5, 16
PENS = {
    "blue": (40, 60, 170), "navy": (25, 30, 110), "light blue": (90, 130, 220), "turquoise": (20, 130, 150),
    "green": (30, 140, 60), "black": (25, 25, 28), "red": (190, 30, 40), "dark red": (150, 20, 50),
    "pink": (230, 60, 150), "purple": (90, 40, 140), "orange": (230, 120, 40), "yellow": (240, 220, 60),
}  # fmt: skip
EBHI = ("adenocarcinoma", "high_grade_in", "low_grade_in", "normal", "polyp", "serrated_adenoma")
KATHER = ("TUMOR", "STROMA", "COMPLEX", "LYMPHO", "DEBRIS", "MUCOSA", "ADIPOSE")


def _mosaic(files: list[Path], columns: int, rng: np.random.Generator, edge: int = 0) -> np.ndarray:
    """Tiles in random order and orientation, surrounded by glass so that strokes lie on both."""
    tiles = []
    for number in range(columns**2):
        tile = Image.open(files[number % len(files)]).convert("RGB")
        tile = tile.resize((edge, edge), Image.Resampling.LANCZOS) if edge else tile
        tiles.append(np.rot90(np.asarray(tile), rng.integers(4)))
    order = rng.permutation(len(tiles)).reshape(columns, columns)
    tissue = np.concatenate([np.concatenate([tiles[i] for i in row], 1) for row in order])
    margin = 300
    whole = np.full((len(tissue) + 2 * margin, len(tissue) + 2 * margin, 3), 244, np.uint8)
    whole += rng.integers(-3, 4, whole.shape[:2] + (1,)).astype(np.int8).view(np.uint8)
    whole[margin:-margin, margin:-margin] = tissue
    return whole


def pictures(data: Path, mosaics: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of each slide, without strokes."""
    with openslide.OpenSlide(data / "slides/cmu-1-small-region.svs") as slide:
        yield "cmu-1", np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    for kind in KATHER:
        files = sorted((data / "real/kather2016/tiles").glob(f"*_{kind}__*"))
        yield f"kather {kind}", _mosaic(files, 6, rng, 150)
    for kind in EBHI:
        files = sorted((data / "real/ebhi_seg/images").glob(f"{kind}__*"))
        for number in range(mosaics):
            chosen = [files[i] for i in rng.permutation(len(files))]
            yield f"ebhi {kind} {number}", _mosaic(chosen, 5, rng)


def draw(image: np.ndarray, pen: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw strokes over an image; returns it with their coverage of each pixel."""
    height, width = image.shape[:2]
    cover = Image.new("L", (width, height))
    for _ in range(4):
        wide = int(rng.uniform(60, 300) / MPP)
        points = rng.uniform(0.05, 0.95, 2) + np.cumsum(rng.normal(0, 0.12, (6, 2)), 0)
        ends = [(float(x * width), float(y * height)) for x, y in np.clip(points, 0.02, 0.98)]
        ImageDraw.Draw(cover).line(ends, fill=int(rng.uniform(0.6, 1) * 255), width=wide, joint="curve")
    cover = np.asarray(cover.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
    uneven = Image.fromarray(rng.normal(0, 1, (height // 64 + 2, width // 64 + 2)).astype(np.float32))
    uneven = 1 + 0.08 * np.asarray(uneven.resize((width, height), Image.Resampling.BICUBIC))
    dye = -np.log(np.maximum(np.array(pen, np.float32), 1) / 245)
    inked = image * np.exp(-dye * (cover * uneven)[..., None]) + rng.normal(0, 2, (height, width, 1))
    return np.clip(inked, 0, 255).astype(np.uint8), cover


def mask_of(image: np.ndarray, folder: Path, keep_ink: bool) -> np.ndarray:
    """Tissue mask of an image, written to a slide file first."""
    path = folder / "slide.tif"
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(256, 256), compression="jpeg", compressionargs={"level": 90},
        metadata=None, resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with open_slide(path) as slide:
        return tissue_mask(slide, DOWNSAMPLE, keep_ink=keep_ink).mask


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
    return round(float(part[whole].mean()), 4) if whole.any() else None


def measure(name: str, image: np.ndarray, pens: list[str], folder: Path, rng: np.random.Generator) -> list[dict]:
    """Rows of a slide: one without strokes and one per pen."""
    clean, after = mask_of(image, folder, True), mask_of(image, folder, False)
    rows = [{"slide": name, "pen": None, "tissue": int(clean.sum()), "lost": _share(~after, clean)}]
    for pen in pens:
        inked, cover = draw(image, PENS[pen], rng)
        small = np.asarray(Image.fromarray(cover).reduce(DOWNSAMPLE))
        covered, touched = small > 0.5, ndimage.binary_dilation(small > 0.02)
        glass, tissue = covered & ~clean, covered & clean
        row = {"slide": name, "pen": pen}
        for when, mask in (("before", mask_of(inked, folder, True)), ("after", mask_of(inked, folder, False))):
            row[f"recall_glass_{when}"], row[f"recall_tissue_{when}"] = _share(~mask, glass), _share(~mask, tissue)
            row[f"kept_{when}"] = _share(mask, clean & ~touched)
            row[f"precision_{when}"] = _share(touched, ~mask & (clean | covered))
        rows.append(row)
    return rows


def summary(rows: list[dict]) -> dict:
    """Means over slides for each pen, and the tissue lost without strokes for each slide."""
    lost = {row["slide"]: row["lost"] for row in rows if row["pen"] is None}
    pens: dict[str, dict] = {}
    for pen in PENS:
        own = [row for row in rows if row["pen"] == pen]
        for key in own[0] if own else ():
            values = [row[key] for row in own if not isinstance(row[key], str) and row[key] is not None]
            if values:
                pens.setdefault(pen, {})[key] = round(float(np.mean(values)), 3)
    return {"lost_without_strokes": lost, "pens": pens}


def _print(found: dict) -> None:
    measures = ("recall_glass", "recall_tissue", "kept", "precision")
    print(f"{'before > after':14}" + "".join(f"{name:>18}" for name in measures))
    for pen, means in found["pens"].items():
        cells = [f"{means.get(f'{name}_before', 0):.3f} > {means.get(f'{name}_after', 0):.3f}" for name in measures]
        print(f"{pen:14}" + "".join(f"{cell:>18}" for cell in cells))
    lost = found["lost_without_strokes"]
    worst = max(lost, key=lost.get)
    print(f"tissue lost without strokes: at most {lost[worst]:.2%} ({worst}), over {len(lost)} slides")


def main() -> None:
    """Measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with slides/ and real/")
    parser.add_argument("--mosaics", type=int, default=2, help="mosaics of each class of EBHI-Seg (2)")
    parser.add_argument("--pens", nargs="*", default=list(PENS), choices=list(PENS), help="colours of the pens (all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the strokes and mosaics (0)")
    parser.add_argument("--json", type=Path, help="JSON file to write all figures to")
    options = parser.parse_args()
    rng, rows = np.random.default_rng(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for name, image in pictures(options.data, options.mosaics, rng):
            rows += measure(name, image, options.pens, Path(folder), rng)
    found = summary(rows)
    _print(found)
    if options.json:
        options.json.write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
