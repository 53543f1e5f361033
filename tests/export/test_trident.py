"""Records as TRIDENT's files: its names and attributes, and `pathflip import` restores the records from them."""

import h5py
import numpy as np
import pytest

from data_prep.build import import_features
from data_prep.settings import ImportSettings
from pathflip_jax import cli
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures, read_features
from pathflip_jax.data.records.recipe import write_recipe
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.export.trident import coords_attributes, export_trident

GRID = np.stack(np.meshgrid(np.arange(5), np.arange(4)), axis=-1).reshape(-1, 2)


def slide(name, step=512, patch_size=512, mpp=0.25, encoder="uni_v2", coords=True, **more):
    features = np.random.default_rng(len(name)).normal(size=(len(GRID), 8)).astype(np.float16)
    place = {"coords": (GRID * step + 64).astype(np.int32)} if coords else {}
    return SlideFeatures(name, "", features, patch_size=patch_size, mpp=mpp, encoder=encoder, **place, **more)


def write_records(folder, slides, dtype="float16", recipe=None, **cut):
    folder.mkdir()
    write_shard(folder / shard_name(0), slides, dtype=dtype, **cut)
    finish_folder(folder, **{name: value for name, value in cut.items() if name == "edge_um"})
    if recipe:
        write_recipe(folder, recipe)
    return folder


SLIDES = [
    slide("A-1", width=4000, height=3000),
    slide("TCGA-A7-A0CJ-01Z-00-DX2.1234abcd-12ab-34cd-56ef-1234567890ab", patch_size=507, step=507, mpp=0.2527),
    slide("overlapping", step=384),
    slide("sparse", step=1024),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_import_restores_the_records(tmp_path, dtype):
    records = write_records(tmp_path / "records", SLIDES, dtype, edge_um=256.0)
    report = export_trident(records, tmp_path / "trident")
    assert report.done == [one.slide_id for one in SLIDES] and not report.failed and not report.notes
    settings = ImportSettings(edge_um=256.0, dtype=dtype, workers=1)
    again = import_features(tmp_path / "trident" / "features_uni_v2", tmp_path / "again", settings)
    assert sorted(again.done) == sorted(report.done) and not again.failed
    one, other = Records(records), Records(tmp_path / "again")
    for info in one.slides:
        before, after = one.read(one.position(info.slide_id)), other.read(other.position(info.slide_id))
        assert before.features.dtype == after.features.dtype
        assert np.array_equal(before.features.astype(np.float32), after.features.astype(np.float32))
        assert np.array_equal(before.coords, after.coords)
        for name in ("case_id", "patch_size", "mpp", "width", "height", "encoder"):
            assert getattr(before, name) == getattr(after, name), name
    assert one.dtype == other.dtype and other.recipe.encoder == "uni_v2"


def test_files_and_attributes_are_those_of_trident(tmp_path, capsys):
    recipe = FeatureRecipe(encoder="uni_v2", patch_size=256, mpp=0.5)
    records = write_records(tmp_path / "records", SLIDES[:1], recipe=recipe, edge_um=256.0)
    out = tmp_path / "20x_256px_0px_overlap"
    assert cli.main(["export", str(records), "--to", "trident", "--out", str(out)]) == 0
    assert "features_uni_v2: 1 slides as TRIDENT writes them, failed 0" in capsys.readouterr().out
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert found == ["features_uni_v2/A-1.h5", "patches/A-1_patches.h5"]
    expected = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "name": "A-1", "savetodir": str(out), "level0_width": 4000, "level0_height": 3000,
        "level0_mpp": 0.25,
    }  # fmt: skip
    with h5py.File(out / "features_uni_v2/A-1.h5") as file, h5py.File(out / "patches/A-1_patches.h5") as patches:
        assert set(file) == {"features", "coords"} and set(patches) == {"coords"}
        assert dict(file["coords"].attrs) == dict(patches["coords"].attrs) == expected
        assert file["coords"].dtype == np.int64 and np.array_equal(file["coords"], patches["coords"])
        assert file["features"].dtype == np.float32 and file["features"].attrs["encoder"] == "uni_v2"
        assert file["features"].attrs["name"] == "A-1"
        corners = {tuple(corner) for corner in file["coords"][:].tolist()}
    assert corners == {tuple(corner) for corner in (GRID * 512 + 64).tolist()}


@pytest.mark.parametrize(
    "mpp, magnification",
    [(0.12, 80), (0.19, 60), (0.25, 40), (0.2999, 40), (0.5, 20), (1.0, 10), (2.0, 5), (4.0, 2.5)],
)
def test_magnifications_are_those_that_trident_reads_off_the_resolution(mpp, magnification):
    found = coords_attributes(slide("x", patch_size=256, step=256, mpp=mpp), None, "")
    assert found["level0_magnification"] == found["target_magnification"] == magnification
    assert found["patch_size"] == found["patch_size_level0"] == 256


@pytest.mark.parametrize(
    "size, step, target, overlap", [(512, 448, 20, 32), (507, 507, 40 * 256 / 507, 0), (128, 64, 80, 128)]
)
def test_sizes_at_the_target_magnification_give_those_at_level_0(size, step, target, overlap):
    recipe = FeatureRecipe(patch_size=256)
    found = coords_attributes(slide("x", patch_size=size, step=step), recipe, "")
    assert found["target_magnification"] == target and found["overlap"] == overlap
    assert round(found["patch_size"] * found["level0_magnification"] / found["target_magnification"]) == size


def test_what_is_unknown_is_left_out_and_said(tmp_path):
    bare = [slide("bare", coords=False, patch_size=0, mpp=0.0, encoder=""), slide("no-mpp", mpp=0.0, encoder="")]
    records = write_records(tmp_path / "records", bare, cut="scan")
    report = export_trident(records, tmp_path / "out")
    assert report.folder == tmp_path / "out" / "features" and len(report.notes) == 3
    assert "no coordinates, hence no patches file (bare)" in report.summary()
    assert "no mpp, hence no magnification (no-mpp)" in report.summary()
    found = [read_features(tmp_path / "out" / "features" / f"{name}.h5") for name in ("bare", "no-mpp")]
    assert found[0].coords is None and found[1].coords is not None
    assert [(one.encoder, one.mpp, one.patch_size) for one in found] == [("", 0.0, 0), ("", 0.0, 512)]
    assert [path.name for path in (tmp_path / "out" / "patches").iterdir()] == ["no-mpp_patches.h5"]


def test_a_bad_slide_is_reported_and_the_others_are_written(tmp_path, capsys):
    records = write_records(tmp_path / "records", SLIDES, edge_um=256.0)
    info = Records(records).slides[1]
    with open(info.shard, "r+b") as file:
        file.seek(info.features_offset + 3)
        byte = file.read(1)[0]
        file.seek(info.features_offset + 3)
        file.write(bytes([byte ^ 1]))
    command = ["export", str(records), "--to", "trident", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 1 and "TCGA-A7-A0CJ" in capsys.readouterr().out
    names = {path.stem for path in (tmp_path / "out" / "features_uni_v2").iterdir()}
    assert names == {"A-1", "overlapping", "sparse"} and (tmp_path / "out" / "failures.json").is_file()
    assert cli.main([*command, "--pt", "--dtype", "float16"]) == cli.WRONG_INPUT
    assert "drop --pt, --dtype" in capsys.readouterr().err
