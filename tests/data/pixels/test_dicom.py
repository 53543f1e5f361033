"""DICOM series written with pydicom: pixels against the image and OpenSlide, incomplete series, and labels."""

import io
import logging

import numpy as np
import openslide
import pytest
from PIL import Image, ImageCms

pytest.importorskip("wsidicom")
from dicom_slides import CODECS, TILE, write_instance, write_series  # noqa: E402

from data_prep import build  # noqa: E402
from data_prep.settings import PrepareSettings  # noqa: E402
from data_prep.slides import open_slide  # noqa: E402
from pathflip_jax.data.pixels.dicom_levels import open_dicom  # noqa: E402
from pathflip_jax.data.pixels.dicom_series import series_of  # noqa: E402
from pathflip_jax.data.pixels.source import DamagedPixels, Unreadable  # noqa: E402
from pathflip_jax.data.pixels.sources import open_source  # noqa: E402
from pathflip_jax.data.readers import slide_pixels  # noqa: E402
from pathflip_jax.viewer.pictures import Pictures  # noqa: E402

READ_BY_OPENSLIDE = ("none", "jpeg", "jpeg2000")


def drawn(height=230, width=301, seed=0):
    """Blurred noise, so that JPEG keeps it, with empty tiles of pure white in the middle."""
    small = np.random.default_rng(seed).integers(60, 240, (height // 20 + 1, width // 20 + 1, 3)).astype(np.uint8)
    image = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    image[TILE : 2 * TILE, TILE : 3 * TILE] = 255
    return image


@pytest.fixture(scope="module")
def image():
    return drawn()


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("codec", CODECS)
def test_pixels_are_those_written_and_those_of_openslide(tmp_path, image, codec, sparse):
    write_series(tmp_path, image, codec=codec, sparse=sparse)
    own = {}
    for reader in ("openslide", "wsidicom"):
        with open_source(tmp_path / "level_1.dcm", reader) as slide:
            expected = "openslide" if reader == "openslide" and codec in READ_BY_OPENSLIDE else "wsidicom"
            assert slide.reader == expected and not slide.notes
            assert slide.level_dimensions == ((301, 230), (151, 115), (76, 58))
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
            own[reader] = [slide.read(0, 0, n, *size) for n, size in enumerate(slide.level_dimensions)]
            own[reader] += [slide.read(-9, 200, 0, 90, 60), slide.read(290, 220, 0, 90, 60)]
            step = slide.level_downsamples[1]  # between two pixels of the level
            own[reader] += [slide.read(round(7 * step), round(20 * step), 1, 50, 40)]
    for number in range(3):
        level = image[:: 2**number, :: 2**number]
        if codec == "jpeg":
            assert np.abs(own["wsidicom"][number].astype(int) - level).mean() < 6  # the border's padding bleeds
        else:
            np.testing.assert_array_equal(own["wsidicom"][number], level)
    for one, other in zip(own["openslide"], own["wsidicom"], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("codec", ["jpeg", "jpegls"])
def test_prepare_and_the_pictures_read_a_folder_or_a_file(tmp_path, image, codec):
    write_series(tmp_path / "S1", image, codec=codec)
    with open_slide(tmp_path / "S1") as slide:
        expected = slide.read(0, 0, 0, 301, 230)
        assert (slide.width, slide.height, slide.mpp) == (301, 230, 0.5)
    for path in (tmp_path / "S1", tmp_path / "S1" / "level_2.dcm"):
        facts, arrays = slide_pixels.thumbnail(str(path), 301)
        np.testing.assert_array_equal(arrays["picture"], expected)
        assert slide_pixels.measures(str(path))[0] == {"width": 301, "height": 230, "mpp": 0.5, "bounds": [0, 0]}
        assert slide_pixels.tile(str(path), 9, 0, 0, 90)[1]["jpeg"].size
    assert slide_pixels.detect(str(path))[0]["format"] == "dicom"


def test_the_viewer_shows_it(tmp_path, image):
    write_series(tmp_path / "S1", image, codec="jpegls")
    pictures = Pictures(readers=1)
    try:
        for path in (tmp_path / "S1", tmp_path / "S1" / "level_0.dcm"):
            pyramid = pictures.pyramid(path)
            assert (pyramid.width, pyramid.height, pyramid.mpp) == (301, 230, 0.5)
            shown = np.array(Image.open(io.BytesIO(pictures.tile(path, pyramid.levels - 1, 0, 0, 95))))
            assert np.abs(shown.astype(int) - image[: len(shown), : shown.shape[1]]).mean() < 3
            assert pictures.thumbnail(path)
    finally:
        pictures.close()


def test_real_slide_of_another_program(real_slide):
    dataset = pytest.importorskip("pydicom").dcmread(real_slide)
    frames, edge = dataset.pixel_array, dataset.Rows
    across = dataset.TotalPixelMatrixColumns // edge
    whole = frames.reshape(-1, across, edge, edge, 3).transpose(0, 2, 1, 3, 4).reshape(-1, across * edge, 3)
    for slide in (open_source(real_slide), open_source(real_slide, "wsidicom"), open_dicom(real_slide)):
        with slide:
            np.testing.assert_array_equal(slide.read(0, 0, 0, *slide.dimensions), whole)


def test_labels_and_overviews_are_never_pixels(tmp_path, image):
    red = np.zeros((64, 128, 3), np.uint8)
    red[..., 0] = 255
    for number, flavour in enumerate(("LABEL", "OVERVIEW", "THUMBNAIL")):
        kind = ["ORIGINAL", "PRIMARY", flavour, "NONE"]
        write_instance(tmp_path / f"a{number}.dcm", red, ImageType=kind, SpecimenLabelInImage="YES")
    label = tmp_path / "a0.dcm"
    with pytest.raises(OSError, match=r"a0.dcm: a DICOM series of label, overview.* images, without the slide itself"):
        open_slide(label)
    with pytest.raises(ValueError, match="without the slide itself; copy all files of the series"):
        slide_pixels.thumbnail(str(label), 100)
    for codec in ("none", "jpegls"):
        write_series(tmp_path, image, codec=codec)
        for reader in ("openslide", "wsidicom"):
            with open_source(label, reader) as slide:
                assert slide.dimensions == (301, 230)
                for number, size in enumerate(slide.level_dimensions):
                    found = slide.read(0, 0, number, *size)
                    assert not ((found[..., 0] == 255) & (found[..., 1] < 9)).any()


@pytest.mark.parametrize("codec", ["none", "jpegls"])
@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("base", "without its full resolution: the largest level here, 151 x 115 pixels, is resampled"),
        ("frames", "the level of 301 x 230 pixels has 11 of 20 tiles"),
        ("part", "the level of 301 x 230 pixels lacks part 2 of 3"),
        ("last part", "the level of 301 x 230 pixels has 13 of 20 tiles"),
    ],
)
def test_an_incomplete_series_is_named_with_the_cure(tmp_path, image, codec, lost, said):
    write_series(tmp_path, image, codec=codec)
    base = tmp_path / "level_0.dcm"
    base.unlink()
    facts = {"codec": codec, "InstanceNumber": 1}
    if lost == "frames":
        write_instance(base, image, frames=slice(0, 11), **facts)
    for part, frames in enumerate((slice(0, 8), slice(8, 13), slice(13, None)), 1):
        if (lost, part) in (("part", 1), ("part", 3), ("last part", 1), ("last part", 2)):
            total = {"InConcatenationTotalNumber": 3} if lost == "part" else {}
            place = {"ConcatenationUID": "1.2.3.9", "InConcatenationNumber": part, "frames": frames}
            write_instance(tmp_path / f"part_{part}.dcm", image, **facts, **place, **total)
    for reader in ("openslide", "wsidicom"):
        with pytest.raises(OSError, match=rf"level_2.dcm: .*{said}.*; copy all files of the series into the folder"):
            open_slide(tmp_path / "level_2.dcm", reader=reader)


def test_a_lower_level_may_be_missing(tmp_path, image):
    write_series(tmp_path, image)
    (tmp_path / "level_1.dcm").unlink()
    with open_slide(tmp_path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 1, 76, 58), image[::4, ::4])


