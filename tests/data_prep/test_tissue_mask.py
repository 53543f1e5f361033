"""The tissue of slides whose tissue is known."""

import numpy as np
import pytest
from scipy import ndimage

from data_prep import tissue_mask as masks
from data_prep.slides import open_slide
from data_prep.tiling import tile_slide
from data_prep.tissue_mask import tissue_mask

GLASS, PINK = (240, 240, 242), (200, 120, 180)


def test_mask_of_a_huge_slide_is_coarser_than_asked(draw, write_tiff, tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "s.tiff", draw(1024, 1280, (128, 512, 256, 640), (640, 960, 768, 1216)))
    monkeypatch.setattr(masks, "_MASK_PIXELS", 6000)
    with open_slide(path) as slide:
        mask, downsample, *_ = tissue_mask(slide, 4)
        assert mask.size <= 6000 and 14 < downsample <= 16 and mask.shape == (-(-1024 // 15), -(-1280 // 15))
        tiles = tile_slide(slide, patch_size=64, min_tissue=0.5)
        expected = {(x, y) for y in range(128, 512, 64) for x in range(256, 640, 64)}
        expected |= {(x, y) for y in range(640, 960, 64) for x in range(768, 1216, 64)}
        assert set(map(tuple, tiles.coords.tolist())) == expected


@pytest.mark.parametrize(
    ("box", "color"),
    [
        ((), PINK),
        ((0, 512, 0, 512), (232, 226, 214)),  # yellowed glass
        ((100, 400, 100, 400), (12, 14, 11)),  # black ink
        ((100, 400, 100, 400), (40, 160, 70)),  # green pen
        ((0, 512, 0, 512), (255, 255, 255)),
        ((0, 512, 0, 512), (0, 0, 0)),
    ],
    ids=["glass", "yellow", "black ink", "green pen", "white", "black"],
)
def test_no_tissue(draw, write_tiff, tmp_path, box, color):
    image = draw(512, 512, *[box] * bool(box), color=color)
    with open_slide(write_tiff(tmp_path / "s.tiff", image)) as slide:
        with pytest.raises(ValueError, match=r"s.tiff: no tissue: none of 64 patches.*--min-tissue"):
            tile_slide(slide, patch_size=64)


def test_pale_tissue_beside_dark_is_kept_and_ink_is_not(draw, write_tiff, tmp_path):
    image = draw(768, 1024, (64, 704, 64, 320))
    image[64:704, 320:576] = draw(640, 256, (0, 640, 0, 256), color=(228, 200, 216))
    image[64:704, 700:900] = (15, 15, 18)
    with open_slide(write_tiff(tmp_path / "s.tiff", image)) as slide:
        coords = tile_slide(slide, patch_size=64).coords
    assert set(coords[:, 0].tolist()) == set(range(64, 576, 64))


def test_mask_fills_small_holes_drops_specks_and_works_from_any_level(draw, write_tiff, tmp_path):
    image = draw(1024, 1024, (128, 896, 128, 896))
    image[400:480, 400:480] = GLASS  # 40 um: a lumen
    image[560:880, 520:880] = GLASS  # 170 um: outside of the tissue
    image[20:40, 20:40] = PINK  # dust
    masks = []
    for name, downsamples in (("one.tiff", (1,)), ("three.tiff", (1, 4, 16))):
        with open_slide(write_tiff(tmp_path / name, image, downsamples=downsamples)) as slide:
            mask, downsample, *_ = tissue_mask(slide, 8)
            masks.append(mask.repeat(int(downsample), 0).repeat(int(downsample), 1))
            assert downsample == 8
    one, three = masks
    assert one[440, 440] and one[200, 200] and not one[700, 700] and not one[30, 30] and not one[1000, 1000]
    assert (one != three).mean() < 0.01
    truth = np.zeros((1024, 1024), bool)
    truth[128:896, 128:896] = True
    truth[560:880, 520:880] = False
    assert not (one & ~ndimage.binary_dilation(truth, iterations=12)).any()
    assert not (~one & ndimage.binary_erosion(truth, iterations=12)).any()


@pytest.mark.parametrize(("patch_size", "kept"), [(64, False), (128, False), (256, True)])
def test_glass_within_tissue_counts_as_tissue_only_where_no_patch_fits(draw, write_tiff, tmp_path, patch_size, kept):
    image = draw(1024, 1024, (0, 1024, 0, 1024))
    image[384:512, 256:512] = GLASS  # 64 by 128 um, between two pieces
    with open_slide(write_tiff(tmp_path / "s.tiff", image)) as slide:
        coords = tile_slide(slide, patch_size=patch_size, min_tissue=0.7).coords.tolist()
    glass = {(x, y) for x in range(256, 512, patch_size) for y in range(384, 512, patch_size)}
    assert len(coords) == (1024 // patch_size) ** 2 - (0 if kept else len(glass))
    assert kept or not glass & set(map(tuple, coords))


def test_fluorescence_and_grey_pictures_say_what_they_are(draw, write_tiff, tmp_path):
    dark = np.random.default_rng(0).integers(0, 12, (512, 512, 3)).astype(np.uint8)
    dark[100:300, 100:300, 2] = 220  # DAPI, shown blue
    with open_slide(write_tiff(tmp_path / "dark.tiff", dark)) as slide:
        with pytest.raises(
            ValueError, match="dark.tiff: its image has a dark background and no bright glass, as in fluor"
        ):
            tile_slide(slide, patch_size=64)
    grey = draw(512, 512)[..., :1].repeat(3, -1)
    with open_slide(write_tiff(tmp_path / "grey.tiff", grey)) as slide:
        with pytest.raises(ValueError, match="grey.tiff: no tissue.*no colour.*is it the H&E slide"):
            tile_slide(slide, patch_size=64)
    padded = np.zeros((1024, 1024, 3), np.uint8)
    padded[:512, :512] = draw(512, 512, (100, 400, 100, 400))  # a converter's black around a brightfield slide
    with open_slide(write_tiff(tmp_path / "padded.tiff", padded)) as slide:
        assert len(tile_slide(slide, patch_size=64).coords) >= 20


def test_the_faint_rim_of_strong_stain_is_glass(write_tiff, tmp_path):
    """Stain that fades over 48 px: the mask ends before its last trace, and loses nothing of the even part."""
    stained = np.clip((512 + 48 - np.arange(1024)) / 48, 0, 1)[None, :, None]
    image = (243 * (1 - stained) + np.array([90, 30, 80]) * stained).repeat(1024, 0).astype(np.uint8)
    image[:, :64] = 243
    with open_slide(write_tiff(tmp_path / "s.tiff", image)) as slide:
        mask, downsample, *_ = tissue_mask(slide, 16, keep_ink=True)  # an even colour is one dye
    columns = np.nonzero(mask.any(0))[0]
    assert downsample == 16 and columns.min() * 16 <= 64 and 512 <= (columns.max() + 1) * 16 <= 512 + 32
