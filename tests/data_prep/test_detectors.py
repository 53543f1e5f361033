"""Detectors of other tools against OpenCV, and the settings of tissue masks on their way to the folder of records."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import detector_names, detectors
from data_prep.build import prepare
from data_prep.detectors import DETECTORS, TissueSettings, find_tissue
from data_prep.settings import PrepareSettings
from data_prep.slides import open_slide
from data_prep.tiling import tile_slide
from pathflip_jax.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "tissue_opencv.npz"
GLASS, PINK = (240, 240, 242), (200, 120, 180)
PIXEL = 4.0  # um
LATER = ("tissue", "tissue_from", "holes_um2", "smallest_um2")  # settings that earlier versions lack


def blobs(edge: int = 240) -> np.ndarray:
    """Stained blobs on glass with grain, of whole numbers alone: the same on every machine."""
    rng = np.random.default_rng(7)

    def smooth(values: np.ndarray, width: int) -> np.ndarray:
        for axis in (0, 1) * 3:
            values = sum(np.roll(values, shift, axis) for shift in range(-(width // 2), width // 2 + 1)) // width
        return values

    field = np.clip(smooth(rng.integers(0, 1 << 16, (edge, edge)), 17) - (1 << 15) + 200, 0, 2500)
    grain = np.stack([smooth(rng.integers(-(1 << 12), 1 << 12, (edge, edge)), 3) for _ in range(3)], -1) >> 7
    picture = 240 - field[..., None] * np.array([40, 95, 45]) // 2500 + grain * (field[..., None] + 900) // 2500
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["clam", "clam_settings", "lazyslide"])
def test_masks_are_those_of_opencv(write_tiff, tmp_path, name):
    """Masks by OpenCV 5.0 with the tools' settings; areas differ, since OpenCV measures between pixel centres."""
    settings = {
        "clam": TissueSettings("clam", smallest_um2=0.0),
        "clam_settings": TissueSettings("clam", smallest_um2=300 * PIXEL**2, holes_um2=40 * PIXEL**2),
        "lazyslide": TissueSettings("lazyslide"),
    }[name]
    path = write_tiff(tmp_path / "s.tif", blobs(), mpp=PIXEL)
    with open_slide(path, override_mpp=PIXEL) as slide:
        found = find_tissue(slide, 2.0, 1e9, settings)
    with np.load(GOLDEN) as golden:
        expected = np.unpackbits(golden[name]).reshape(240, 240).astype(bool)
    assert found.downsample == 1 and found.found_by == name.partition("_")[0]
    assert 0.15 < expected.mean() < 0.7
    assert (found.mask != expected).mean() < 2e-3


def test_clam_drops_pieces_below_its_area(write_tiff, tmp_path):
    """100 patches of 512 x 512 px of level 0."""
    image = np.full((5632, 6144, 3), 240, np.uint8)
    image[100:5350, 64:5120] = PINK  # 26.5 megapixels
    image[300:5000, 5500:6000] = PINK  # 2.4
    path = write_tiff(tmp_path / "s.tif", image, downsamples=(1, 16))
    with open_slide(path) as slide:
        mask = find_tissue(slide, 2.0, 1e9, TissueSettings("clam")).mask
        small = find_tissue(slide, 2.0, 1e9, TissueSettings("clam", smallest_um2=1e5)).mask
    assert mask.shape == (352, 384) and mask[10:330, 10:310].all() and not mask[:, 330:].any()
    assert small[100, 360] and small[100, 100]


def test_clam_keeps_the_eight_largest_holes_of_a_piece(write_tiff, tmp_path, monkeypatch):
    monkeypatch.setattr(detectors, "_CLAM_AREA", 10)  # holes of more than 160 px
    image = np.full((1000, 1000, 3), PINK, np.uint8)
    for number in range(10):
        image[50 : 80 + number * 4, 20 + number * 95 : 60 + number * 95] = 240
    image[500:510, 500:510] = 240
    with open_slide(write_tiff(tmp_path / "s.tif", image)) as slide:
        mask = find_tissue(slide, 1.0, 1e9, TissueSettings("clam")).mask
        assert mask[65, 40:230:95].all() and not mask[65, 230:900:95].any() and mask[505, 505]
        mask = find_tissue(slide, 1.0, 1e9, TissueSettings("clam", holes_um2=50.0)).mask
        assert not mask[65, 40:900:95].any() and mask[505, 505]


