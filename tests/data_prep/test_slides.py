"""Open slides: their pixels against OpenSlide's, and the errors of unusable ones."""

import pytest

from data_prep.slides import open_slide
from data_prep.tiling import tile_slide


def test_resolution_from_the_objective_power(draw, write_tiff, tmp_path):
    aperio = "Aperio Image Library v12\r\n512x512 [0,0 512x512] (128x128)|AppMag = 40|"
    path = write_tiff(tmp_path / "s.svs", draw(512, 512, (0, 512, 0, 512)), None, description=aperio)
    with open_slide(path) as slide:
        assert slide.mpp == 0.25
    with open_slide(path, assume_mpp=0.3) as slide:  # what the user knows wins over the nominal
        assert slide.mpp == 0.3
    path = write_tiff(tmp_path / "t.svs", draw(512, 512, (0, 512, 0, 512)), None, description=aperio + "MPP = 0.26")
    with open_slide(path, assume_mpp=0.3) as slide:  # what the file says wins over the assumption
        assert slide.mpp == 0.26


def test_resolutions_that_cannot_be(draw, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.tiff", draw(256, 256, (0, 256, 0, 256)), None)
    with pytest.raises(ValueError, match=r"s.tiff: says neither um per pixel nor objective power.*--assume-mpp 0.25"):
        open_slide(path)
    with pytest.raises(ValueError, match="--assume-mpp 50"):
        open_slide(path, assume_mpp=50)
    with (
        open_slide(path, assume_mpp=1.0) as slide,
        pytest.raises(ValueError, match=r"s.tiff: scanned at 1 um .*--mpp 1"),
    ):
        tile_slide(slide, mpp=0.5)
    with pytest.raises(FileNotFoundError, match="no such slide"):
        open_slide(tmp_path / "none.svs")
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(OSError, match="text.svs: OpenSlide cannot open it"):
        open_slide(tmp_path / "text.svs")
