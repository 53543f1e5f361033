"""Masks beside the records: they are those of tiling, whichever process reads the slide, and the sheet of all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_prep import mask_sheet
from data_prep.build import prepare
from data_prep.detectors import TissueSettings, find_tissue
from data_prep.given_masks import read_given_mask
from data_prep.mask_files import mask_files, read_facts, write_mask
from data_prep.mask_sheet import write_sheet
from data_prep.settings import PrepareSettings
from data_prep.slides import open_slide
from data_prep.tissue_mask import Tissue
from pathflip_jax.cli import main
from pathflip_jax.data.readers.outlines import rasterise, read_outlines

SMALL = {"patch_size": 64, "edge_um": 64.0, "workers": 1}
BOX = (128, 384, 128, 448)


@pytest.fixture
def slides(draw, write_tiff, tmp_path):
    (tmp_path / "slides").mkdir()
    for number in range(3):
        image = draw(512, 512, BOX, seed=number)
        image[240:330, 240:330] = 240
        write_tiff(tmp_path / f"slides/S{number}.tif", image)
    write_tiff(tmp_path / "slides/glass.tif", draw(512, 512))
    return tmp_path / "slides"


def random_tissue(shape=(90, 120), downsample=7.3, seed=0) -> Tissue:
    """Pieces with holes, islands in holes, single pixels, and tissue at the border."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    mask = (field > 0.02) ^ (ndimage.gaussian_filter(field, 4) > 0.01)
    return Tissue(mask, downsample, 0.0, "", np.full((90, 120, 3), 230, np.uint8), "embedded")


@pytest.mark.parametrize("seed", range(4))
def test_outlines_are_the_mask_pixel_by_pixel(slides, tmp_path, seed):
    tissue = random_tissue(downsample=512 / 120 * (1, 4)[seed % 2], seed=seed)
    with open_slide(slides / "S0.tif") as slide:
        sized = slide.__class__(slide.path, slide.image, int(120 * tissue.downsample), int(90 * tissue.downsample), 0.5)
        write_mask(tmp_path, "S0", sized, tissue)
        outlines = read_outlines(tmp_path / "tissue/S0.geojson")
        assert list(outlines) == ["Tissue"] and any(polygon.holes for polygon in outlines["Tissue"])
        found = rasterise(outlines["Tissue"], tissue.mask.shape, np.zeros(2), tissue.downsample)
        np.testing.assert_array_equal(found, tissue.mask)
        again = read_given_mask(tmp_path / "tissue/S0.geojson", sized, tissue.downsample)
        assert (again.mask[:90, :120] == tissue.mask).mean() > 0.999


def test_qupath_reads_closed_rings_within_the_slide(slides, tmp_path):
    prepare(slides / "S0.tif", tmp_path / "out", PrepareSettings(**SMALL))
    found = json.loads((tmp_path / "out/tissue/S0.geojson").read_text())
    assert found["type"] == "FeatureCollection" and len(found["features"]) == 1
    (feature,) = found["features"]
    assert feature["properties"] == {"objectType": "annotation", "classification": {"name": "Tissue"}}
    rings = feature["geometry"]["coordinates"]
    assert len(rings) == 2  # and the hole
    for ring in rings:
        assert ring[0] == ring[-1] and len(ring) >= 4 and (np.array(ring) >= 0).all() and (np.array(ring) <= 512).all()
    facts = read_facts(tmp_path / "out", "S0")
    assert (facts.width, facts.height, facts.mpp, facts.downsample, facts.found_by) == (512, 512, 0.5, 4.0, "embedded")
    assert facts.share == pytest.approx((256 * 320 - 90 * 90) / 512**2, rel=0.1)  # with its rim
    picture = np.asarray(Image.open(tmp_path / "out/tissue/S0.png"))
    assert picture.shape == (512, 512, 3)
    green = (picture == (0, 160, 70)).all(-1)
    rows, columns = np.nonzero(green)
    assert abs(rows.min() - 128) < 6 and abs(rows.max() - 384) < 6 and abs(columns.min() - 128) < 6
    assert abs(columns.max() - 448) < 6 and green[236:246].any() and not green[150:200, 150:200].any()