def test_otsu_is_a_threshold_alone(write_tiff, tmp_path):
    image = np.full((512, 512, 3), 240, np.uint8)
    image[100:400, 100:400] = PINK
    image[200:204, 200:204] = 240
    image[20:24, 20:24] = PINK
    with open_slide(write_tiff(tmp_path / "s.tif", image)) as slide:
        mask = find_tissue(slide, 4.0, 1e9, TissueSettings("otsu")).mask
        np.testing.assert_array_equal(mask, (image[::4, ::4] == PINK).all(-1))
        cleaned = find_tissue(slide, 4.0, 1e9, TissueSettings("otsu", holes_um2=100.0, smallest_um2=100.0)).mask
        assert cleaned[50, 50] and not cleaned[5, 5]
        even = write_tiff(tmp_path / "even.tif", np.full((128, 128, 3), 200, np.uint8))
    for name in DETECTORS:
        with open_slide(even) as slide:
            assert not find_tissue(slide, 4.0, 1e9, TissueSettings(name)).mask.any()


def test_holes_and_pieces_of_the_embedded_detector(draw, write_tiff, tmp_path):
    image = draw(1024, 1024, (128, 896, 128, 896))
    image[400:520, 400:520] = GLASS  # 60 um: 3,600 um2
    image[20:44, 20:44] = PINK  # 12 um: 144 um2
    with open_slide(write_tiff(tmp_path / "s.tif", image)) as slide:

        def mask(**settings):
            return find_tissue(slide, 4.0, 4096.0, TissueSettings(**settings)).mask

        assert mask()[115, 115] and not mask()[8, 8]
        assert not mask(holes_um2=2000.0)[115, 115] and mask(holes_um2=5000.0)[115, 115]
        assert mask(smallest_um2=100.0)[8, 8] and not mask(smallest_um2=1e6).any()
        assert tile_slide(slide, 32, tissue=TissueSettings(holes_um2=5000.0)).coords.tolist().count([448, 448]) == 1
        assert tile_slide(slide, 32, tissue=TissueSettings()).coords.tolist().count([448, 448]) == 0


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {}),
        ({"tissue": "embedded"}, {}),
        ({"tissue": "otsu"}, {"tissue": "otsu"}),
        ({"holes_um2": 5.0, "smallest_um2": 0.0}, {"holes_um2": 5.0, "smallest_um2": 0.0}),
        ({"tissue_from": "."}, {"tissue_from": True}),
        ({"tissue_from": ".", "tissue": "embedded"}, {"tissue_from": True, "tissue": "embedded"}),
    ],
)
def test_folders_are_tied_to_what_is_set(settings, kept):
    found = PrepareSettings(**settings).of_records()
    assert {name: found[name] for name in LATER if found[name] is not None} == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tissue": "hest"}, "--tissue hest: expected embedded, otsu, clam, lazyslide"),
        ({"tissue_from": "/nowhere"}, "--tissue-from /nowhere: no such folder"),
        ({"tissue": "clam", "keep_ink": True}, "--keep-ink: has no effect with --tissue clam"),
        ({"tissue_from": ".", "keep_ink": True}, "--keep-ink: has no effect on masks"),
        ({"holes_um2": -1.0}, "--holes -1: expected an area"),
        ({"smallest_um2": float("nan")}, "--smallest nan: expected an area"),
        ({"sheet": "x.jpg"}, "--sheet x.jpg: expected a file that ends in .png or .pdf"),
    ],
    ids=["name", "folder", "ink", "ink of masks", "holes", "smallest", "sheet"],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**settings)


def test_a_folder_of_an_earlier_version_goes_on_and_refuses_another_detector(draw, write_tiff, tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for name in "AB":
        write_tiff(slides / f"{name}.tif", draw(512, 512, (100, 400, 100, 400)))
    small = {"patch_size": 64, "edge_um": 64.0, "workers": 1}
    assert prepare(slides / "A.tif", out, PrepareSettings(**small)).done == ["A"]
    plan = (out / "plan.json").read_text()
    earlier = [line for line in plan.splitlines() if not any(f'"{key}"' in line for key in LATER)]
    assert len(earlier) == len(plan.splitlines()) - 4
    (out / "plan.json").write_text("\n".join(earlier))
    with pytest.raises(ValueError, match="tissue None, now 'otsu'"):
        prepare(slides, out, PrepareSettings(**small, tissue="otsu"))
    with pytest.raises(ValueError, match="holes_um2 None, now 10.0"):
        prepare(slides, out, PrepareSettings(**small, holes_um2=10.0))
    assert prepare(slides, out, PrepareSettings(**small)).done == ["B"]


def test_the_command_offers_all_detectors(draw, write_tiff, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    assert "{" + ",".join(DETECTORS) + "}" in capsys.readouterr().out
    assert tuple(DETECTORS) == detector_names.DETECTORS
    path = write_tiff(tmp_path / "s.tif", draw(512, 512, (100, 400, 100, 400)))
    options = ["--patch-size", "64", "--workers", "1", "--tissue", "otsu", "--holes", "9", "--smallest", "4"]
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), *options]) == 0
    plan = (tmp_path / "out/plan.json").read_text()
    assert '"tissue": "otsu"' in plan and '"holes_um2": 9' in plan and '"smallest_um2": 4' in plan
