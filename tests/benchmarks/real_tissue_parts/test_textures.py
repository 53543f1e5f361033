"""Mosaics of texture features: files that `pathflip import` reads, standardised features, faulty input named."""

import csv

import numpy as np
import pytest

from pathflip_jax.data.readers.features import read_features
from pathflip_jax.data.readers.outlines import patches_inside, read_outlines

SLIDES = {"train": 6, "val": 3, "test": 3}


@pytest.fixture
def textures(benchmark_modules):
    return benchmark_modules("real_tissue_parts.textures")


def test_a_cohort_is_written_in_a_form_that_import_reads(textures, textures_file, benchmark_modules, tmp_path):
    names = benchmark_modules("real_tissue_parts.words").TEXTURES
    found = textures.read_textures(textures_file())
    assert len(found.collection.images) == 1120  # without empty glass
    train = np.array([one.split != "test" for one in found.collection.images])
    assert np.isfinite(found.features).all()
    assert found.features[train].mean(0) == pytest.approx(np.zeros(9), abs=0.05)
    out = textures.write_texture_cohort(tmp_path / "slides", found, names, SLIDES, 0)
    with open(out / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    for row in rows:
        slide = read_features(out / "features" / f"{row['slide_id']}.h5", mpp=textures.MPP)
        assert (slide.patch_size, slide.width, slide.height) == (150, int(row["width"]), int(row["height"]))
        outlines = read_outlines(out / "outlines" / f"{row['slide_id']}.geojson")
        assert set(outlines) == set(row["classes"].split(";"))
        inside = np.stack([patches_inside(outlines[name], slide.coords, 150) for name in outlines])
        assert (inside.sum(0) == 1).all()  # every tile lies in the outlines of one class
        assert {crop.split("_")[0] in ("05", "08") for crop in row["cases"].split()} == {row["split"] == "test"}


def test_faulty_features_are_named(textures, textures_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.npz: no such file; give the NPZ file"):
        textures.read_textures(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"textures.npz: no array region in it; expected features, label"):
        textures.read_textures(textures_file(region=None))
    with pytest.raises(ValueError, match=r"unknown classes 01_BONE; expected 01_TUMOR"):
        textures.read_textures(textures_file(label=np.zeros(1280, np.int8), classes=np.array(["01_BONE"])))
    with pytest.raises(ValueError, match=r"the slides 01, 02.* have tiles on both sides of the split"):
        textures.read_textures(textures_file(test=np.arange(1280) % 2 == 0, slide=np.repeat(["01", "02"], 640)))