def test_the_rest_of_the_cohort_goes_on(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    for number in range(3):
        values = {"SeriesInstanceUID": f"1.2.{number}", "ContainerIdentifier": f"G{number}"}
        write_series(tmp_path / "slides" / f"S{number}", drawn(512, 640, number), codec="jpegls", **values)
    (tmp_path / "slides" / "S1" / "level_0.dcm").unlink()
    settings = PrepareSettings(patch_size=64, edge_um=64.0, min_tissue=0.0, workers=1)
    report = build.prepare(tmp_path / "slides", tmp_path / "out", settings)
    assert report.done == ["S0", "S2"]
    (failure,) = report.failed
    assert failure.slide == "S1" and "without its full resolution" in failure.error


def test_folders_that_are_no_single_series(tmp_path, image):
    with pytest.raises(Unreadable, match="a folder without DICOM whole slide images"):
        series_of(tmp_path)
    write_instance(tmp_path / "a.dcm", image)
    write_instance(tmp_path / "b.dcm", image, SeriesInstanceUID="1.2.99")
    with pytest.raises(OSError, match="a folder of 2 DICOM series; pass a file of one, such as a.dcm"):
        open_slide(tmp_path)
    with open_slide(tmp_path / "b.dcm") as slide:
        assert slide.width == 301


def test_what_is_no_brightfield_slide_says_so(tmp_path, image):
    path = write_instance(
        tmp_path / "s.dcm", image, "jpegls", SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2"
    )
    with pytest.raises(OSError, match="one grey channel: fluorescence, or a mask, of 8 bits; expected RGB"):
        open_slide(path)
    path = write_instance(tmp_path / "s.dcm", image, SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.2.840.10008.5.1.4.1.1.77.1.6", b"1.2.840.10008.5.1.4.1.1.2\0\0\0\0\0"))
    with pytest.raises(OSError, match="a DICOM file of modality CT, not a whole slide image"):
        open_slide(path)


def test_a_damaged_frame_names_the_file(tmp_path, image):
    write_series(tmp_path, image, codec="jpegls")
    path = tmp_path / "level_0.dcm"
    data = path.read_bytes()
    start = data.index(b"\xff\xd8\xff", len(data) // 2)
    path.write_bytes(data[:start] + b"\0" * 400 + data[start + 400 :])
    with open_slide(tmp_path) as slide, pytest.raises(OSError, match="its pixels cannot be read .a tile cannot be"):
        slide.read(0, 0, 0, 301, 230)
    with open_dicom(tmp_path) as slide, pytest.raises(DamagedPixels):
        slide.read(0, 0, 0, 301, 230)


def test_the_colour_profile_is_found_by_either_reader(tmp_path, image):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile += b"\0" * (len(profile) % 2)
    write_series(tmp_path, image, profile=profile)
    with openslide.OpenSlide(tmp_path / "level_0.dcm") as theirs, open_source(tmp_path) as slide:
        assert slide.profile == profile and theirs.color_profile is not None
    with open_dicom(tmp_path) as slide:
        assert slide.profile == profile
