"""Strokes drawn over drawn tissue, whose colours and structure are those of real slides."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_prep.detectors import TissueSettings
from data_prep.ink import find_ink
from data_prep.slides import open_slide
from data_prep.tiling import tile_slide
from data_prep.tissue_mask import tissue_mask
from pathflip_jax.cli import main

REAL = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "real"
STAINS = np.array([[0.65, 0.70, 0.29], [0.09, 0.95, 0.20], [0.27, 0.57, 0.78]])  # haematoxylin, eosin, DAB: OD
PENS = {
    "blue": (40, 60, 170), "navy": (25, 30, 110), "light blue": (90, 130, 220), "turquoise": (20, 130, 150),
    "green": (30, 140, 60), "red": (190, 30, 40), "dark red": (150, 20, 50), "pink": (230, 60, 150),
    "purple": (90, 40, 140), "orange": (230, 120, 40), "yellow": (240, 220, 60), "black": (25, 25, 28),
}  # fmt: skip


@cache
def _layers() -> tuple[np.ndarray, ...]:
    """Nuclei of 8 um, fibres, slow differences and grain of 512 px at 0.5 um."""
    rng = np.random.default_rng(0)
    nuclei, fibres, slow = (ndimage.gaussian_filter(rng.normal(size=(512, 512)), width) for width in (6, (3, 12), 40))
    return np.clip(nuclei / nuclei.std(), 0, 2), 1 + fibres * 6, 1 + slow * 40, rng.normal(0, 2, (512, 512, 3))


def _tissue(haematoxylin: float, eosin: float, dab: float = 0.0) -> np.ndarray:
    """Tissue in a margin of glass, of three stains."""
    nuclei, fibres, slow, grain = _layers()
    amounts = np.stack([haematoxylin * nuclei * slow, eosin * fibres, dab * nuclei], -1)
    light = 244 * 10 ** -(np.clip(amounts, 0, None) @ STAINS)
    light[:180] = light[-40:] = light[:, :200] = light[:, -40:] = 244
    return np.clip(light + grain, 0, 255).astype(np.uint8)


def _draw(image: np.ndarray, pen: tuple, opacity: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Strokes of 60 um on the glass beside tissue and above it, and one over tissue, and where they are."""
    cover = np.zeros(image.shape[:2])
    cover[20:500, 20:140] = cover[20:140, 20:500] = cover[260:380, 20:500] = 1
    cover = opacity * ndimage.gaussian_filter(cover, 3)
    inked = image * (np.array(pen) / 244) ** cover[..., None]
    return np.clip(inked + _layers()[3], 0, 255).astype(np.uint8), cover > 0.5 * opacity


def _masks(write_tiff, folder: Path, image: np.ndarray, keep_ink: bool = False) -> np.ndarray:
    with open_slide(write_tiff(folder / "s.tif", image)) as slide:
        found = tissue_mask(slide, 16, keep_ink=keep_ink)
    assert found.downsample == 16
    return found.mask.repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("pen", PENS)
def test_pen_is_left_out_and_tissue_is_not(write_tiff, tmp_path, pen):
    image = _tissue(0.35, 0.25)
    inked, cover = _draw(image, PENS[pen], opacity=0.9)
    clean, mask = _masks(write_tiff, tmp_path, image), _masks(write_tiff, tmp_path, inked)
    glass = ndimage.binary_erosion(cover & ~ndimage.binary_dilation(clean, iterations=16), iterations=4)
    apart = ndimage.binary_erosion(clean, iterations=24) & ~ndimage.binary_dilation(cover, iterations=48)
    assert (~mask)[glass].mean() > 0.95
    assert mask[apart].mean() > 0.98


