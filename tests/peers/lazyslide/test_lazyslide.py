"""LazySlide itself writes stores of features that our reader reads, and takes our outlines of tissue and areas."""

import json

import lazyslide as zs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from wsidata import open_wsi

from data_prep.build import prepare
from data_prep.settings import PrepareSettings
from pathflip_jax.data.readers.features import read_features

MPP, TILE = 0.5, 128


class MeanColour(torch.nn.Module):
    """Model whose features are the mean and the spread of each colour."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)


def as_tensor(tile) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tile).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Pyramidal slide with a piece of stained tissue on glass."""
    rng = np.random.default_rng(0)
    level = np.full((2048, 1536, 3), 243, np.uint8)
    stain = rng.integers(0, 60, (36, 26, 3), np.uint8) + np.array([150, 70, 130], np.uint8)
    level[384:1536, 320:1152] = Image.fromarray(stain).resize((832, 1152), Image.Resampling.BICUBIC)
    path = tmp_path_factory.mktemp("lazyslide") / "S1.tiff"
    resolution = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        for number, step in enumerate((1, 4)):
            kind = {"subfiletype": 1} if number else resolution
            writer.write(level[::step, ::step], tile=(256, 256), photometric="rgb", compression="jpeg", **kind)
    return path


@pytest.fixture(scope="module")
def extracted(slide, tmp_path_factory):
    """Slide with features that LazySlide extracted, and its store."""
    store = tmp_path_factory.mktemp("stores") / "S1.zarr"
    wsi = open_wsi(str(slide), store=str(store))
    zs.pp.find_tissues(wsi, level=-1)
    zs.pp.tile_tissues(wsi, TILE, mpp=MPP)
    zs.tl.feature_extraction(wsi, MeanColour(), model_name="colours", transform=as_tensor, device="cpu", pbar=False)
    wsi.write()
    return wsi, store


def test_our_reader_reads_the_features_of_lazyslide(extracted):
    wsi, store = extracted
    found = read_features(store)
    tiles, table = wsi["tiles"], wsi["colours_tiles"]
    assert len(tiles) > 20
    np.testing.assert_array_equal(np.asarray(found.features, np.float32), np.asarray(table.X, np.float32))
    np.testing.assert_array_equal(found.coords, tiles.bounds[["minx", "miny"]].to_numpy())
    assert (found.patch_size, found.width, found.height, found.encoder) == (TILE, 1536, 2048, "colours")
    assert found.mpp == pytest.approx(MPP)


def test_features_are_those_of_the_pixels_at_our_coordinates(extracted, slide):
    wsi, store = extracted
    found = read_features(store)
    with tifffile.TiffFile(slide) as file:
        level = file.pages[0].asarray()
    for row in range(0, len(found.coords), 7):
        x, y = (int(place) for place in found.coords[row])
        tile = level[y : y + TILE, x : x + TILE].reshape(-1, 3) / 255
        np.testing.assert_allclose(np.asarray(found.features[row][:3], float), tile.mean(0), atol=5e-3)


def test_lazyslide_takes_our_outlines_of_tissue(extracted, slide, tmp_path):
    prepare(slide, tmp_path / "records", PrepareSettings(patch_size=TILE, workers=1))
    outlines = tmp_path / "records" / "tissue" / "S1.geojson"
    wsi = open_wsi(str(slide), store=None)
    zs.io.load_annotations(wsi, str(outlines), key_added="ours")
    shapes = wsi["ours"]
    assert shapes.geometry.is_valid.all() and len(json.loads(outlines.read_text())["features"]) >= 1
    assert shapes.geometry.area.sum() == pytest.approx(832 * 1152, rel=0.05)
    theirs = extracted[0]["tissues"].geometry.union_all()
    ours = shapes.geometry.union_all()
    assert ours.intersection(theirs).area / ours.union(theirs).area > 0.9
