"""Mosaic slides of tissue images: two to four blobs of one class each, every blob of several cases, on glass.

Images stand on a grid of whole patches, so that no patch straddles two images, and blobs are shifted by whole patches,
so that regions do. A slide shows 2 to 4 classes; the class of most of its tissue, one blob larger than all others
together, is its label. Cases of one split never meet those of another. Everything is a function of (seed, slide
number).

    OUT/<slide_id>.tiff
    OUT/outlines/<slide_id>.geojson     blobs of each class, in level-0 pixels
    OUT/masks/<slide_id>.geojson        the glands or lesions within them, by the masks of the images
    OUT/slides.csv                      slide_id, patient_id, label, split, width, height, mpp, classes, cases
    OUT/reports.jsonl                   slide_id, case_id, caption, concepts
    OUT/prompts.json, grounding.json    texts for zero-shot classification and for grounding
    OUT/concepts.json                   phrasings of each class, to detect the classes that a text asserts

A mosaic is made of several cases, so it is its own patient in the slide table; the column `cases` names the real ones.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep.layout import STEP, place_word, rings
from data_prep.reports import Names, concept_phrasings, grounding_texts
from data_prep.slide_image import MPP, write_slide
from data_prep.synthetic import claim_folder
from pathflip_jax.data.readers.outlines import Polygon, write_outlines
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.texts.tables import write_csv
from real_tissue_parts.images import Collection, TissueImage, assign_splits, cases_by_class
from real_tissue_parts.words import class_prompts, write_caption

EDITION = 2  # increment when the same seed gives other slides
SPLITS = ("train", "val", "test")
OUTLINES, MASKS = "outlines", "masks"  # folders of GeoJSON files
PATCHES = 2  # along an image's edge
CASES = (2, 5)  # cases of a blob: from, below
GLASS = 243


class Grid(NamedTuple):
    """Layout of mosaics: images of `edge` px on a square of `cells`, with a patch of glass around them.

    Blobs, a cell apart, are shifted by `shift` patches at most. `others` are the images of each blob but the largest,
    which has `more` images than these together: from, below.
    """

    edge: int
    patch: int
    shift: int
    cells: int
    others: tuple[int, int]
    more: tuple[int, int]


def image_grid(edge: int) -> Grid:
    """The grid of images that hold several patches."""
    return Grid(edge, edge // PATCHES, 1, 7, (2, 4), (1, 4))


class Tile(NamedTuple):
    """One image of a mosaic: its number in the collection, its top-left pixel, and its turn (0 to 7)."""

    number: int
    x: int
    y: int
    turn: int


class Mosaic(NamedTuple):
    """The plan of a slide: its blobs by class, the largest first, which is most of the tissue."""

    number: int
    split: str
    width: int
    height: int
    blobs: dict[str, list[Tile]]

    @property
    def slide_id(self) -> str:
        """The name of the slide's files."""
        return f"MOSAIC-{self.number:04d}"

    @property
    def images(self) -> list[int]:
        """The numbers of its images."""
        return [tile.number for tiles in self.blobs.values() for tile in tiles]


def plan_mosaic(
    rng: np.random.Generator, number: int, split: str, pool: Mapping[str, Mapping[str, Sequence[int]]], grid: Grid
) -> Mosaic:
    """Plan one slide from a pool (class -> case -> images) of a split; labels take turns by the slide's number."""
    names = sorted(pool)
    first = names[number % len(names)]
    others = [names[i] for i in rng.permutation(len(names)) if names[i] != first]
    chosen = [first, *others[: int(rng.integers(1, 4))]]
    others = [int(rng.integers(*grid.others)) for _ in chosen[1:]]
    sizes = [sum(others) + int(rng.integers(*grid.more)), *others]
    blobs = {}
    for name, cells in zip(chosen, grow_blobs(rng, sizes, grid.cells), strict=True):
        shift = rng.integers(-grid.shift, grid.shift + 1, 2) * grid.patch
        images = draw_images(rng, pool[name], len(cells))
        corners = (np.array(cells) * grid.edge + shift).tolist()
        blobs[name] = [Tile(image, x, y, int(rng.integers(8))) for image, (x, y) in zip(images, corners, strict=True)]
    corners = np.array([(tile.x, tile.y) for tiles in blobs.values() for tile in tiles])
    low = corners.min(0) - grid.patch
    width, height = (corners.max(0) - low + grid.edge + grid.patch).tolist()
    moved = {
        name: [tile._replace(x=int(tile.x - low[0]), y=int(tile.y - low[1])) for tile in tiles]
        for name, tiles in blobs.items()
    }
    return Mosaic(number, split, width, height, moved)


