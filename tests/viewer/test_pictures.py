"""Tiles are OpenSlide's own, labels never come along, and a slide that breaks or goes is that slide's error."""

import io
import multiprocessing
import os
import signal
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from openslide.deepzoom import DeepZoomGenerator

from pathflip_jax.data.readers import guarded, slide_pixels
from pathflip_jax.viewer.pictures import Pictures, Pyramid


@pytest.fixture(scope="module")
def pictures():
    pictures = Pictures(readers=1)
    yield pictures
    pictures.close()


@pytest.fixture
def slide(tmp_path, write_slide):
    write_slide(tmp_path / "S1.tiff", size=(700, 900))
    return tmp_path / "S1.tiff"


def test_tiles_are_those_of_openslide(pictures, slide):
    pyramid = pictures.pyramid(slide)
    with openslide.OpenSlide(slide) as image:
        oracle = DeepZoomGenerator(image, tile_size=254, overlap=1)
        assert (pyramid.width, pyramid.height, pyramid.levels) == (900, 700, oracle.level_count)
        assert pyramid.mpp == pytest.approx(0.5)
        for level in range(pyramid.levels):
            assert pyramid.tiles(level) == oracle.level_tiles[level]
            across, down = pyramid.tiles(level)
            for column, row in {(0, 0), (across - 1, down - 1)}:
                expected = io.BytesIO()
                oracle.get_tile(level, (column, row)).save(expected, "JPEG", quality=90)
                assert pictures.tile(slide, level, column, row, 90) == expected.getvalue()


@given(st.integers(1, 300_000), st.integers(1, 300_000))
def test_levels_are_those_of_openslide_for_every_size(width, height):
    slide = SimpleNamespace(
        level_dimensions=((width, height),),
        dimensions=(width, height),
        level_downsamples=(1.0,),
        properties={},
        get_best_level_for_downsample=lambda downsample: 0,
    )
    oracle = DeepZoomGenerator(slide, tile_size=254, overlap=1)
    pyramid = Pyramid(width, height, 0.0, (0, 0), oracle.level_count, 254, 1)
    assert tuple(pyramid.size(level) for level in range(pyramid.levels)) == oracle.level_dimensions
    assert tuple(pyramid.tiles(level) for level in range(pyramid.levels)) == oracle.level_tiles


@pytest.mark.parametrize("place", [(99, 0, 0), (-1, 0, 0), (10, 4, 0), (10, 0, -1), (8, 1, 0)])
def test_a_tile_beyond_the_slide_is_refused(pictures, slide, place):
    with pytest.raises(IndexError, match=r"S1\.tiff: no (level|tile)"):
        pictures.tile(slide, *place)


def write_aperio(path):
    """An Aperio file with a red label and a red macro image, and a patient's name among its properties."""
    level = np.full((512, 512, 3), 200, np.uint8)
    red = np.zeros((120, 200, 3), np.uint8)
    red[..., 0] = 255
    head = "Aperio Image Library v11.2.1\r\n"
    with tifffile.TiffWriter(path) as writer:
        facts = f"{head}512x512 [0,0 512x512] (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5|Patient = DOE JANE"
        writer.write(level, tile=(256, 256), photometric="rgb", description=facts, metadata=None)
        small = f"{head}512x512 -> 256x256 - |AppMag = 20|MPP = 0.5"
        writer.write(level[::2, ::2], rowsperstrip=16, photometric="rgb", description=small, metadata=None)
        for name, kind in (("label", 1), ("macro", 9)):
            facts = f"{head}{name} 200x120"
            strips = {"rowsperstrip": 16, "subfiletype": kind, "description": facts, "metadata": None}
            writer.write(red, photometric="rgb", **strips)


def test_labels_macros_and_names_are_never_read(pictures, tmp_path, pixels):
    path = tmp_path / "S2.svs"
    write_aperio(path)
    with openslide.OpenSlide(path) as image:  # OpenSlide would give them
        assert {"label", "macro"} <= set(image.associated_images)
        assert image.properties["aperio.Patient"] == "DOE JANE"
    pyramid = pictures.pyramid(path)
    assert "DOE" not in repr(pyramid)
    shown = [pictures.thumbnail(path)]
    for level in range(pyramid.levels):
        across, down = pyramid.tiles(level)
        shown += [pictures.tile(path, level, column, row) for column in range(across) for row in range(down)]
    for picture in shown:
        assert np.abs(pixels(picture) - 200).max() < 12
        assert b"DOE" not in picture


def test_a_slide_that_is_replaced_deleted_or_broken_while_it_is_shown(pictures, slide, write_slide):
    before = pictures.tile(slide, 10, 0, 0)
    write_slide(slide, seed=5, size=(700, 900))
    after = pictures.tile(slide, 10, 0, 0)
    assert before != after, "a tile of the file before was shown"
    slide.write_bytes(slide.read_bytes()[:9000])
    with pytest.raises((ValueError, OSError), match=r"^S1\.tiff: .*"):
        pictures.tile(slide, 10, 3, 2)
    slide.unlink()
    with pytest.raises(FileNotFoundError, match=r"^S1\.tiff: the slide file no longer exists; restore it"):
        pictures.tile(slide, 10, 0, 0)
    write_slide(slide, size=(700, 900))
    assert pictures.tile(slide, 10, 0, 0)


def test_a_reader_that_dies_is_followed_by_another(pictures, slide):
    pictures.tile(slide, 10, 0, 0)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    assert pictures.tile(slide, 10, 1, 0)


def test_a_slide_without_low_levels_says_how_to_get_them(slide, monkeypatch):
    monkeypatch.setattr(slide_pixels, "WHOLE_LEVEL", 100_000)
    assert slide_pixels.tile(str(slide), 10, 1, 1, 80)
    with pytest.raises(guarded.Refused, match=r"it has no low-resolution level .*vips tiffsave S1\.tiff"):
        slide_pixels.tile(str(slide), 8, 0, 0, 80)
