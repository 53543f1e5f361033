"""Patches and pixels, checked against OpenSlide's own reads and slides whose tissue is known."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import slides
from data_prep.slides import open_slide
from data_prep.tiling import Tiles, read_patches, tile_slide

REAL = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "slides"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real slides in {REAL}: set PATHFLIP_TEST_DATA")


def _patches(slide, tiles: Tiles) -> np.ndarray:
    return np.concatenate(list(read_patches(slide, tiles)))


def _check_against_openslide(slide, tiles: Tiles) -> None:
    """Every patch is what OpenSlide reads at its coordinates, where no resampling is needed."""
    patches = _patches(slide, tiles)
    assert patches.shape == (len(tiles.coords), tiles.patch_size, tiles.patch_size, 3) and patches.dtype == np.uint8
    for corner, patch in zip(tiles.coords.tolist(), patches, strict=True):
        expected = Image.new("RGBA", (tiles.patch_size,) * 2, (255, 255, 255, 255))
        expected.alpha_composite(slide.image.read_region(tuple(corner), tiles.level, expected.size))
        np.testing.assert_array_equal(patch, np.asarray(expected)[..., :3])


@needs_real
def test_real_slide():
    with open_slide(REAL / "cmu-1-small-region.svs") as slide:
        assert (slide.width, slide.height, slide.mpp) == (2220, 2967, 0.499)
        tiles = tile_slide(slide)
        assert 40 <= len(tiles.coords) <= 60
        assert tiles[1:4] == (256, 256, 0) and tiles.coords.dtype == np.int32
        assert (tiles.coords % 256 == 0).all() and len(np.unique(tiles.coords, axis=0)) == len(tiles.coords)
        _check_against_openslide(slide, tiles)
        small = tile_slide(slide, patch_size=64)
        assert len(small.coords) > 12 * len(tiles.coords)
        # The mask follows the stain: patches taken are darker than those left.
        thumbnail = np.asarray(slide.image.get_thumbnail((555, 742)).convert("L"))
        taken = np.zeros(thumbnail.shape, bool)
        for x, y in tile_slide(slide, patch_size=64, min_tissue=0.5).coords // 4:
            taken[y : y + 16, x : x + 16] = True
        assert thumbnail[taken].mean() < 180 and np.percentile(thumbnail[~taken], 10) > 225


@needs_real
def test_real_dicom():
    with open_slide(REAL / "highdicom_sm_image.dcm") as slide:
        assert (slide.width, slide.height, slide.mpp) == (50, 50, 0.499)
        _check_against_openslide(slide, Tiles(np.array([[0, 0], [32, 0], [0, 32], [32, 32]], np.int32), 32, 32, 0))
        with pytest.raises(ValueError, match="highdicom_sm_image.dcm: no tissue"):  # it is glass, looked at
            tile_slide(slide, patch_size=32)


@needs_real
def test_real_slides_that_cannot_be_used():
    with pytest.raises(OSError, match=r"unopenable.tiff: OpenSlide cannot open it .*vips"):
        open_slide(REAL / "openslidepy_unopenable.tiff")
    with open_slide(REAL / "openslidepy_unreadable.svs") as slide:
        with pytest.raises(OSError, match=r"unreadable.svs: its pixels cannot be read .*copy it again"):
            tile_slide(slide)
    with pytest.raises(ValueError, match=r"boxes.tiff: claims 352.8 um per pixel.*--assume-mpp"):
        open_slide(REAL / "openslidepy_boxes.tiff")
    with open_slide(REAL / "openslidepy_boxes.tiff", assume_mpp=0.5) as slide:
        assert slide.mpp == 0.5
        tiles = tile_slide(slide, patch_size=16, mpp=2.0)  # levels of 4.016: patches of 64 px are read as 16
        assert tiles.patch_size_level0 == 64 and tiles.level == 2
        assert _patches(slide, tiles).shape == (len(tiles.coords), 16, 16, 3)


def test_patches_cover_the_tissue_and_nothing_else(draw, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.tiff", draw(1024, 1280, (128, 512, 256, 640), (640, 960, 768, 1216)))
    with open_slide(path) as slide:
        tiles = tile_slide(slide, patch_size=64)
        expected = {(x, y) for y in range(128, 512, 64) for x in range(256, 640, 64)}
        expected |= {(x, y) for y in range(640, 960, 64) for x in range(768, 1216, 64)}
        assert set(map(tuple, tiles.coords.tolist())) == expected
        _check_against_openslide(slide, tiles)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6])
def test_min_tissue_is_the_share_of_the_patch(draw, write_tiff, tmp_path, share):
    path = write_tiff(tmp_path / "s.tiff", draw(512, 512, (128, 384, 128, 288)))  # the right column is half full
    with open_slide(path) as slide:
        columns = set(tile_slide(slide, patch_size=64, min_tissue=share).coords[:, 0].tolist())
    assert columns == ({128, 192, 256} if share < 0.5 else {128, 192})


def test_patches_over_the_edge_are_white_outside(draw, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.tiff", draw(300, 330, (0, 300, 0, 330)))  # tissue all over: no glass to threshold
    with open_slide(path) as slide:
        tiles = tile_slide(slide, patch_size=64, min_tissue=0.1)
        assert len(tiles.coords) == 6 * 5
        patches = _patches(slide, tiles)
        last = patches[tiles.coords.tolist().index([320, 256])]
        assert (last[:, 10:] == 255).all() and (last[44:] == 255).all() and last[:44, :10].mean() < 190
        _check_against_openslide(slide, tiles)
        assert len(tile_slide(slide, patch_size=64, min_tissue=0.5).coords) == 5 * 5


def test_level_at_the_wanted_resolution_is_read_as_it_is(draw, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.tiff", draw(1024, 1024, (128, 896, 128, 896)), 0.25, (1, 2, 4))
    with open_slide(path) as slide:
        tiles = tile_slide(slide, patch_size=64, mpp=0.5)
        assert tiles.patch_size_level0 == 128 and tiles.level == 1 and len(tiles.coords) == 36
        _check_against_openslide(slide, tiles)
        assert tile_slide(slide, patch_size=64, mpp=0.3).level == 0
        assert tile_slide(slide, patch_size=64, mpp=4.0).level == 2


def test_other_resolutions_are_resampled(write_tiff, tmp_path):
    y, x = np.mgrid[0:1024, 0:1024] / 1024
    image = np.stack([150 + 60 * np.sin(9 * x), 90 + 50 * np.cos(7 * y), 160 + 40 * np.sin(5 * (x + y))], -1)
    path = write_tiff(tmp_path / "s.tiff", image.astype(np.uint8), 0.25, (1, 4))
    with open_slide(path) as slide:
        tiles = tile_slide(slide, patch_size=64, mpp=0.4)
        assert (tiles.patch_size_level0, tiles.level) == (102, 0)
        patches = _patches(slide, tiles)
        for (x, y), patch in zip(tiles.coords.tolist(), patches, strict=True):
            if max(x, y) + 102 <= 1024:
                expected = slide.image.read_region((x, y), 0, (102, 102)).convert("RGB").resize((64, 64), Image.BOX)
                assert np.abs(patch.astype(int) - np.asarray(expected)).max() <= 3


def test_patches_larger_than_a_block_are_averaged_down_as_they_are_read(write_tiff, tmp_path, monkeypatch):
    y, x = np.mgrid[0:1024, 0:1024] / 1024
    image = np.stack([150 + 60 * np.sin(9 * x), 90 + 50 * np.cos(7 * y), 160 + 40 * np.sin(5 * (x + y))], -1)
    path = write_tiff(tmp_path / "s.tiff", image.astype(np.uint8))
    with open_slide(path) as slide:
        tiles = tile_slide(slide, patch_size=32, mpp=7.0)
        assert tiles.patch_size_level0 == 448
        expected, sizes, read = _patches(slide, tiles), [], slides.Slide.read
        monkeypatch.setattr(slides, "BLOCK", 150)  # a patch is 448 px of the level: averaged by 2, in blocks
        monkeypatch.setattr(slides.Slide, "read", lambda self, *at: sizes.append(at[3:]) or read(self, *at))
        found = _patches(slide, tiles)
    assert max(max(size) for size in sizes) <= 150 and len(sizes) >= 9 * len(tiles.coords)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_many_patches_come_in_batches_in_the_order_of_coords(write_tiff, tmp_path):
    image = np.empty((2304, 2304, 3), np.uint8)
    image[..., 0], image[..., 2] = np.arange(2304) // 32 * 3, (np.arange(2304) // 32 * 3)[:, None]
    image[..., 1] = 0  # red says the column, blue the row of a patch of 32
    path = write_tiff(tmp_path / "s.tiff", np.maximum(image, [62, 0, 62]).astype(np.uint8))
    with open_slide(path) as slide:
        tiles = tile_slide(slide, patch_size=32)
        batches = list(read_patches(slide, tiles))
        assert len(tiles.coords) == 72 * 72 and max(map(len, batches)) <= 1024
        seen = np.concatenate([batch[:, 5, 7] for batch in batches])
        np.testing.assert_array_equal(seen[:, [0, 2]], np.maximum(tiles.coords // 32 * 3, 62))
