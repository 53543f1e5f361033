"""The picture for the README: as small as it must be."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pictures(benchmark_modules):
    return benchmark_modules("real_tissue_parts.pictures")


def test_a_picture_is_shrunk_until_it_fits(pictures, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    pictures.shrink(tmp_path / "large.png", tmp_path / "small.jpg", width=600, most=60_000)
    assert 30_000 < (tmp_path / "small.jpg").stat().st_size <= 60_000
    with Image.open(tmp_path / "small.jpg") as small:
        assert small.size == (600, 200)
    with pytest.raises(ValueError, match="large.png: a picture 600 pixels wide does not fit into 100 bytes"):
        pictures.shrink(tmp_path / "large.png", tmp_path / "none.jpg", width=600, most=100)
    assert not (tmp_path / "none.jpg").exists()
