"""Slides whose tissue is known, frozen before any detector was run on them: seeds, layouts and one outline by hand.

Composed slides (`SEEDS` of each condition, 1.2 mm on a side at 0.5 um per pixel): tiles of Kather et al. (2016), real
tissue and real bare glass (08_EMPTY), or images of EBHI-Seg, pasted into smooth random outlines with blurred rims. The
mask is exact. Artefacts of known masks are painted over them; what lies under pen is not scored. The real slide
(CMU-1-Small-Region) is outlined by hand, with the areas that an annotator may draw either way left out.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

EDGE, MPP, SEEDS = 2400, 0.5, range(3)
KINDS = ("01_TUMOR", "02_STROMA", "03_COMPLEX", "04_LYMPHO", "05_DEBRIS", "06_MUCOSA")
PENS = {"blue": (40, 60, 170), "green": (30, 140, 60), "red": (190, 30, 40), "black": (25, 25, 28)}
CONDITIONS = (
    "clean", "fat", "pale", *(f"{name} pen" for name in PENS), "dust", "vignetting", "tinted glass", "black border",
    "coverslip edge and bubble",
)  # fmt: skip
# CMU-1-Small-Region, in level-0 pixels: tissue, holes that are glass, and areas that are not scored (keratin in the
# lumen of a cyst, loose strands, debris).
CMU_TISSUE = [
    (770, 240), (830, 150), (960, 140), (1060, 70), (1150, 90), (1190, 150), (1330, 200), (1330, 320), (1440, 330),
    (1450, 420), (1560, 470), (1600, 580), (1610, 800), (1625, 920), (1600, 1060), (1620, 1200), (1590, 1290),
    (1560, 1330), (1600, 1410), (1680, 1400), (1760, 1310), (1810, 1380), (1790, 1430), (1700, 1520), (1640, 1600),
    (1560, 1720), (1520, 1800), (1560, 1830), (1640, 1800), (1700, 1850), (1800, 1820), (1840, 1900), (1840, 2050),
    (1830, 2200), (1890, 2230), (1850, 2380), (1880, 2440), (1820, 2450), (1770, 2500), (1780, 2600), (1730, 2750),
    (1700, 2967), (590, 2967), (570, 2830), (590, 2720), (510, 2700), (520, 2640), (600, 2610), (580, 2520),
    (680, 2420), (730, 2330), (760, 2150), (780, 1900), (840, 1750), (850, 1600), (870, 1400), (880, 1250),
    (890, 1110), (850, 1105), (700, 1090), (560, 1075), (400, 1115), (250, 1145), (60, 1145), (200, 1115),
    (330, 1060), (450, 1012), (590, 1005), (700, 1055), (850, 1080), (880, 950), (920, 900), (930, 760), (970, 600),
    (980, 500), (900, 320), (880, 260),
]  # fmt: skip
CMU_HOLES = [
    [(1190, 400), (1290, 395), (1400, 450), (1420, 560), (1430, 640), (1430, 740), (1390, 790), (1350, 790),
     (1355, 690), (1330, 615), (1210, 595), (1180, 540), (1160, 420)],
]  # fmt: skip
CMU_UNSCORED = [
    [(1215, 1600), (1230, 1450), (1300, 1270), (1400, 1130), (1500, 1060), (1600, 1060), (1640, 1300), (1700, 1330),
     (1680, 1450), (1560, 1600), (1440, 1750), (1340, 1830), (1250, 1740)],
    [(1630, 960), (1720, 930), (1960, 1010), (1990, 1080), (1850, 1200), (2000, 1320), (1960, 1400), (1870, 1420),
     (1750, 1280), (1620, 1120)],
    [(2050, 575), (2135, 575), (2135, 650), (2050, 650)], [(0, 60), (45, 60), (45, 120), (0, 120)],
    [(790, 480), (985, 440), (985, 540), (790, 540)], [(1040, 300), (1200, 300), (1200, 420), (1040, 420)],
    [(1040, 2780), (1280, 2780), (1280, 2967), (1040, 2967)],
]  # fmt: skip


class Known(NamedTuple):
    """Slide with its tissue: pixels, tissue, artefacts, and the pixels that are scored, at 0.5 um per pixel."""

    name: str
    condition: str
    picture: np.ndarray
    tissue: np.ndarray
    artefact: np.ndarray
    scored: np.ndarray


def known_slides(data: Path) -> Iterator[Known]:
    """All slides: the real one, then each condition with each seed."""
    yield _real(data / "slides/cmu-1-small-region.svs")
    for condition in CONDITIONS:
        for seed in SEEDS:
            yield compose(data, condition, seed)


def compose(data: Path, condition: str, seed: int) -> Known:
    """Composed slide; the layout of tissue is that of its seed in all conditions."""
    rng = np.random.default_rng([2024, seed])
    glass, mosaic = _glass(data, rng), _mosaic(data, seed, rng)
    tissue = _blobs(rng, 0.22, 170)
    fat = _blobs(rng, 0.12, 130) & ~tissue
    cover = ndimage.gaussian_filter(tissue.astype(np.float32), 2)[..., None]
    rng = np.random.default_rng([CONDITIONS.index(condition), seed])
    if condition == "pale":
        mosaic = glass + (mosaic - glass) * np.float32(rng.uniform(0.25, 0.4))
    picture = glass + (mosaic - glass) * cover
    if condition == "fat":
        files = _files(data, "kather2016/tiles/07_ADIPOSE*")
        layer = ndimage.gaussian_filter(fat.astype(np.float32), 2)[..., None]
        picture = picture + (_tiled(files, rng, 150) - picture) * layer
        tissue = tissue | fat
    artefact, scored = np.zeros_like(tissue), np.ones_like(tissue)
    if condition.endswith(" pen"):
        picture, artefact = _pen(picture, PENS[condition.removesuffix(" pen")], rng)
        scored = ~(artefact & tissue)
    elif condition == "dust":
        picture, artefact = _dust(picture, rng)
    elif condition == "vignetting":
        y, x = np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
        picture = picture * (1 - 0.16 * (x**2 + y**2))[..., None].astype(np.float32)
    elif condition == "tinted glass":
        picture = picture * np.array([0.99, 0.96, rng.uniform(0.86, 0.92)], np.float32)
    elif condition == "black border":
        artefact = np.ones_like(tissue)
        artefact[150:-90, 210:-60] = False
        picture = np.where(artefact[..., None], rng.integers(0, 14, picture.shape), picture)
        tissue = tissue & ~artefact
    elif condition == "coverslip edge and bubble":
        picture, artefact = _coverslip(picture, rng)
    return Known(
        f"{condition} {seed}", condition, np.clip(picture, 0, 255).astype(np.uint8), tissue, artefact & ~tissue, scored
    )


def _real(path: Path) -> Known:
    with openslide.OpenSlide(path) as slide:
        picture = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))

    def painted(*rings: list[tuple[int, int]]) -> np.ndarray:
        image = Image.new("1", picture.shape[1::-1])
        for ring in rings:
            ImageDraw.Draw(image).polygon(ring, fill=1)
        return np.asarray(image)

    tissue = painted(CMU_TISSUE) & ~painted(*CMU_HOLES)
    return Known("cmu-1", "real slide", picture, tissue, np.zeros_like(tissue), ~painted(*CMU_UNSCORED))


@cache
def _files(data: Path, pattern: str) -> tuple[Path, ...]:
    return tuple(sorted((data / "real").glob(pattern)))


def _glass(data: Path, rng: np.random.Generator) -> np.ndarray:
    """Bare glass: one real tile, turned and mirrored."""
    files = _files(data, "kather2016/tiles/08_EMPTY*")
    return _tiled([files[rng.integers(len(files))]], rng, 150)


def _mosaic(data: Path, seed: int, rng: np.random.Generator) -> np.ndarray:
    """Tissue all over: two classes of Kather's tiles, or EBHI-Seg for every third seed."""
    if seed % 3 == 2:
        return _tiled(_files(data, "ebhi_seg/images/*"), rng, 224)
    kind = KINDS[(2 * seed) % len(KINDS)], KINDS[(2 * seed + 1) % len(KINDS)]
    files = [file for name in kind for file in _files(data, f"kather2016/tiles/{name}*")]
    return _tiled(files, rng, 150)


