"""Tiles decoded by tifffile: OpenSlide's pixels, faults, and the files that stay with OpenSlide."""

import numpy as np
import pytest
import tifffile

from data_prep import build
from data_prep.settings import PrepareSettings
from data_prep.slide_image import write_slide
from data_prep.slides import open_slide
from pathflip_jax.data.records.records import Records

SIZE = (900, 1100)  # rows and columns: the last tiles are not full


@pytest.fixture(scope="module")
def image():
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    noise = np.random.default_rng(0).integers(-20, 20, (*SIZE, 3))
    waves = np.stack([rows // 3 + columns // 5, rows // 2, columns // 4], -1) % 180
    return np.clip(60 + waves + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory, image, write_tiff):
    """The same picture in JPEG with levels of 4 and 16, in deflate, and in JPEG with other tiles."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "jpeg.tiff", image)
    write_tiff(folder / "deflate.tiff", image, downsamples=(1, 2))
    options = {"photometric": "rgb", "tile": (128, 128), "metadata": None, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "small_tiles.tiff", image, compression="jpeg", resolution=(2e4, 2e4), **options)
    return folder


def places(slide):
    """Rectangles of all levels at whole pixels, inside, across the borders and outside."""
    rng = np.random.default_rng(1)
    for level, (width, height) in enumerate(slide.image.level_dimensions):
        for x, y in [(0, 0), (-40, -30), (width - 20, height - 20), (width + 5, 3), *rng.integers(0, width, (12, 2))]:
            corner = np.round(np.array([x, y]) * slide.image.level_downsamples[level]).astype(int)
            yield (*map(int, corner), level, 150, 90)


@pytest.mark.parametrize("name", ["jpeg", "deflate", "small_tiles"])
def test_pixels_are_those_of_openslide(slides, name):
    path = slides / f"{name}.tiff"
    with open_slide(path, 0.5) as theirs, open_slide(path, 0.5, reader="tifffile") as ours:
        assert (ours.image.reader, theirs.image.reader) == ("tifffile", "openslide") and not ours.notes
        used = 0
        for place in places(theirs):
            used += all(abs(v / d - round(v / d)) < 1e-3 for v in place[:2] for d in [_scale(ours, place[2])])
            np.testing.assert_array_equal(ours.read(*place), theirs.read(*place), err_msg=str(place))
        assert used > 10


def _scale(slide, level):
    return slide.image.level_downsamples[level]


def test_few_tiles_are_kept(slides, monkeypatch):
    monkeypatch.setattr("pathflip_jax.data.pixels.tiff_levels._KEPT_BYTES", 3 * 256 * 256 * 4)
    with open_slide(slides / "jpeg.tiff", reader="tifffile") as slide:
        whole = slide.read(0, 0, 0, SIZE[1], SIZE[0])
        assert len(slide.image.decoder._tiles) == 4
        np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 300), whole[:300, :300])


@pytest.mark.parametrize("planes", ["separate", "grey"])
def test_files_without_such_tiles_stay_with_openslide(tmp_path, image, planes):
    path, options = (
        tmp_path / "slide.tiff",
        {"metadata": None, "resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"},
    )
    if planes == "separate":
        data = np.moveaxis(image, -1, 0)
        tifffile.imwrite(path, data, photometric="rgb", planarconfig="separate", tile=(128, 128), **options)
    else:
        tifffile.imwrite(path, image[..., 0], photometric="minisblack", tile=(128, 128), **options)
    try:
        slide = open_slide(path, reader="tifffile")
    except (OSError, ValueError) as error:  # what OpenSlide does not open either
        with pytest.raises(type(error)):
            open_slide(path)
        return
    with slide:
        assert slide.image.reader == "openslide" and any(
            "decoded by OpenSlide instead of tifffile" in note for note in slide.notes
        )
        np.testing.assert_array_equal(slide.read(10, 10, 0, 50, 50)[..., 0], image[10:60, 10:60, 0])


def test_a_damaged_tile_names_the_file(slides, tmp_path):
    path = tmp_path / "damaged.tiff"
    data = bytearray((slides / "jpeg.tiff").read_bytes())
    with tifffile.TiffFile(slides / "jpeg.tiff") as file:
        page = file.pages[0]
        start, count = page.dataoffsets[5], page.databytecounts[5]
    data[start : start + count] = b"\xff" * count
    path.write_bytes(data)
    with open_slide(path, reader="tifffile") as slide:
        slide.read(0, 0, 0, 200, 200)
        with pytest.raises(OSError, match=f"{path}: its pixels cannot be read .tile 5 .*copy it again"):
            slide.read(0, 256, 0, 200, 200)


def test_records_are_the_same_by_either_reader(slides, tmp_path, caplog):
    found = {}
    for reader in ("openslide", "tifffile"):
        out = tmp_path / reader
        settings = PrepareSettings(patch_size=64, edge_um=64.0, min_tissue=0.0, workers=1, reader=reader)
        assert build.prepare(slides / "jpeg.tiff", out, settings).done == ["jpeg"]
        found[reader] = {path.name: path.read_bytes() for path in out.glob("*.tfrecord*")}
        assert len(Records(out)) == 1
    assert found["openslide"] == found["tifffile"]
    with pytest.raises(ValueError, match="--reader vips: expected one of openslide, tifffile, wsidicom"):
        PrepareSettings(reader="vips")
