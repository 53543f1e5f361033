"""Top patches: the best ones, once each, and the pictures of exactly the place that they name."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathflip_jax.grounding.pictures import write_picture
from pathflip_jax.grounding.sheet import draw_sheet
from pathflip_jax.grounding.top_patches import list_patches, read_patches, read_top_patches, top_patches, write_patches


@pytest.fixture
def slide_file(tmp_path):
    """A pyramid of three levels on which each square of 64 pixels has a colour of its own."""
    grid = np.stack(np.meshgrid(np.arange(15), np.arange(10)), -1)
    colours = np.concatenate([grid * 16, np.full((10, 15, 1), 90)], -1).astype(np.uint8)
    level0 = colours.repeat(64, 0).repeat(64, 1)
    path = tmp_path / "slide.tiff"
    with tifffile.TiffWriter(path) as writer:
        writer.write(level0, tile=(128, 128), photometric="rgb", subifds=0)
        for step in (2, 4):
            writer.write(level0[::step, ::step], tile=(64, 64), photometric="rgb", subfiletype=1)
    return path


@pytest.mark.parametrize("pixels", [16, 32, 64, 100])
def test_pictures_show_the_place_that_is_asked_for(slide_file, pixels):
    coords = np.array([[0, 0], [64 * 3, 64 * 7], [64 * 14, 64 * 9]])
    found = read_patches(slide_file, coords, 64, pixels)
    assert found.shape == (3, pixels, pixels, 3)
    for picture, (x, y) in zip(found, coords // 64, strict=True):
        assert np.abs(picture.reshape(-1, 3).astype(int) - [16 * x, 16 * y, 90]).max() <= 1


def test_what_lies_beyond_the_slide_is_background(slide_file):
    (found,) = read_patches(slide_file, np.array([[64 * 15 - 32, 0]]), 64, 64)
    assert (found[:, 40:] == 255).all() and (found[:, :24, 0] == 16 * 14).all()


def test_of_overlapping_patches_the_best_is_taken():
    coords = np.array([[0, 0], [32, 0], [64, 0], [200, 0]])
    assert top_patches(np.array([1.0, 5.0, 4.0, 0.5]), coords, 64, 4).tolist() == [1, 3]
    assert top_patches(np.array([1.0, 0.9, 1.0, 0.5]), coords, 64, 2).tolist() == [0, 2]


def test_a_sheet_and_a_picture_of_each(slide_file, tmp_path, made):
    grid = np.stack(np.meshgrid(np.arange(15), np.arange(10)), -1).reshape(-1, 2)
    found = made(grid * 64, np.stack([grid[:, 0] + grid[:, 1] / 100, -grid[:, 1] - grid[:, 0] / 100]))
    best = read_top_patches(found, slide_file, 3)
    write_patches(tmp_path / "patches", found, best)
    write_picture(tmp_path / "patches" / "sheet.png", draw_sheet(found, best), dpi=130)
    written = list_patches(tmp_path / "patches", found, best)
    assert [(p["x"] // 64, p["y"] // 64) for p in written] == [(14, 9), (14, 8), (14, 7), (0, 0), (1, 0), (2, 0)]
    assert [p["text"] for p in written] == ["text 0"] * 3 + ["text 1"] * 3
    for patch in written:
        picture = np.asarray(Image.open(patch["file"]))
        assert np.abs(picture[100, 100].astype(int) - [patch["x"] // 4, patch["y"] // 4, 90]).max() <= 1
    with Image.open(tmp_path / "patches" / "sheet.png") as sheet:
        assert sheet.width > 300
    assert not list(tmp_path.rglob(".*"))


def test_a_slide_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.svs"):
        read_patches(tmp_path / "gone.svs", np.array([[0, 0]]), 64)