def _tiled(files, rng: np.random.Generator, edge: int) -> np.ndarray:
    count = -(-EDGE // edge)
    tiles = {}
    rows = []
    for _ in range(count):
        row = []
        for _ in range(count):
            path = files[rng.integers(len(files))]
            if path not in tiles:
                tiles[path] = np.asarray(Image.open(path).convert("RGB").resize((edge, edge), Image.Resampling.LANCZOS))
            tile = np.rot90(tiles[path], rng.integers(4))
            row.append(tile[:, ::-1] if rng.integers(2) else tile)
        rows.append(np.concatenate(row, 1))
    return np.concatenate(rows)[:EDGE, :EDGE].astype(np.float32)


def _blobs(rng: np.random.Generator, share: float, width: float) -> np.ndarray:
    """Smooth random pieces of that share of the slide; `width` is their size in pixels."""
    field = ndimage.gaussian_filter(rng.normal(size=(EDGE // 8, EDGE // 8)), width / 8)
    field = ndimage.zoom(field + 0.05 * field.std() * rng.normal(size=field.shape), 8, order=1)
    mask = ndimage.gaussian_filter(field, 6)
    return mask > np.quantile(mask, 1 - share)


def _pen(picture: np.ndarray, pen: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    cover = Image.new("L", (EDGE, EDGE))
    for _ in range(3):
        points = np.clip(rng.uniform(0.1, 0.9, 2) + np.cumsum(rng.normal(0, 0.13, (6, 2)), 0), 0.02, 0.98) * EDGE
        fill, wide = int(rng.uniform(0.65, 1) * 255), int(rng.uniform(100, 260))
        ImageDraw.Draw(cover).line([tuple(map(float, point)) for point in points], fill=fill, width=wide, joint="curve")
    cover = np.asarray(cover.filter(ImageFilter.GaussianBlur(3)), np.float32)[..., None] / 255
    uneven = 1 + 0.08 * ndimage.zoom(rng.normal(size=(38, 38)), EDGE / 38, order=1)[:EDGE, :EDGE, None]
    light = np.exp(np.log(np.maximum(np.array(pen, np.float32), 1) / 245) * cover * uneven)
    return picture * light + rng.normal(0, 2, (EDGE, EDGE, 1)), cover[..., 0] > 0.1


def _dust(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Specks of 5 to 40 um, brown, grey and black, and coloured fibres."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    where = Image.new("L", (EDGE, EDGE))
    colours = [(90, 70, 50), (120, 120, 125), (30, 30, 32), (150, 110, 70), (60, 80, 150)]
    for _ in range(60):
        x, y = rng.uniform(0, EDGE, 2)
        radius = rng.uniform(5, 40) / MPP / 2
        box = (x - radius, y - radius * rng.uniform(0.4, 1), x + radius, y + radius * rng.uniform(0.4, 1))
        colour = colours[rng.integers(len(colours))]
        for target, fill in ((image, colour), (where, 255)):
            ImageDraw.Draw(target).ellipse(box, fill=fill)
    for _ in range(4):
        points = rng.uniform(0.1, 0.9, 2) * EDGE + np.cumsum(rng.normal(0, 70, (8, 2)), 0)
        colour = colours[rng.integers(len(colours))]
        for target, fill in ((image, colour), (where, 255)):
            line = [tuple(map(float, point)) for point in points]
            ImageDraw.Draw(target).line(line, fill=fill, width=12, joint="curve")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32), np.asarray(where) > 0


def _coverslip(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The edge of a coverslip, beyond which the glass is darker, and an air bubble with a dark rim."""
    y, x = np.mgrid[:EDGE, :EDGE].astype(np.float32)
    edge = EDGE * rng.uniform(0.88, 0.94) + (y - EDGE / 2) * rng.uniform(-0.04, 0.04)
    line = np.abs(x - edge)
    middle, radius = rng.uniform(0.25, 0.75, 2) * EDGE, rng.uniform(200, 320)
    away = np.hypot(x - middle[0], y - middle[1])
    shade = 1 - 0.08 * (x > edge) - 0.6 * np.exp(-((line / 7) ** 2)) - 0.05 * (away < radius)
    shade -= 0.55 * np.exp(-(((away - radius) / 9) ** 2))
    return picture * shade[..., None], (line < 14) | (np.abs(away - radius) < 18)
