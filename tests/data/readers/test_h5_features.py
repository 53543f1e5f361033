"""Layouts of HDF5 features: STAMP's units by version, AtlasPatch's groups, and the metadata of the others."""

import h5py
import numpy as np
import pytest

from pathflip_jax.data.readers.features import read_features

FEATURES = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
CELLS = np.array([(i % 4, i // 4) for i in range(12)])


@pytest.fixture
def write(tmp_path):
    def write(attributes, **arrays):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            for name, array in arrays.items():
                file[name] = array
            file.attrs.update(attributes)
        return tmp_path / "x.h5"

    return write


STAMP = {
    "2.0": (CELLS * 256.0, {"stamp_version": "2.0.0", "unit": "um", "tile_size": 256.0}),
    "2.1 and later": (CELLS * 256.0, {"stamp_version": "2.4.0", "unit": "um", "tile_size_um": 256.0}),
    "later, without a unit": (CELLS * 256.0, {"tile_size_um": 256.0, "tile_size_px": 224}),
    "1": (CELLS * 224, {"extractor": "ctranspath-abc"}),
    "1, tile size": (CELLS * 224, {"extractor": "ctranspath-abc", "tile_size": 224}),
}


@pytest.mark.parametrize("version", STAMP)
@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_stamp_of_every_version(write, version, mpp):
    coords, attributes = STAMP[version]
    path = write({"extractor": "uni"} | attributes, feats=FEATURES, coords=coords)
    for slide in (read_features(path, mpp=mpp), read_features(path, mpp=9.0, override_mpp=mpp)):
        assert (slide.patch_size, slide.mpp) == (256 / mpp, mpp)
        assert slide.coords.tolist() == (CELLS * (256 / mpp)).tolist()
    with pytest.raises(ValueError, match=r"x\.h5: STAMP.*does not say the slide's mpp; pass mpp, such as --mpp"):
        read_features(path)


@pytest.mark.parametrize(
    ("attributes", "step"), [({}, 224), ({}, 512), ({"extractor": "e"}, 512), ({"unit": "px", "tile_size": 224}, 224)]
)
def test_feats_in_a_unit_that_is_not_stated(write, attributes, step):
    path = write(attributes, feats=FEATURES, coords=CELLS * step)
    with pytest.raises(ValueError, match=r"'feats' with coordinates in .*rename it to 'features'"):
        read_features(path, mpp=0.5)


ATLAS = {
    "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20, "overlap": 0,
    "level0_width": 60_000, "level0_height": 20_000,
}  # fmt: skip


def atlas_coords(size=512, level=0):
    return np.concatenate([CELLS * 512, np.tile([size, size, level], (12, 1))], axis=1).astype(np.int32)


def test_atlaspatch(write):
    path = write(ATLAS, coords=atlas_coords(), **{"features/uni_v1": FEATURES, "features/__tmp_conch": FEATURES[:3]})
    slide = read_features(path)
    assert np.array_equal(slide.features, FEATURES) and np.array_equal(slide.coords, CELLS * 512)
    assert (slide.encoder, slide.patch_size, slide.mpp, slide.width) == ("uni_v1", 512, 0.25, 60_000)
    path = write({}, coords=atlas_coords(), **{"features/uni_v1": FEATURES})
    assert read_features(path).patch_size == 512, "from the rows"
    mixed = atlas_coords()
    mixed[3, 2] = 256
    with pytest.raises(ValueError, match="patches of 2 sizes and levels"):
        read_features(write({}, coords=mixed, **{"features/uni_v1": FEATURES}))


def test_features_of_several_encoders(write):
    groups = {"features/uni_v1": FEATURES, "features/conch_v15": FEATURES[:, :2]}
    path = write(ATLAS, coords=atlas_coords(), **groups)
    with pytest.raises(ValueError, match=r"of 2 encoders \(conch_v15, uni_v1\), one has to be chosen.*--encoder"):
        read_features(path)
    with pytest.raises(ValueError, match=r"none is 'virchow'"):
        read_features(path, encoder="virchow")
    slide = read_features(path, encoder="CONCH_v15")
    assert slide.features.shape == (12, 2) and slide.encoder == "conch_v15"


def test_other_layouts_say_what_they_are(write):
    places = {"coords": CELLS * 512}
    for arrays, said in (
        ({"features": FEATURES[0], **places}, "a slide embedding, one vector of 4 numbers.*features_<encoder>"),
        ({"features": FEATURES[:1], **places}, "a slide embedding"),
        ({"embeddings": FEATURES, "barcodes": np.arange(12), **places}, "spots of an assay .HEST-bench.*pass mpp"),
        ({"img": np.zeros((12, 4, 4, 3), "u1"), "barcode": np.arange(12), **places}, "images of patches.*'embeddings'"),
        ({"embeddings": FEATURES, **places}, "rename it to 'features'"),
        (places, "it holds coordinates; pass the file of the features extracted there"),
        ({"features": FEATURES, "coords": np.tile(CELLS, 2)}, "expected two numbers, x and y"),
    ):
        with pytest.raises(ValueError, match=said):
            read_features(write({}, **arrays))


def test_coordinates_under_another_name_are_told(write):
    slide = read_features(write({}, features=FEATURES, locations=CELLS * 512))
    assert slide.coords is None and slide.notes == ("no 'coords' in the file; not read: 'locations'",)