def check_masks(out: Path, slides: Path, ids=("S0", "S1", "S2", "glass"), detector=None) -> None:
    """The masks are those that tiling finds, and nothing else is there."""
    assert {path.name for path in (out / "tissue").iterdir()} == {
        f"{slide}.{suffix}" for slide in ids for suffix in ("png", "geojson")
    }
    for slide_id in ids:
        with open_slide(slides / f"{slide_id}.tif") as slide:
            expected = find_tissue(slide, 4.0, 1024.0, TissueSettings(detector))
        outlines = read_outlines(out / f"tissue/{slide_id}.geojson").get("Tissue", [])
        found = rasterise(outlines, expected.mask.shape, np.zeros(2), expected.downsample)
        np.testing.assert_array_equal(found, expected.mask)


@pytest.mark.parametrize("detector", [None, "lazyslide"])
def test_worker_processes_write_them(slides, tmp_path, detector):
    report = prepare(slides, tmp_path / "out", PrepareSettings(**SMALL | {"workers": 2}, tissue=detector))
    assert report.done == ["S0", "S1", "S2"] + ["glass"] * (detector == "lazyslide")  # which splits the grain in two
    check_masks(tmp_path / "out", slides, detector=detector)


def test_job_arrays_write_them_and_a_resumed_run_keeps_them(slides, tmp_path):
    out = tmp_path / "out"
    for task in range(2):
        prepare(slides, out, PrepareSettings(**SMALL, shard=(task, 2), slides_per_shard=2))
    check_masks(out, slides)
    before = {path: path.stat().st_mtime_ns for path in (out / "tissue").glob("S*")}
    prepare(slides, out, PrepareSettings(**SMALL, slides_per_shard=2))
    assert before == {path: path.stat().st_mtime_ns for path in (out / "tissue").glob("S*")}


def test_readers_of_an_encoder_on_the_devices_write_them(slides, tmp_path, small_encoder):
    recipe, weights = small_encoder
    settings = PrepareSettings(encoder=recipe.name, weights=weights, patch_size=64, mpp=0.5, edge_um=64.0, workers=1)
    report = prepare(slides, tmp_path / "out", settings)
    assert report.done == ["S0", "S1", "S2"]
    check_masks(tmp_path / "out", slides)


def test_removed_slides_take_their_masks_along(slides, tmp_path):
    out = tmp_path / "out"
    (slides / "glass.tif").unlink()
    prepare(slides, out, PrepareSettings(**SMALL))
    (slides / "S1.tif").unlink()
    prepare(slides, out, PrepareSettings(**SMALL))
    check_masks_of = [path.stem for path in sorted((out / "tissue").glob("*.png"))]
    assert check_masks_of == ["S0", "S1", "S2"]
    prepare(slides, out, PrepareSettings(**SMALL, prune=True))
    check_masks(out, slides, ids=("S0", "S2"))


