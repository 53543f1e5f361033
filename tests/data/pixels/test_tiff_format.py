"""TIFF that OpenSlide does not open, or reads wrongly: pixels against tifffile's own, and what is refused."""

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from data_prep.slides import open_slide
from pathflip_jax.data.pixels import tiff_format, tiff_levels
from pathflip_jax.data.pixels.source import DamagedPixels, LevelSource, OpenSlideSource, Unreadable
from pathflip_jax.data.pixels.sources import open_source
from pathflip_jax.data.readers import slide_pixels

HEIGHT, WIDTH = 300, 430  # the last tiles are not full
MICRONS = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
NAMED = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}, **MICRONS}
WIDE = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
RGB = (WIDE >> 8).astype(np.uint8)
FORMS = {  # name: image, options of tifffile
    "planes of an OME-TIFF": (RGB.transpose(2, 0, 1), {"photometric": "minisblack", "metadata": NAMED}),
    "separate planes": (RGB.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate", "metadata": None}),
    "16 bits": (WIDE, {"photometric": "rgb", "metadata": None}),
    "16 bits in planes": (WIDE.transpose(2, 0, 1), {"photometric": "minisblack", "metadata": NAMED}),
    "8 bits": (RGB, {"photometric": "rgb", "metadata": {"axes": "YXS", **MICRONS}}),
}
LAYOUTS = {
    "tiles": {"tile": (128, 128)},
    "strips": {"rowsperstrip": 7},
    "one strip": {"rowsperstrip": HEIGHT},
}


def as_8_bits(values):
    """The nearest 8-bit value to the share of the full range, by arithmetic of its own."""
    return values if values.dtype == np.uint8 else ((values.astype(np.int64) * 510 + 65535) // 131070).astype(np.uint8)


def write(path, image, options, levels=1):
    """A pyramid by striding: in SubIFDs for an OME-TIFF, else in pages marked as reduced."""
    ome = bool(options.get("metadata"))
    planar = image.shape[0] == 3
    with tifffile.TiffWriter(path, ome=ome, byteorder=options.pop("byteorder", None)) as out:
        out.write(image, subifds=levels - 1 if ome else None, **options)
        for step in 2 ** np.arange(1, levels):
            level = image[:, ::step, ::step] if planar else image[::step, ::step]
            out.write(level, subfiletype=1, **options | {"metadata": None})
    return path


@pytest.mark.parametrize("codec", [None, "deflate", "lzw", "zstd", "jpeg2000"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_pixels_are_those_of_tifffile(tmp_path, form, layout, codec):
    image, options = FORMS[form]
    predictor = {"predictor": True} if codec in ("deflate", "lzw") and layout == "tiles" else {}
    options = options | LAYOUTS[layout] | {"compression": codec} | predictor
    name = "s.ome.tif" if options.get("metadata") else "s.tif"
    order = ">" if layout == "one strip" and codec != "jpeg2000" else "<"  # tifffile swaps the bytes of JPEG 2000
    path = write(tmp_path / name, image, options | {"byteorder": order}, levels=3)
    with tifffile.TiffFile(path) as file:
        found = [level.asarray() for level in file.series[0].levels]
    expected = [as_8_bits(level.transpose(1, 2, 0) if level.shape[0] == 3 else level) for level in found]
    np.testing.assert_array_equal(expected[0], as_8_bits(RGB if image.dtype == np.uint8 else WIDE))  # lossless
    with tiff_format.open_tiff(path) as slide:
        assert slide.level_dimensions == tuple((level.shape[1], level.shape[0]) for level in expected)
        for number, level in enumerate(expected):
            height, width = level.shape[:2]
            np.testing.assert_array_equal(slide.read(0, 0, number, width, height), level)
            framed = np.pad(level, ((5, 9), (5, 9), (0, 0)), constant_values=255)
            start = round(-5 * slide.level_downsamples[number])
            np.testing.assert_array_equal(slide.read(start, start, number, width + 14, height + 14), framed)
            x, y = int(40 * slide.level_downsamples[number]), int(20 * slide.level_downsamples[number])
            np.testing.assert_array_equal(slide.read(x, y, number, 50, 30), level[20:50, 40:90])


@pytest.mark.parametrize("form", ["planes of an OME-TIFF", "16 bits", "16 bits in planes", "8 bits"])
def test_prepare_and_the_pictures_open_the_same_files(tmp_path, form):
    image, options = FORMS[form]
    layout = LAYOUTS["strips"] if form == "8 bits" else LAYOUTS["tiles"]
    path = write(tmp_path / "s.ome.tif", image, options | layout)
    expected = as_8_bits(WIDE if image.dtype == np.uint16 else RGB)
    with open_slide(path, assume_mpp=0.5) as slide:
        assert slide.image.reader == "tifffile" and slide.mpp == 0.5
        np.testing.assert_array_equal(slide.read(0, 0, 0, WIDTH, HEIGHT), expected)
        assert [note for note in slide.notes if "65535 is read as white" in note] or image.dtype == np.uint8
    facts, arrays = slide_pixels.thumbnail(str(path), WIDTH)
    np.testing.assert_array_equal(arrays["picture"], expected)
    assert facts == {"width": WIDTH} and slide_pixels.detect(str(path))[0]["format"]
    _, arrays = slide_pixels.patches(str(path), [[64, 32]], 128, 128)
    np.testing.assert_array_equal(arrays["patches"][0], expected[32:160, 64:192])
    facts, _ = slide_pixels.pyramid(str(path))
    assert (facts["width"], facts["height"]) == (WIDTH, HEIGHT)
    if options["metadata"]:
        assert facts["mpp"] == 0.5
    assert slide_pixels.tile(str(path), facts["levels"] - 1, 0, 0, 90)[1]["jpeg"].size
    facts, arrays = slide_pixels.colours(str(path), [[0, 0]], 64, 10**9)
    assert facts["scale"] == 1.0
    np.testing.assert_array_equal(arrays["picture"][..., :3], expected)


def test_slides_for_tiles_are_closed_when_others_are_opened(tmp_path, monkeypatch):
    closed, close = [], LevelSource.close
    monkeypatch.setattr(LevelSource, "close", lambda source: closed.append(source) or close(source))
    paths = [write(tmp_path / f"{name}.ome.tif", WIDE, FORMS["16 bits"][1] | LAYOUTS["tiles"]) for name in range(6)]
    for path in (*paths, paths[-1]):
        slide_pixels.tile(str(path), 0, 0, 0, 90)
    assert len(closed) == len(set(closed)) == len(paths) - slide_pixels.OPEN_SLIDES
    slide_pixels.close_tiles()
    assert len(closed) == len(paths)


def test_white_is_what_the_file_says(tmp_path):
    values = (WIDE >> 4).astype(np.uint16)  # 12 bits in 16
    expected = np.round(values / 4095 * 255).astype(np.uint8)
    path = tmp_path / "s.ome.tif"
    options = {"photometric": "rgb", "tile": (128, 128), "metadata": {"axes": "YXS", "SignificantBits": 12, **MICRONS}}
    write(path, values, options)
    with open_source(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, WIDTH, HEIGHT), expected)
        assert slide.notes == ("16-bit RGB, of which the value 4095 is read as white",)
    tag = {"extratags": [(281, "H", 3, (4095,) * 3, True)], "metadata": None}
    write(tmp_path / "t.tif", values, options | tag)
    with open_source(tmp_path / "t.tif") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, WIDTH, HEIGHT), expected)


def test_transparent_areas_are_white(tmp_path):
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    alpha[:100], alpha[100:200] = 255, 51
    for kind in ("unassalpha", "assocalpha"):
        path = tmp_path / f"{kind}.tif"
        dark = RGB // 5  # as an associated alpha of 51 has it
        write(path, np.dstack([dark, alpha]), {"photometric": "rgb", "extrasamples": kind, "rowsperstrip": 16})
        with open_source(path) as slide:
            found = slide.read(0, 0, 0, WIDTH, HEIGHT)
        assert slide.reader == "tifffile" and (found[200:] == 255).all() or kind == "assocalpha"
        np.testing.assert_array_equal(found[:100], dark[:100])
        expected = dark[100:200] + 204.0 if kind == "assocalpha" else np.round(dark[100:200] * 0.2 + 204)
        np.testing.assert_array_equal(found[100:200], np.minimum(expected, 255))


def test_a_photograph_of_the_label_is_no_level(tmp_path):
    path, options = tmp_path / "s.tif", {"photometric": "rgb", "tile": (128, 128), "metadata": None}
    with tifffile.TiffWriter(path) as out:
        out.write(WIDE, **options)
        out.write(WIDE[:150, :140], subfiletype=1, **options)  # of another shape
        out.write(WIDE[::4, ::4], subfiletype=1, **options)
    with open_source(path) as slide:
        assert slide.level_dimensions == ((WIDTH, HEIGHT), (108, 75))


def test_few_tiles_of_planes_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_levels, "_KEPT_BYTES", 3 * 128 * 128 * 4)
    path = write(tmp_path / "s.ome.tif", RGB.transpose(2, 0, 1), FORMS["planes of an OME-TIFF"][1] | LAYOUTS["tiles"])
    with tiff_format.open_tiff(path) as slide:
        slide.read(0, 0, 0, WIDTH, HEIGHT)
        assert len(slide._decoder._tiles) == 4