def grow_blobs(rng: np.random.Generator, sizes: Sequence[int], width: int) -> list[list[tuple[int, int]]]:
    """Contiguous cells of a grid `width` cells wide for each blob; a free cell or more lies between two blobs."""
    while True:
        free = {(x, y) for x in range(width) for y in range(width)}
        blobs = []
        for size in sizes:
            blob = _grow(rng, free, size)
            if blob is None:
                break
            free -= {(x + dx, y + dy) for x, y in blob for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
            blobs.append(blob)
        else:
            return blobs


def _grow(rng: np.random.Generator, free: set[tuple[int, int]], size: int) -> list[tuple[int, int]] | None:
    """One compact blob among free cells; None where it does not fit."""
    if not free:
        return None
    cells = sorted(free)
    blob = [cells[int(rng.integers(len(cells)))]]
    while len(blob) < size:
        sides = [(x + dx, y + dy) for x, y in blob for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        edge = [cell for cell in sides if cell in free and cell not in blob]  # once for each side that it touches
        if not edge:
            return None
        blob.append(edge[int(rng.integers(len(edge)))])
    return blob


def draw_images(rng: np.random.Generator, cases: Mapping[str, Sequence[int]], count: int) -> list[int]:
    """Images of a blob, from two to four of its class's cases where it has as many; none twice before all are used."""
    names = list(cases)
    chosen = [names[i] for i in rng.permutation(len(names))[: min(count, int(rng.integers(*CASES)))]]
    decks = [[cases[name][i] for i in rng.permutation(len(cases[name]))] for name in chosen]
    found: list[int] = []
    turn = 0
    while len(found) < count:
        found += [deck[turn % len(deck)] for deck in decks][: count - len(found)]
        turn += 1
    return found


def plan_cohort(collection: Collection, grid: Grid, slides: Mapping[str, int], seed: int) -> list[Mosaic]:
    """The mosaics of all splits in order; `slides` are their numbers by split."""
    splits = assign_splits(collection.images, seed)
    plans = []
    for split in SPLITS:
        pool = cases_by_class(collection.images, [case for case, side in splits.items() if side == split])
        for _ in range(slides[split]):
            rng = np.random.default_rng([seed, 2, len(plans)])
            plans.append(plan_mosaic(rng, len(plans), split, pool, grid))
    return plans


@lru_cache(maxsize=2048)
def _pixels(path: Path, mode: str) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert(mode))


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    turned = np.rot90(pixels, turn % 4)
    return turned[:, ::-1] if turn >= 4 else turned


def render(mosaic: Mosaic, images: Sequence[TissueImage], rng: np.random.Generator) -> np.ndarray:
    """The slide's pixels [height, width, 3]: its images on glass with a scanner's noise."""
    shape = (mosaic.height, mosaic.width, 3)
    canvas = (GLASS + rng.integers(-2, 3, shape)).astype(np.uint8)
    for tile in (tile for tiles in mosaic.blobs.values() for tile in tiles):
        pixels = _turned(_pixels(images[tile.number].image, "RGB"), tile.turn)
        canvas[tile.y : tile.y + len(pixels), tile.x : tile.x + len(pixels)] = pixels
    return canvas


def coverage(mosaic: Mosaic, images: Sequence[TissueImage], *, masked: bool = True) -> dict[str, np.ndarray]:
    """Each class's share of every cell of 8 px: of its masks, or of its blob where not `masked`."""
    fields = {}
    for name, tiles in mosaic.blobs.items():
        fields[name] = np.zeros((mosaic.height // STEP, mosaic.width // STEP), np.float32)
        for tile in tiles:
            mask = _turned(_pixels(images[tile.number].mask, "L") > 0, tile.turn)
            cells = len(mask) // STEP
            share = mask.reshape(cells, STEP, cells, STEP).mean((1, 3)) if masked else 1.0
            x, y = tile.x // STEP, tile.y // STEP
            fields[name][y : y + cells, x : x + cells] = share
    return fields


def outlines(fields: Mapping[str, np.ndarray], cell: float = STEP) -> dict[str, list[Polygon]]:
    """The outlines of each class in level-0 pixels, from fields whose cells are `cell` px."""
    scale = cell / STEP
    return {
        name: [Polygon(outer * scale, tuple(hole * scale for hole in holes)) for outer, *holes in rings(field)]
        for name, field in fields.items()
    }


def make_slide(out: str, mosaic: Mosaic, collection: Collection, names: Names, seed: int) -> dict:
    """Write the files of one slide unless they are there; return its row of the tables."""
    folder, images = Path(out), collection.images
    blobs = coverage(mosaic, images, masked=False)
    last = folder / MASKS / f"{mosaic.slide_id}.geojson"
    if not last.exists():
        pixels = render(mosaic, images, np.random.default_rng([seed, 3, mosaic.number]))
        write_slide(folder / f"{mosaic.slide_id}.tiff", pixels)
        write_outlines(folder / OUTLINES / f"{mosaic.slide_id}.geojson", outlines(blobs))
        write_outlines(last, outlines(coverage(mosaic, images)))
    row = describe_mosaic(mosaic, blobs, names, MPP, seed)
    return row | {"cases": " ".join(sorted({images[number].case for number in mosaic.images}))}


def describe_mosaic(
    mosaic: Mosaic, blobs: Mapping[str, np.ndarray], names: Names, mpp: float, seed: int
) -> dict[str, object]:
    """The row of a mosaic in the tables, but for its cases; `blobs` are the areas of its classes."""
    total = sum(float(field.sum()) for field in blobs.values())
    extent = {name: float(field.sum()) / total for name, field in blobs.items()}
    place = {name: place_word(field > 0) for name, field in blobs.items()}
    caption_rng = np.random.default_rng([seed, 4, mosaic.number])
    return {
        "slide_id": mosaic.slide_id,
        "patient_id": mosaic.slide_id,
        "label": next(iter(mosaic.blobs)),
        "split": mosaic.split,
        "width": mosaic.width,
        "height": mosaic.height,
        "mpp": mpp,
        "classes": ";".join(mosaic.blobs),
        "caption": write_caption(caption_rng, names, extent, place, mosaic.split),
    }


def write_cohort(
    out: Path, collection: Collection, names: Names, slides: Mapping[str, int], seed: int, workers: int
) -> Path:
    """Write the cohort under `out` and return the folder; an interrupted call is resumed by the same one.

    Raises ValueError for a folder that holds the cohort of other images or settings.
    """
    plans = plan_cohort(collection, image_grid(collection.edge), slides, seed)
    for folder in (OUTLINES, MASKS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    settings = {"edition": EDITION, "seed": seed, "images": fingerprint(collection), **slides}
    claim_folder(out, settings)
    if (out / "slides.csv").exists():  # written last
        return out
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = [pool.submit(make_slide, str(out), plan, collection, names, seed) for plan in plans]
        rows = [job.result() for job in tqdm(jobs, desc="slides", unit="slide", disable=None)]
    write_texts(out, rows, names)
    return out


def write_texts(out: Path, rows: Sequence[dict], names: Names) -> None:
    """Write captions, prompts and tables of slides; `rows` are those of `make_slide`."""
    shown = sorted({name for row in rows for name in row["classes"].split(";")})
    with atomic_file(out / "reports.jsonl") as file:
        for row in rows:
            report = {"slide_id": row["slide_id"], "case_id": row["patient_id"], "caption": row["caption"]}
            file.write((json.dumps(report | {"concepts": row["classes"].split(";")}) + "\n").encode())
    write_json(out / "prompts.json", {"task": "largest class", "classes": class_prompts(names, shown)})
    texts = grounding_texts(names)
    write_json(out / "grounding.json", {name: texts[name] for name in shown})
    write_json(out / "concepts.json", concept_phrasings(names))
    write_csv(out / "slides.csv", [{key: value for key, value in row.items() if key != "caption"} for row in rows])


def fingerprint(collection: Collection) -> str:
    """A checksum of the collection's names, classes, cases and splits, independent of where it lies."""
    listed = [[one.image.name, one.mask.name, *one[2:]] for one in collection.images]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
