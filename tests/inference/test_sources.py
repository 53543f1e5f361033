"""Slides below any path: what is found, what takes precedence, and what is refused."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathflip_jax.inference.sources import choose, choose_one, find_sources

GOLDEN = Path(__file__).parents[1] / "golden" / "features"


def feature_file(path, patches=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(0).random((patches, 8), np.float32)
        file["coords"] = np.arange(patches)[:, None] * np.array([[256, 0]])
        file["coords"].attrs.update(patch_size=256, patch_level=0, downsample=(1.0, 1.0))
    return path


def ids(sources):
    return [source.slide_id for source in sources.slides]


def test_features_take_precedence_and_keep_the_slide_file_for_pictures(tmp_path):
    feature_file(tmp_path / "features" / "S1.h5")
    for name in ("S1", "S2"):
        (tmp_path / f"{name}.svs").write_bytes(b"II*\0 and so on")
    found = find_sources(tmp_path)
    assert ids(found) == ["S1", "S2"]
    one, two = found.slides
    assert one.features().slide_id == "S1" and one.image == tmp_path / "S1.svs" and not one.is_recorded
    assert two.features is None and two.image == tmp_path / "S2.svs"


def test_records_alone_below_and_in_a_shard(tiny_cohort, tmp_path):
    everything = [f"S{number:02d}" for number in range(24)]
    assert ids(find_sources(tiny_cohort.records)) == everything
    (tmp_path / "cohort").symlink_to(tiny_cohort.records.parent)
    shard = sorted(tiny_cohort.records.glob("*.tfrecord"))[0]
    found = find_sources(shard)
    assert set(ids(found)) <= set(everything) and all(source.is_recorded for source in found.slides)
    assert found.slides[0].features().recipe == find_sources(tiny_cohort.records).slides[0].features().recipe


def test_unreadable_slides_are_reported_beside_the_others(tmp_path):
    feature_file(tmp_path / "S1.h5")
    (tmp_path / "S2.mrxs").touch()
    (tmp_path / "S3.npy").write_bytes(b"\x93NUMPY")
    found = find_sources(tmp_path)
    assert ids(found) == ["S1"] and [failure.slide for failure in found.failed] == ["S2"]
    assert "without its folder S2" in found.failed[0].error


@pytest.mark.parametrize("lost", ["zarr.json", "c/0/0"])
def test_zarr_stores_are_slides_alone_and_among_others(tmp_path, lost):
    """One that was copied in part is refused by name, and the others are read."""
    pytest.importorskip("zarr", reason="Zarr is not installed (extra zarr)")
    store = tmp_path / "S1.zarr"
    shutil.copytree(GOLDEN / "tiatoolbox" / "S1.zarr", store)
    feature_file(tmp_path / "S2.h5")
    shutil.copytree(store, tmp_path / "S3.zarr")
    (tmp_path / "S3.zarr" / "features" / lost).unlink()
    known = {"patch_size": 224}
    assert ids(find_sources(store, known)) == ["S1"]
    found = find_sources(tmp_path, known)
    assert ids(found) == ["S1", "S2", "S3"] and not found.failed
    assert [len(source.features().features) for source in found.slides[:2]] == [24, 4]
    with pytest.raises(ValueError, match=r"S3\.zarr: .*missing.*the store was copied in part.*copy it again"):
        found.slides[2].features()


def test_one_of_several_is_chosen_by_id(tmp_path):
    for name in ("S1", "S2"):
        feature_file(tmp_path / f"{name}.h5")
    found = find_sources(tmp_path)
    assert ids(choose(found, ["S2"], tmp_path)) == ["S2"] and choose(found, None, tmp_path) is found
    with pytest.raises(ValueError, match=r"holds 2 slides \(S1, S2, \.\.\.\); choose one by slide_id"):
        choose_one(found, tmp_path)
    with pytest.raises(ValueError, match="no slide 'S9' among its 2 slides, such as S1, S2"):
        choose(found, ["S9"], tmp_path)
    (tmp_path / "S3.mrxs").touch()
    with pytest.raises(ValueError, match="a MIRAX slide without its folder"):
        choose(find_sources(tmp_path), ["S3"], tmp_path)


def test_what_is_none_of_these_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        find_sources(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="neither slides, feature files nor records in it"):
        find_sources(tmp_path)
    for name, content, kind in (("S1.geojson", '{"type": "FeatureCollection"}', "JSON"), ("S1.xml", "<ASAP>", "XML")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}: {kind}, such as .* pass the slide, or its feature file"):
            find_sources(tmp_path / name).slides[0].features()


def test_facts_of_records_are_their_own(tiny_cohort):
    with pytest.raises(ValueError, match="records state mpp themselves"):
        find_sources(tiny_cohort.records, {"mpp": 0.5})