def test_rows_of_a_large_strip_are_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_levels, "_ROWS", 16)
    path = write(tmp_path / "s.tif", WIDE, FORMS["16 bits"][1] | LAYOUTS["one strip"])
    with tiff_format.open_tiff(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 100, 0, WIDTH, 20), as_8_bits(WIDE)[100:120])
        assert sorted(slide._decoder._tiles) == [(0, 6), (0, 7)]


def test_untiled_images_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_format, "LARGEST_UNTILED", 100_000)
    path = write(tmp_path / "s.tif", RGB, FORMS["16 bits"][1] | LAYOUTS["strips"])
    with pytest.raises(OSError, match=rf"s\.tif: .*{WIDTH} x {HEIGHT} pixels without tiles.*`vips tiffsave s\.tif OUT"):
        open_slide(path)


@pytest.mark.parametrize(
    ("image", "options", "said"),
    [
        (RGB[..., 0], {"photometric": "minisblack"}, "one grey channel of 8 bits: fluorescence, or a mask"),
        (np.stack([RGB[..., 0]] * 3), {"photometric": "minisblack"}, "three planes without names"),
        (np.stack([RGB] * 5), {"photometric": "rgb"}, "a stack of 5 images"),
        (RGB / np.float32(255), {"photometric": "rgb"}, r"RGB of 32 bits \(float32\); convert it to 8 bits"),
    ],
    ids=["grey", "planes", "stack", "float"],
)
def test_what_is_no_slide_says_so(tmp_path, image, options, said):
    tifffile.imwrite(tmp_path / "s.ome.tif", image, rowsperstrip=64, metadata={"axes": "ZYXS"[-image.ndim :]}
                     if image.shape[-1] == 3 else None, **options)  # fmt: skip
    with pytest.raises((OSError, ValueError), match=rf"s\.ome\.tif: .*{said}"):
        open_slide(tmp_path / "s.ome.tif", assume_mpp=0.5)


