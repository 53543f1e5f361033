"""Feature files written by other tools' own code (`tests/golden/features`): read alone, and imported as a folder."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.build import import_features
from data_prep.settings import ImportSettings
from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.features import read_features
from pathflip_jax.data.records.records import Records

GOLDEN = Path(__file__).parents[2] / "golden" / "features"
CELLS = np.array([(i % 6, i // 6) for i in range(24)])


def features(width):
    """Those of `make.py`."""
    return np.sin(np.arange(24)[:, None] * (1 + np.arange(width)[None])).astype(np.float32)


def imported(folder, out, **settings):
    """Records of an imported folder; a slide that failed fails the test."""
    report = import_features(folder, out, ImportSettings(workers=1, **settings))
    assert not report.failed and report.finished
    return Records(out)


def test_atlaspatch():
    path = GOLDEN / "atlaspatch" / "patches" / "S1.h5"
    with pytest.raises(ValueError, match=r"S1\.h5: features of 2 encoders \(conch_v15, uni_v1\).*--encoder"):
        read_features(path)
    for encoder, width in (("uni_v1", 8), ("CONCH_v15", 6)):
        slide = read_features(path, encoder=encoder)
        np.testing.assert_allclose(slide.features, features(width), atol=1e-6)
        assert np.array_equal(slide.coords, CELLS * 512) and slide.encoder == encoder.lower()
        assert (slide.patch_size, slide.mpp, slide.width, slide.height) == (512, 0.2527, 4000, 3000)


def test_atlaspatch_folder(tmp_path):
    records = imported(GOLDEN / "atlaspatch", tmp_path / "records", encoder="uni_v1")
    assert [slide.slide_id for slide in records.slides] == ["S1", "S2"]


def test_coordinates_without_features_are_told_where_others_have_them(tmp_path):
    folder = shutil.copytree(GOLDEN / "atlaspatch", tmp_path / "run")
    with h5py.File(folder / "patches" / "S3.h5", "w") as file:
        file["coords"] = CELLS
    (folder / "patches" / "S4.h5").write_bytes((folder / "patches" / "S2.h5").read_bytes()[:9000])
    found = find_feature_files(folder)
    assert [path.name for path in found.files] == ["S1.h5", "S2.h5", "S4.h5"], "reading S4 reports its damage"
    assert found.notes == ["files of coordinates without features are not read: 1 (patches/S3.h5); extract them"]
    for name in ("S1", "S2", "S4"):
        (folder / "patches" / f"{name}.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"files of coordinates without features are not read: 1"):
        find_feature_files(folder)


def test_features_elsewhere_go_before_those_in_patches(tmp_path):
    folder = shutil.copytree(GOLDEN / "atlaspatch", tmp_path / "run")
    shutil.copytree(folder / "patches", folder / "features_uni")
    assert [path.parent.name for path in find_feature_files(folder).files] == ["features_uni", "features_uni"]
