"""Masks made elsewhere: what they cover, and those that do not belong to the slide."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from data_prep.build import prepare
from data_prep.detectors import TissueSettings, find_tissue
from data_prep.given_masks import find_mask, read_given_mask
from data_prep.settings import PrepareSettings
from data_prep.slides import open_slide
from data_prep.tiling import tile_slide
from pathflip_jax.cli import main
from pathflip_jax.data.records.records import Records

WIDTH, HEIGHT = 1000, 800
BOX = (200, 600, 400, 900)  # top, bottom, left, right of the tissue


def rectangle(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(kind, coordinates, name=None, **properties):
    if name is not None:
        properties |= {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}}
    return {"type": "Feature", "properties": properties, "geometry": {"type": kind, "coordinates": coordinates}}


def save(path, *features, **members):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **members}))
    return path


def save_png(path, values, mode=None):
    Image.fromarray(values, mode).save(path)
    return path


@pytest.fixture
def slide(draw, write_tiff, tmp_path):
    with open_slide(write_tiff(tmp_path / "S1.tif", draw(HEIGHT, WIDTH, BOX))) as opened:
        yield opened


def box_of(mask, downsample=1):
    rows, columns = np.nonzero(mask)
    return tuple(int(value * downsample) for value in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))


def test_qupath_outlines_with_holes_parts_and_ignored_areas(slide, tmp_path):
    hole = rectangle(500, 300, 600, 400)
    parts = [[rectangle(100, 100, 300, 300)], [rectangle(700, 600, 800, 700)]]
    path = save(
        tmp_path / "m.geojson",
        feature("Polygon", [rectangle(400, 200, 900, 600), hole], "Tissue"),
        feature("MultiPolygon", parts),  # unclassified
        feature("Polygon", [rectangle(800, 200, 1000, 800)], "Ignore*"),
        feature("Point", [5, 5], "Tissue"),
    )
    found = read_given_mask(path, slide, 4.0)
    expected = np.zeros((200, 250), bool)
    expected[50:150, 100:225] = True
    expected[75:100, 125:150] = False
    expected[25:75, 25:75] = expected[150:175, 175:200] = True
    expected[50:, 200:] = False
    np.testing.assert_array_equal(found.mask, expected)
    assert found.downsample == 4 and found.found_by == "m.geojson" and found.picture.shape == (800, 1000, 3)
    assert found.notes == (
        "its mask of tissue: 1 Point left out because they have no area (features 3, counted from 0)",
    )


def test_tridents_contours(slide, tmp_path):
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}
    path = save(tmp_path / "S1.geojson", feature("Polygon", [rectangle(400, 200, 900, 600)], tissue_id=0), crs=crs)
    assert box_of(read_given_mask(path, slide, 4.0).mask, 4) == BOX


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((800, 1000), "L"), ((100, 125), "1"), ((80, 100), "RGB"), ((53, 67), "L"), ((27, 34), "RGBA"), ((80, 100), "16")],
)
def test_png_masks_of_any_size(slide, tmp_path, shape, kind):
    values = np.zeros(shape, np.uint8)
    scale = np.array(shape) / (HEIGHT, WIDTH)
    top, bottom, left, right = np.round(np.array(BOX) * np.repeat(scale, 2)).astype(int)
    values[top:bottom, left:right] = 255
    if kind == "1":
        save_png(tmp_path / "S1.png", values > 0)
    elif kind == "RGB":
        save_png(tmp_path / "S1.png", values[..., None].repeat(3, -1))
    elif kind == "RGBA":
        save_png(tmp_path / "S1.png", np.dstack([values.clip(9)] * 3 + [values]))
    elif kind == "16":
        save_png(tmp_path / "S1.png", (values > 0).astype(np.uint16))
    else:
        save_png(tmp_path / "S1.png", (values > 0).astype(np.uint8))
    found = read_given_mask(tmp_path / "S1.png", slide, 4.0)
    assert found.mask.shape == (200, 250)
    assert np.abs(np.subtract(box_of(found.mask, 4), BOX)).max() <= 0.5 / scale.min() + 4


def test_areas_apply_to_given_masks_only_when_they_are_set(slide, tmp_path):
    values = np.zeros((200, 250), np.uint8)
    values[50:150, 100:200] = 1
    values[80:84, 120:124] = 0  # 64 um2
    values[10:12, 10:12] = 1  # 16 um2
    path = save_png(tmp_path / "S1.png", values)

    def mask(**settings):
        return find_tissue(slide, 4.0, 1e6, TissueSettings(source=path, **settings)).mask

    np.testing.assert_array_equal(mask(), values > 0)
    assert mask(holes_um2=100.0)[82, 122] and not mask(holes_um2=60.0)[82, 122]
    assert not mask(smallest_um2=20.0)[11, 11] and mask(smallest_um2=10.0)[11, 11]


def test_geojson_comes_before_png(tmp_path):
    for name in ("A.png", "A.geojson", "B.png"):
        (tmp_path / name).touch()
    assert find_mask(tmp_path, "A") == tmp_path / "A.geojson"
    assert find_mask(tmp_path, "B") == tmp_path / "B.png" and find_mask(tmp_path, "C") is None


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (rectangle(0, 0, 1500, 700), r"reach from 0, 0 to 1500, 700, but S1.tif has 1000 x 800 px.*another slide"),
        (rectangle(-50, 0, 500, 700), "another slide, or of another scan of it; export them again"),
        (rectangle(200, 400, 600, 900), "x and y seem swapped"),
        (rectangle(100, 50, 225, 150), r"on glass, and on the tissue of S1.tif when enlarged 4 times: coord.*by 4"),
    ],
    ids=["slide", "negative", "swapped", "level"],
)
def test_outlines_of_something_else_are_refused(slide, tmp_path, ring, message):
    path = save(tmp_path / "m.geojson", feature("Polygon", [ring], "Tissue"))
    with pytest.raises(ValueError, match=f"m.geojson: .*{message}"):
        read_given_mask(path, slide, 4.0)


def test_small_outlines_of_tissue_and_of_glass_are_taken_as_they_are(slide, tmp_path):
    for ring in (rectangle(410, 210, 500, 300), rectangle(20, 20, 60, 60)):
        path = save(tmp_path / "m.geojson", feature("Polygon", [ring], "Tissue"))
        assert read_given_mask(path, slide, 4.0).mask.any()


@pytest.mark.parametrize("shape", [(100, 100), (125, 100), (80, 110), (1600, 2000), (10, 30)])
def test_png_of_another_size_is_refused(slide, tmp_path, shape):
    path = save_png(tmp_path / "S1.png", np.ones(shape, np.uint8))
    with pytest.raises(ValueError, match=rf"S1.png: a mask of {shape[1]} x {shape[0]} px, but S1.tif has 1000 x 800"):
        read_given_mask(path, slide, 4.0)


def test_files_that_are_no_masks_are_refused(slide, tmp_path):
    save_png(tmp_path / "p.png", np.random.default_rng(0).integers(0, 255, (80, 100, 3)).astype(np.uint8))
    with pytest.raises(ValueError, match=r"p.png: a picture of \d+ colours or more, not a mask"):
        read_given_mask(tmp_path / "p.png", slide, 4.0)
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n, cut off")
    with pytest.raises(ValueError, match="p.png: not a readable PNG"):
        read_given_mask(tmp_path / "p.png", slide, 4.0)
    path = save(tmp_path / "m.geojson", feature("Polygon", [rectangle(1, 1, 9, 9)], "Ignore*"))
    with pytest.raises(ValueError, match="no outline of tissue, only 1 of classes that begin with Ignore"):
        read_given_mask(path, slide, 4.0)
    with pytest.raises(ValueError, match="S1.tif: no tissue"):
        tile_slide(slide, 64, tissue=TissueSettings(source=save(tmp_path / "empty.geojson")))


def test_a_slide_without_a_mask_fails_alone_unless_a_detector_is_named(draw, write_tiff, tmp_path, capsys):
    slides, masks = tmp_path / "slides", tmp_path / "masks"
    slides.mkdir(), masks.mkdir()
    for name in ("S1", "S2"):
        write_tiff(slides / f"{name}.tif", draw(HEIGHT, WIDTH, BOX))
    save(masks / "S1.geojson", feature("Polygon", [rectangle(0, 0, 256, 256)], "Tissue"))
    small = {"patch_size": 64, "edge_um": 64.0, "workers": 1, "tissue_from": masks}
    report = prepare(slides, tmp_path / "out", PrepareSettings(**small))
    assert report.done == ["S1"] and [failure.slide for failure in report.failed] == ["S2"]
    assert re.search(
        r"S2.tif: no mask of its tissue: expected S2.geojson or S2.png in .*masks; add it, or let a detector",
        report.failed[0].error,
    )
    found = Records(tmp_path / "out").read(0)
    assert set(map(tuple, found.coords.tolist())) == {(x, y) for x in range(0, 256, 64) for y in range(0, 256, 64)}
    command = ["prepare", str(slides), "--out", str(tmp_path / "both"), "--patch-size", "64", "--workers", "1"]
    assert main([*command, "--tissue-from", str(masks), "--tissue", "embedded"]) == 0
    assert "no mask in --tissue-from, tissue found by embedded: 1 slide (S2)" in " ".join(
        capsys.readouterr().out.split()
    )
