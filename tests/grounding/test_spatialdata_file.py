"""Groundings as SpatialData, read by spatialdata itself: squares with scores, areas and best patches at level 0."""

import json
import sys

import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.grounding.boxes import find_boxes
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.grounding.placement import Measures
from pathflip_jax.grounding.spatialdata_file import write_spatialdata
from pathflip_jax.grounding.surface import make_surface
from pathflip_jax.inference import load

BLOCK = {(2, 2), (3, 2), (2, 3), (3, 3)}


@pytest.fixture
def spatialdata():
    return pytest.importorskip("spatialdata", reason="needs spatialdata: pip install pathflip-jax[spatialdata]")


@pytest.mark.filterwarnings("ignore")  # of the libraries below spatialdata
def test_shapes_and_points_lie_on_the_slide(spatialdata, made, grid, hot, tmp_path):
    rng = np.random.default_rng(0)
    scores = np.stack([hot(BLOCK), rng.random(len(grid)) / 9 + hot({(9, 6)})])
    grounding = made(grid * 64, scores, negative=("a/b",), width=800, height=600)
    grounding = grounding._replace(texts=("tumor necrosis", "geometry"))
    given = {"threshold": 0.5, "smooth": 0.0, "min_patches": 1.0}
    place = write_spatialdata(tmp_path, grounding, top=3, **given)
    found = spatialdata.read_zarr(place)
    assert set(found["patches"].columns) == {"tumor necrosis", "geometry (text)", "geometry"}
    patches = found["patches"]
    assert np.array_equal(patches["tumor necrosis"], scores[0]) and len(patches) == len(grid)
    bounds = patches.geometry.bounds.to_numpy()
    assert np.array_equal(bounds[:, :2], grid * 64) and np.array_equal(bounds[:, 2:], grid * 64 + 64)
    areas = found["areas"]
    boxes = find_boxes(grounding, make_surface(grounding, 0.0), 0.5, min_patches=1.0)
    assert list(areas["text"]) == [box.text for box in boxes] == ["tumor necrosis", "geometry"]
    assert areas.geometry.is_valid.all() and areas.geometry.iloc[0].bounds == (128.0, 128.0, 256.0, 256.0)
    np.testing.assert_allclose(areas.geometry.area * 0.25e-6, areas["area_mm2"], rtol=0.05)  # outlines cut corners
    best = found["best_patches"].compute()
    assert best.groupby("text", observed=True).size().to_dict() == {"tumor necrosis": 3, "geometry": 3}
    first = best[(best["text"] == "geometry") & (best["rank"] == 1)].iloc[0]
    assert (first.x, first.y) == (9 * 64 + 32, 6 * 64 + 32) and first.score == np.float32(scores[1].max())
    facts = found.attrs["pathflip"]
    assert facts["texts"] == ["tumor necrosis", "geometry"] and facts["negative"] == ["a/b"]
    assert facts["thresholds"] == [0.5, 0.5] and facts["method"] == "slide"
    get = spatialdata.transformations.get_transformation
    for element in ("patches", "areas", "best_patches"):
        systems = get(found[element], get_all=True)
        assert isinstance(systems["global"], spatialdata.transformations.Identity)
        scale = systems["micrometres"].to_affine_matrix(("x", "y"), ("x", "y"))
        assert np.array_equal(scale, np.diag([0.5, 0.5, 1.0]))


@pytest.mark.filterwarnings("ignore")
def test_a_grounding_is_replaced_whole_and_other_folders_are_not(spatialdata, made, grid, hot, tmp_path, monkeypatch):
    low = made(grid * 64, hot(set()), mpp=0.0)
    write_spatialdata(tmp_path, low, threshold=0.5, smooth=0.0)
    found = spatialdata.read_zarr(tmp_path / "S1.zarr")
    assert list(found.shapes) == ["patches"] and found.coordinate_systems == ["global"]  # no area, no mpp
    measures = Measures(800, 600, 0.25, (0, 0))
    write_spatialdata(tmp_path, made(grid * 64, hot(BLOCK), mpp=0.0), measures=measures, threshold=0.5, smooth=0.0)
    found = spatialdata.read_zarr(tmp_path / "S1.zarr")
    assert set(found.shapes) == {"patches", "areas"} and "micrometres" in found.coordinate_systems

    def fail(self, path):
        path.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(spatialdata.SpatialData, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_spatialdata(tmp_path, low, threshold=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["S1.zarr"]
    assert set(spatialdata.read_zarr(tmp_path / "S1.zarr").shapes) == {"patches", "areas"}
    (tmp_path / "other" / "S1.zarr").mkdir(parents=True)
    (tmp_path / "other" / "S1.zarr" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is no Zarr group"):
        write_spatialdata(tmp_path / "other", low, threshold=0.5)


def test_without_spatialdata_the_extra_is_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    command = ["ground", "nowhere.h5", "necrosis", "--checkpoint", "run", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--spatialdata"]) == cli.WRONG_INPUT
    assert "--spatialdata needs spatialdata: pip install 'pathflip-jax[spatialdata]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Stand:
    """A predictor whose scores are the first feature of each patch."""

    def ground(self, slide, texts, method, **_):
        scores = np.repeat(np.asarray(slide.features[:, :1], np.float32).T, len(texts), 0)
        place = (slide.coords, slide.patch_size, slide.mpp, slide.width, slide.height)
        return Grounding(slide.slide_id, tuple(texts), scores, scores[:, :1], *place, method="slide")


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_it_beside_the_other_files(spatialdata, tiny_cohort, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load, "load", lambda folder: Stand())
    command = ["ground", str(tiny_cohort.records), "--slide-id", "S00", "glands", "--checkpoint", "run"]
    command += ["--smooth", "0", "--min-patches", "1", "--out", str(tmp_path), "--spatialdata", "--json"]
    assert cli.main(command) == 0
    written = json.loads(capsys.readouterr().out)
    found, facts = spatialdata.read_zarr(written["spatialdata"]), json.loads((tmp_path / "S00.json").read_text())
    assert found.attrs["pathflip"]["thresholds"] == pytest.approx([facts["texts"][0]["threshold"]])
    boxes = facts["texts"][0]["boxes"]
    assert boxes and found["areas"]["patches"].tolist() == [box["patches"] for box in boxes]
    assert len(found["best_patches"]) == 8