def test_damage_is_an_error_of_the_file(tmp_path):
    path = write(tmp_path / "s.tif", WIDE, FORMS["16 bits"][1] | LAYOUTS["tiles"] | {"compression": "deflate"})
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        start, count = file.pages[0].dataoffsets[4], file.pages[0].databytecounts[4]
    path.write_bytes(data[:start] + b"\xff" * count + data[start + count :])
    with open_slide(path, assume_mpp=0.5) as slide:
        slide.read(0, 0, 0, 100, 100)
        with pytest.raises(OSError, match=r"s\.tif: its pixels cannot be read .tile 4 "):
            slide.read(0, 128, 0, 100, 100)
    with pytest.raises(ValueError, match="it cannot be read .tile 4 .*leave the picture out"):
        slide_pixels.thumbnail(str(path), 200)
    path.write_bytes(data[: start + 10])
    with pytest.raises((Unreadable, DamagedPixels)), open_source(path) as slide:
        slide.read(0, 0, 0, WIDTH, HEIGHT)


def test_what_openslide_reads_stays_with_it(tmp_path):
    path = write(tmp_path / "s.tif", RGB, FORMS["16 bits"][1] | LAYOUTS["tiles"])
    with open_source(path) as slide, openslide.OpenSlide(path) as theirs, tiff_format.open_tiff(path) as ours:
        assert isinstance(slide, OpenSlideSource) and slide.reader == "openslide" and not slide.fault
        expected = np.asarray(theirs.read_region((0, 0), 0, (WIDTH, HEIGHT)).convert("RGB"))
        np.testing.assert_array_equal(slide.read(0, 0, 0, WIDTH, HEIGHT), expected)
        np.testing.assert_array_equal(ours.read(0, 0, 0, WIDTH, HEIGHT), expected)


def test_masks_and_fluorescence_are_still_pictures(tmp_path):
    mask = np.kron(np.eye(2, dtype=np.uint8), np.full((128, 128), 255, np.uint8))
    tifffile.imwrite(tmp_path / "m.tif", mask, tile=(128, 128), metadata=None)
    with open_source(tmp_path / "m.tif") as slide:
        assert slide.reader == "openslide" and "one grey channel of 8 bits" in slide.fault
    assert (slide_pixels.mask(str(tmp_path / "m.tif"), 10**6)[1]["mask"] == mask.astype(bool)).all()
    picture = slide_pixels.thumbnail(str(tmp_path / "m.tif"), 256)[1]["picture"]
    assert (picture == np.asarray(Image.fromarray(mask).convert("RGB"))).all()