@pytest.mark.parametrize(
    ("haematoxylin", "eosin", "dab"),
    [(0.2, 0.2, 0), (0.6, 0.1, 0), (0.9, 0.1, 0), (0.5, 0.0, 0), (0.02, 0.6, 0), (0.3, 0.02, 0.3), (0.1, 0.0, 0.6)],
    ids=["both", "lymphoid", "dark lymphoid", "haematoxylin", "eosin", "DAB", "strong DAB"],
)
def test_stained_tissue_is_no_pen(write_tiff, tmp_path, haematoxylin, eosin, dab):
    image = _tissue(haematoxylin, eosin, dab)
    np.testing.assert_array_equal(
        _masks(write_tiff, tmp_path, image), _masks(write_tiff, tmp_path, image, keep_ink=True)
    )


def test_what_colour_does_not_tell_is_looked_at(tmp_path):
    """Red and even is pen where nothing of the size of cells is seen, and blood where there is."""
    picture = np.full((128, 128, 3), 244, np.uint8)
    picture[20:40, 10:110] = (190, 30, 40)
    asked: list[tuple[int, int]] = []
    assert find_ink(picture, lambda row, column: asked.append((row, column)) or 1.0)[22:38, 12:108].all()
    assert not find_ink(picture, lambda row, column: 9.0).any()
    assert 0 < len(asked) <= 12 and all(20 <= row < 40 and 10 <= column < 110 for row, column in asked)
    assert not find_ink(np.full((128, 128, 3), 244, np.uint8), lambda row, column: 0.0).any()


def test_stains_that_look_like_pen_can_be_kept_and_the_rest_is_said(write_tiff, tmp_path):
    image = np.full((1024, 1024, 3), 244, np.uint8)
    image[256:768, 256:768] = (200, 120, 180)
    image[256:768, 256:512] = (60, 90, 180)  # collagen in a trichrome stain
    with open_slide(write_tiff(tmp_path / "s.tif", image)) as slide:
        tiles = tile_slide(slide, 64)
        assert tiles.coords[:, 0].min() == 512
        assert tiles.notes == ("53% of the stained area is taken for pen ink and left out; pass --keep-ink to keep it",)
        tiles = tile_slide(slide, 64, tissue=TissueSettings(keep_ink=True))
        assert len(tiles.coords) == 64 and tiles.notes == ()


def test_a_picture_that_is_pen_all_over_has_no_tissue(write_tiff, tmp_path):
    with open_slide(write_tiff(tmp_path / "s.tif", np.full((512, 512, 3), (40, 60, 170), np.uint8))) as slide:
        assert not tissue_mask(slide, 16).mask.any()


def test_the_option_reaches_the_mask(write_tiff, tmp_path):
    image = np.full((512, 512, 3), 244, np.uint8)
    image[128:384, 128:384] = (60, 90, 180)
    write_tiff(tmp_path / "s.tif", image)
    command = ["prepare", str(tmp_path / "s.tif"), "--patch-size", "64", "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "pen")]) == 1
    (failure,) = json.loads((tmp_path / "pen/failures.json").read_bytes())
    assert "100% of the stained area is taken for pen ink; pass --keep-ink to keep it" in failure["error"]
    assert main([*command, str(tmp_path / "stain"), "--keep-ink"]) == 0


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real tiles in {REAL}: set PATHFLIP_TEST_DATA")
@pytest.mark.parametrize("kind", ["LYMPHO", "DEBRIS", "TUMOR", "STROMA"])
def test_real_tissue_is_no_pen(write_tiff, tmp_path, kind):
    files = sorted((REAL / "kather2016/tiles").glob(f"*_{kind}__*"))
    tiles = [np.asarray(Image.open(path).convert("RGB").resize((150, 150))) for path in files]
    rows = [np.concatenate([tiles[(4 * row + i) % len(tiles)] for i in range(4)], 1) for row in range(4)]
    image = np.pad(np.concatenate(rows), ((100, 100), (100, 100), (0, 0)), constant_values=244)
    np.testing.assert_array_equal(
        _masks(write_tiff, tmp_path, image), _masks(write_tiff, tmp_path, image, keep_ink=True)
    )
