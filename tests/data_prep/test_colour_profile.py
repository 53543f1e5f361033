"""ICC profiles: patches against Pillow's own conversion, slides without one, and damaged ones."""

import io
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from data_prep import build
from data_prep.colour_profile import ToSrgb
from data_prep.settings import PrepareSettings
from data_prep.slides import open_slide
from data_prep.tiling import read_patches, tile_slide
from pathflip_jax.data.records.records import Records


def profile_of():
    """An ICC profile of RGB, from Pillow's sRGB with other colorants."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(srgb[128:132], "big")
    for entry in range(count):
        at = 132 + 12 * entry
        name, offset = bytes(srgb[at : at + 4]), int.from_bytes(srgb[at + 4 : at + 8], "big")
        if name in (b"rXYZ", b"gXYZ"):
            value = int.from_bytes(srgb[offset + 8 : offset + 12], "big")
            srgb[offset + 8 : offset + 12] = int(value * (0.8 if name == b"rXYZ" else 1.2)).to_bytes(4, "big")
    return bytes(srgb)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, draw):
    """The same tissue in a file with a profile, one without, and one with a damaged profile."""
    folder = tmp_path_factory.mktemp("profiles")
    image = draw(512, 640, (0, 512, 0, 640))
    for name, profile in (("with", profile_of()), ("without", None), ("damaged", b"\0" * 200)):
        options = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate", "metadata": None}
        options |= {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(folder / f"{name}.tiff", image, iccprofile=profile, **options)
    return folder


def patches(slide):
    tiles = tile_slide(slide, patch_size=96, mpp=0.7)  # resampled
    return tiles, np.concatenate(list(read_patches(slide, tiles)))


@pytest.mark.parametrize("reader", ["openslide", "tifffile"])
def test_patches_are_converted_as_pillow_does(folder, reader):
    with open_slide(folder / "with.tiff", reader=reader) as slide:
        tiles, stored = patches(slide)
    with open_slide(folder / "with.tiff", reader=reader, icc=True) as slide:
        same, found = patches(slide)
        mask = slide.read(0, 0, 0, 200, 200)
    np.testing.assert_array_equal(tiles.coords, same.coords)
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile_of()))
    for before, after in zip(stored[:4], found, strict=False):
        expected = ImageCms.profileToProfile(Image.fromarray(before), own, ImageCms.createProfile("sRGB"))
        np.testing.assert_array_equal(after, np.asarray(expected))
    assert np.abs(found.astype(int) - stored).max() > 5
    with open_slide(folder / "without.tiff", reader=reader) as slide:  # tissue is found in the stored colours
        np.testing.assert_array_equal(mask, slide.read(0, 0, 0, 200, 200))


def test_a_slide_without_a_profile_is_noted(folder):
    with open_slide(folder / "without.tiff", icc=True) as slide:
        assert slide.to_srgb is None and slide.notes == ("no colour profile: its colours are taken for sRGB",)
    with open_slide(folder / "without.tiff") as slide, open_slide(folder / "damaged.tiff") as other:
        assert not slide.notes and not other.notes


def test_a_damaged_profile_is_an_error_with_the_cure(folder):
    with pytest.raises(ValueError, match=r"damaged.tiff: its ICC colour profile of 200 bytes is damaged .*--icc"):
        open_slide(folder / "damaged.tiff", icc=True)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with pytest.raises(ValueError, match=r"s.tiff: its ICC colour profile is of Lab colours, expected RGB; leave out"):
        ToSrgb("s.tiff", lab)


def test_features_with_and_without_do_not_mix(folder, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    settings = PrepareSettings(patch_size=64, edge_um=64.0, min_tissue=0.0, workers=1)
    plain, converted = tmp_path / "plain", tmp_path / "converted"
    assert build.prepare(folder / "with.tiff", plain, settings).done == ["with"]
    report = build.prepare(folder, converted, replace(settings, icc=True))
    assert report.done == ["with", "without"] and "ICC colour profile" in report.failed[0].error
    assert "no colour profile" in report.summary()
    assert "icc" not in {name for name, value in settings.of_records().items() if value is not None}
    assert "colours" not in json.loads((plain / "encoder.json").read_text())
    assert json.loads((converted / "encoder.json").read_text())["colours"] == "srgb"
    one, other = Records(plain).read(0).features, Records(converted).read(0).features
    assert np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max() > 0.01
    for out, options in ((plain, replace(settings, icc=True)), (converted, settings)):
        with pytest.raises(ValueError, match="icc|colours of the patches"):
            build.prepare(folder / "without.tiff", out, options)
