"""The mean-colour baselines against plain loops over OpenSlide's own pixels."""

import numpy as np
import openslide
import pytest
import tifffile

from pathflip_jax.evaluate import colour


@pytest.fixture
def slide_file(tmp_path):
    rng = np.random.default_rng(0)
    level0 = rng.integers(0, 255, (10, 15, 3), dtype=np.uint8).repeat(64, 0).repeat(64, 1)
    path = tmp_path / "S1.tiff"
    with tifffile.TiffWriter(path) as writer:
        for level in range(3):
            picture = level0[:: 4**level, :: 4**level]
            writer.write(picture, tile=(128, 128), photometric="rgb", subfiletype=int(level > 0))
    return path


@pytest.mark.parametrize("limit", [colour.WHOLE_LEVEL, 1])
def test_patch_colours_are_the_mean_of_its_pixels(slide_file, monkeypatch, limit):
    """For a level read whole and for patches read one by one."""
    monkeypatch.setattr(colour, "WHOLE_LEVEL", limit)
    coords = np.array([[0, 0], [64, 128], [896, 576], [448, 192]])
    with openslide.OpenSlide(slide_file) as slide:
        assert slide.level_count == 3
        expected = [
            np.asarray(slide.read_region((int(x), int(y)), 0, (64, 64)))[..., :3].mean((0, 1)) for x, y in coords
        ]
    assert colour.patch_colours(slide_file, coords, 64) == pytest.approx(np.array(expected), abs=1.0)


def test_slide_files_are_found_as_prepare_finds_them(slide_file, caplog):
    (slide_file.parent / "slides.csv").write_text("slide_id\nS1\n")
    (slide_file.parent / "outlines").mkdir()
    (slide_file.parent / "mask.tif").write_bytes(b"II*no slide")
    assert colour.slide_files(slide_file.parent) == {"S1": slide_file}
    (slide_file.parent / "below").mkdir()
    other = slide_file.parent / "below/S2.ome.tiff"
    slide_file.rename(other)
    (slide_file.parent / "S3.vsi").write_bytes(b"II")
    assert colour.slide_files(slide_file.parent) == {"S2": other}
    assert "S3.vsi: an Olympus slide" in caplog.text
    assert colour.slide_files(slide_file.parent / "outlines") == {}
    with pytest.raises(FileNotFoundError, match="no such folder"):
        colour.slide_files(slide_file.parent / "gone")


def test_the_nearest_training_slide_wins():
    rng = np.random.default_rng(1)
    train, test, labels = rng.normal(size=(20, 3)), rng.normal(size=(9, 3)), rng.integers(0, 3, 20)
    belief = colour.nearest_class(train, labels, test, 4)
    nearest = labels[np.linalg.norm(train[None] - test[:, None], axis=-1).argmin(1)]
    assert belief.argmax(1).tolist() == nearest.tolist()
    assert np.all(belief[:, 3] == 0)


def test_concept_shares_count_the_neighbours(monkeypatch):
    monkeypatch.setattr(colour, "NEIGHBOURS", 4)
    rng = np.random.default_rng(2)
    train, test = rng.normal(size=(30, 3)), rng.normal(size=(6, 3))
    inside = rng.integers(0, 2, (30, 2))
    order = np.linalg.norm(train[None] - test[:, None], axis=-1).argsort(1)[:, :4]
    assert colour.concept_shares(train, inside, test) == pytest.approx(inside[order].mean(1))
    assert colour.concept_shares(train[:1], inside[:1], test) == pytest.approx(inside[[0] * 6])
