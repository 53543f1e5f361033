"""Mosaics of texture features: a cohort without pixels, from the tiles of Kather et al. (Sci. Rep. 2016, 6:27988).

The input is an NPZ file of one row per tile: features [N, F], label [N] into classes, slide and region (the crop that a
tile was cut from) and test, true for tiles of held-out slides. A tile is one patch; blobs are of one tissue class and
of several source slides, and training, validation and test slides are disjoint. Empty glass is left out. The intervals
count crops as cases: the collection has ten slides, too few to resample.

    OUT/features/<slide_id>.h5          features and coords as CLAM stores them, for `pathflip import`

and the tables and outlines of `mosaics`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from jaxtyping import Float

from data_prep.reports import Names
from data_prep.synthetic import claim_folder
from pathflip_jax.data.readers.outlines import write_outlines
from real_tissue_parts.images import Collection, TissueImage
from real_tissue_parts.mosaics import (
    EDITION,
    OUTLINES,
    Grid,
    Mosaic,
    describe_mosaic,
    fingerprint,
    outlines,
    plan_cohort,
    write_texts,
)

EDGE, MPP = 150, 0.495
GRID = Grid(EDGE, EDGE, 0, 26, (15, 40), (10, 40))
REGION_UM = 4 * EDGE * MPP
ENCODER = "kather2016_textures"
NEEDED = ("features", "label", "classes", "slide", "region", "test")
CLASSES = {  # of the collection -> of the captions
    "01_TUMOR": "tumor epithelium",
    "02_STROMA": "simple stroma",
    "03_COMPLEX": "complex stroma",
    "04_LYMPHO": "lymphoid tissue",
    "05_DEBRIS": "debris",
    "06_MUCOSA": "mucosal glands",
    "07_ADIPOSE": "adipose tissue",
}
LEFT_OUT = "08_EMPTY"


class Textures(NamedTuple):
    """The tiles as a collection of images, the crop of each, and its features, standardised over training tiles."""

    collection: Collection
    regions: list[str]
    features: Float[np.ndarray, "N F"]


def read_textures(path: Path) -> Textures:
    """Read tiles and their features; a tile without a value takes the training mean.

    Raises FileNotFoundError or ValueError, naming the file, for missing arrays, unknown classes and a slide on both
    sides of the split.
    """
    path = path / "texture_features_5000.npz" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the NPZ file of texture features, or its folder")
    with np.load(path, allow_pickle=False) as opened:
        missing = [name for name in NEEDED if name not in opened]
        if missing:
            raise ValueError(f"{path}: no array {', '.join(missing)} in it; expected {', '.join(NEEDED)}")
        found = {name: opened[name] for name in NEEDED}
    labels = [str(name) for name in found["classes"][found["label"]]]
    unknown = sorted(set(labels) - set(CLASSES) - {LEFT_OUT})
    if unknown:
        raise ValueError(f"{path}: unknown classes {', '.join(unknown)}; expected {', '.join(CLASSES)} or {LEFT_OUT}")
    slides = found["slide"]
    both = sorted(set(slides[found["test"]]) & set(slides[~found["test"]]))
    if both:
        raise ValueError(
            f"{path}: the slides {', '.join(both)} have tiles on both sides of the split; expected each slide on one "
            "side of `test`; set it alike for all tiles of a slide"
        )
    kept = [number for number, label in enumerate(labels) if label != LEFT_OUT]
    images = [
        TissueImage(
            Path(str(number)),
            Path(),
            CLASSES[labels[number]],
            str(slides[number]),
            "test" * bool(found["test"][number]),
        )
        for number in kept
    ]
    raw = found["features"][kept].astype(np.float64)
    train = ~found["test"][kept]
    raw = np.where(np.isfinite(raw), raw, np.nan)
    usable = np.isfinite(raw[train]).any(0)
    raw = raw[:, usable]
    centre, spread = np.nanmean(raw[train], 0), np.nanstd(raw[train], 0)
    scaled = np.nan_to_num(np.clip((raw - centre) / np.maximum(spread, 1e-12), -5, 5)).astype(np.float32)
    return Textures(Collection(images, EDGE), [str(found["region"][number]) for number in kept], scaled)


def write_texture_cohort(out: Path, textures: Textures, names: Names, slides: Mapping[str, int], seed: int) -> Path:
    """Write the features, outlines and tables of the mosaics under `out`, and return the folder."""
    for folder in (out / "features", out / OUTLINES):
        folder.mkdir(parents=True, exist_ok=True)
    claim_folder(out, {"edition": EDITION, "seed": seed, "images": fingerprint(textures.collection), **slides})
    if (out / "slides.csv").exists():
        return out
    rows = []
    for mosaic in plan_cohort(textures.collection, GRID, slides, seed):
        blobs = _areas(mosaic)
        write_features(out / "features" / f"{mosaic.slide_id}.h5", mosaic, textures)
        write_outlines(out / OUTLINES / f"{mosaic.slide_id}.geojson", outlines(blobs, EDGE))
        crops = {textures.regions[number] for number in mosaic.images}
        rows.append(describe_mosaic(mosaic, blobs, names, MPP, seed) | {"cases": " ".join(sorted(crops))})
    write_texts(out, rows, names)
    return out


def _areas(mosaic: Mosaic) -> dict[str, np.ndarray]:
    """The blob of each class on the grid of tiles."""
    fields = {}
    for name, tiles in mosaic.blobs.items():
        fields[name] = np.zeros((mosaic.height // EDGE, mosaic.width // EDGE), np.float32)
        fields[name][[tile.y // EDGE for tile in tiles], [tile.x // EDGE for tile in tiles]] = 1
    return fields


def write_features(path: Path, mosaic: Mosaic, textures: Textures) -> None:
    """Write a slide's features and corners as CLAM does."""
    corners = [(tile.x, tile.y) for tiles in mosaic.blobs.values() for tile in tiles]
    with h5py.File(path, "w") as file:
        file["features"] = textures.features[mosaic.images]
        file["coords"] = np.array(corners, np.int64)
        facts = {"patch_size": EDGE, "patch_level": 0, "downsample": [1.0, 1.0]}
        file["coords"].attrs.update(facts | {"level_dim": [mosaic.width, mosaic.height]})