def test_a_mask_edited_in_qupath_prepares_another_folder(slides, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    prepare(slides / "S0.tif", first, PrepareSettings(**SMALL))
    path, _ = mask_files(first, "S0")
    found = json.loads(path.read_text())
    found["features"][0]["geometry"]["coordinates"] = [[[0, 0], [128, 0], [128, 128], [0, 128], [0, 0]]]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": found["features"]}))
    assert read_facts(first, "S0") is None
    report = prepare(slides / "S0.tif", second, PrepareSettings(**SMALL, tissue_from=first / "tissue"))
    assert report.failed == []
    assert report.done == ["S0"] and report.timings.patches == 4
    assert read_facts(second, "S0").found_by == "S0.geojson"


def test_the_sheet_of_an_existing_folder_reads_no_slide(slides, tmp_path, monkeypatch, capsys):
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    command = ["prepare", str(slides), "--out", str(out), "--patch-size", "64", "--workers", "1", "--sheet"]
    assert main([*command, str(sheet)]) == 1  # glass
    assert f"tissue masks drawn in {sheet}" in capsys.readouterr().out
    image = np.asarray(Image.open(sheet))
    assert image.shape[1] == 1920 and (image == (190, 30, 30)).all(-1).sum() > 50  # glass, not in the records
    (slides / "glass.tif").unlink()
    monkeypatch.setattr("data_prep.build.run_each", lambda work, some, workers: (work(1 / 0) for _ in some))
    assert main([*command, str(tmp_path / "sheet.pdf")]) == 0
    assert (tmp_path / "sheet.pdf").read_bytes().startswith(b"%PDF")


def test_slides_of_an_earlier_version_get_masks_for_the_sheet(slides, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (slides / "glass.tif").unlink()
    prepare(slides, out, PrepareSettings(**SMALL))
    before = (out / "pathflip-00000.tfrecord").read_bytes()
    for path in (out / "tissue").iterdir():
        path.unlink()
    report = prepare(slides, out, PrepareSettings(**SMALL, sheet=tmp_path / "sheet.png"))
    assert report.done == [] and (out / "pathflip-00000.tfrecord").read_bytes() == before
    check_masks(out, slides, ids=("S0", "S1", "S2"))
    assert (tmp_path / "sheet.png").exists()


def test_the_last_task_of_a_job_array_draws_the_sheet(slides, tmp_path):
    (slides / "glass.tif").unlink()
    sheet, array = tmp_path / "sheet.png", {"slides_per_shard": 2, "sheet": tmp_path / "sheet.png"}
    report = prepare(slides, tmp_path / "out", PrepareSettings(**SMALL, **array, shard=(0, 2)))
    assert not sheet.exists() and "--sheet is drawn by the task that completes the folder" in report.notes
    prepare(slides, tmp_path / "out", PrepareSettings(**SMALL, **array, shard=(1, 2)))
    assert sheet.exists()


@pytest.mark.parametrize(("count", "pages"), [(1, 1), (13, 1), (25, 2), (60, 3)])
def test_large_cohorts_have_pages(slides, tmp_path, count, pages):
    with open_slide(slides / "S0.tif") as slide:
        write_mask(tmp_path, "S000", slide, random_tissue())
    for number in range(1, count):
        for path in mask_files(tmp_path, "S000"):
            path.with_stem(f"S{number:03}").write_bytes(path.read_bytes())
    files = write_sheet(tmp_path, ["S000"], tmp_path / "sheet.png")
    expected = ["sheet.png"] if pages == 1 else [f"sheet-{number + 1}.png" for number in range(pages)]
    assert [path.name for path in files] == expected and all(path.exists() for path in files)
    write_sheet(tmp_path, ["S000"], tmp_path / "sheet.pdf")
    assert int(re.findall(rb"/Count (\d+)", (tmp_path / "sheet.pdf").read_bytes())[-1]) == pages


def test_captions_say_what_needs_a_look(slides, tmp_path):
    with open_slide(slides / "S0.tif") as slide:
        write_mask(tmp_path, "A", slide, random_tissue()._replace(found_by="otsu"))
    facts = read_facts(tmp_path, "A")._replace(share=0.051)
    assert mask_sheet._caption(facts, True) == (False, "5.1% tissue, 0.3 x 0.3 mm, otsu")
    assert mask_sheet._caption(facts, False) == (True, "not in the records: 5.1% tissue, 0.3 x 0.3 mm, otsu")
    assert mask_sheet._caption(None, True) == (True, "no mask kept")
    with pytest.raises(ValueError, match="no tissue mask to draw"):
        write_sheet(tmp_path / "nothing", [], tmp_path / "sheet.png")
