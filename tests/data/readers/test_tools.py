"""Feature files written by other tools' own code (`tests/golden/features`): read alone, and imported as a folder."""

import json
import os
import shutil
import subprocess
import sys
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


def test_slideflow_centres_become_corners():
    path = GOLDEN / "slideflow" / "S1.pt"
    slide = read_features(path, mpp=0.25)
    np.testing.assert_allclose(slide.features, features(8), atol=1e-6)
    assert np.array_equal(slide.coords, CELLS * 512)
    assert (slide.patch_size, slide.patch_size_source, slide.encoder) == (512, "file", "VirchowFeatures")
    inferred = read_features(path)
    assert np.array_equal(inferred.coords, slide.coords) and (inferred.patch_size, inferred.mpp) == (512, 0)
    assert "patch size of 512 px inferred from the gaps between patches" in inferred.notes[0]


def test_slideflow_folder(tmp_path):
    assert not find_feature_files(GOLDEN / "slideflow").notes, "the index is read with the bag"
    records = imported(GOLDEN / "slideflow", tmp_path / "records", mpp=0.25)
    assert [(slide.slide_id, slide.cut) for slide in records.slides] == [("S1", "grid")]


def test_slideflow_bags_that_cannot_be_placed(tmp_path):
    folder = shutil.copytree(GOLDEN / "slideflow", tmp_path / "bags")
    np.savez(folder / "S1.index", arr_0=CELLS[:5] * 512)
    with pytest.raises(ValueError, match=r"S1\.pt: .*S1\.index\.npz has the coordinates of 5 patches, the features 24"):
        read_features(folder / "S1.pt")
    np.savez(folder / "S1.index", arr_0=np.zeros((24, 0)))
    with pytest.raises(ValueError, match=r"S1\.index\.npz: locations of shape \(24, 0\)"):
        read_features(folder / "S1.pt")
    np.savez(folder / "S1.index", arr_0=np.arange(24)[:, None] * [700, 900])
    with pytest.raises(ValueError, match="no two of them in one row or column.*--patch-size") as error:
        read_features(folder / "S1.pt")
    assert type(error.value) is ValueError, "the corners depend on the patch size: no later guess may complete it"
    (folder / "S1.index.npz").write_bytes((GOLDEN / "slideflow" / "S1.index.npz").read_bytes()[:100])
    with pytest.raises(OSError, match=r"S1\.index\.npz: not a complete NumPy file"):
        read_features(folder / "S1.pt")


@pytest.mark.parametrize("name", ["S1.pt", "S2.npz"])
def test_slide2vec(name):
    """hs2p orders tiles by x, then y: the features are in that order too."""
    slide = read_features(GOLDEN / "slide2vec" / "tile_embeddings" / name)
    np.testing.assert_allclose(slide.features, features(8), atol=1e-6)
    assert np.array_equal(slide.coords, CELLS[np.lexsort(CELLS.T[::-1])] * 512)
    assert (slide.patch_size, slide.mpp, slide.encoder, slide.width) == (512, 0.25, "uni2", 4000)


def test_slide2vec_folder(tmp_path):
    folder = shutil.copytree(GOLDEN / "slide2vec", tmp_path / "run")
    (folder / "slide_embeddings").mkdir()
    shutil.copy(folder / "tile_embeddings" / "S1.pt", folder / "slide_embeddings" / "S1.pt")
    found = find_feature_files(folder)
    assert [path.name for path in found.files] == ["S1.pt", "S2.npz"]
    assert len(found.notes) == 1 and "slide embeddings are not read: 1 (slide_embeddings/S1.pt)" in found.notes[0]
    records = imported(folder, tmp_path / "records")
    assert [(slide.slide_id, slide.cut, slide.mpp) for slide in records.slides] == [
        ("S1", "grid", 0.25), ("S2", "grid", 0.25),
    ]  # fmt: skip


def test_slide2vec_selects_coordinates_by_tile(tmp_path):
    folder = shutil.copytree(GOLDEN / "slide2vec", tmp_path / "run")
    path, order = folder / "tile_embeddings" / "S2.npz", CELLS[np.lexsort(CELLS.T[::-1])] * 512
    np.savez(path, features=features(8)[:5], tile_index=np.array([3, 1, 7, 20, 0]))
    assert np.array_equal(read_features(path).coords, order[[3, 1, 7, 20, 0]])
    np.savez(path, features=features(8)[:2], tile_index=np.array([3, 24]))
    with pytest.raises(ValueError, match=r"S2\.coordinates\.npz: lacks some of the tiles that have features"):
        read_features(path)
    shutil.rmtree(folder / "tiles")
    with pytest.raises(ValueError, match=r"S2\.npz: its coordinates \(/run/tiles.*\) are missing; copy slide2vec's"):
        read_features(path)
    sidecar = path.with_name("S2.meta.json")
    sidecar.write_text(json.dumps({"artifact_type": "hierarchical_embeddings"}))
    with pytest.raises(ValueError, match=r"S2\.npz: S2\.meta\.json says that these are hierarchical_embeddings"):
        read_features(path)


def test_tiatoolbox_1_needs_the_patch_size(tmp_path):
    path = GOLDEN / "tiatoolbox1" / "S1.features.0.npy"
    with pytest.raises(ValueError, match=r"resolution at which patches of 224 px were read.*--patch-size.*: 448 if"):
        read_features(path)
    slide = read_features(path, patch_size=448)
    np.testing.assert_allclose(slide.features, features(8), atol=1e-6)
    assert np.array_equal(slide.coords, CELLS * 448) and (slide.slide_id, slide.patch_size) == ("S1", 448)
    records = imported(GOLDEN / "tiatoolbox1", tmp_path / "records", patch_size=448)
    assert [slide.slide_id for slide in records.slides] == ["S1"]


def test_trident_saves_an_array_as_pt_beside_its_coordinates(tmp_path):
    """`torch.save` of a NumPy array (TRIDENT, `WSI.extract_patch_features`, saveas pt), read without running code."""
    torch = pytest.importorskip("torch")
    run = tmp_path / "20x_256px_0px_overlap"
    (run / "features_uni_v1").mkdir(parents=True)
    (run / "patches").mkdir()
    torch.save(features(8), run / "features_uni_v1" / "S1.pt")
    with h5py.File(run / "patches" / "S1_patches.h5", "w") as file:
        file["coords"] = CELLS * 512
        file["coords"].attrs.update(
            patch_size=256, patch_size_level0=512, level0_magnification=40, target_magnification=20, overlap=0,
            level0_width=4000, level0_height=3000, name="S1",
        )  # fmt: skip
    slide = read_features(run / "features_uni_v1" / "S1.pt")
    assert np.array_equal(slide.features, features(8)) and np.array_equal(slide.coords, CELLS * 512)
    assert (slide.patch_size, slide.mpp, slide.width) == (512, 0.25, 4000)
    records = imported(run, tmp_path / "records")
    assert [(slide.slide_id, slide.cut) for slide in records.slides] == [("S1", "grid")]
    torch.save(features(8)[:20], run / "features_uni_v1" / "S1.pt")
    with pytest.raises(
        ValueError, match=r"S1\.pt: .*S1_patches\.h5 has the coordinates of 24 patches, the features 20"
    ):
        read_features(run / "features_uni_v1" / "S1.pt")


@pytest.mark.parametrize("form", ["pt", "h5"])
def test_prov_gigapath(tmp_path, form):
    """What `run_inference_with_tile_encoder` returns: float16 embeddings, and float32 corners at level 0."""
    path, cells = tmp_path / "run" / f"S1.{form}", (CELLS * 512 - 7).astype(np.float32)
    path.parent.mkdir()
    arrays = {"tile_embeds": features(8).astype(np.float16), "coords": cells}
    if form == "pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)
    else:
        with h5py.File(path, "w") as file:
            file.update(arrays)
    slide = read_features(path)
    assert np.array_equal(slide.features, arrays["tile_embeds"]) and np.array_equal(slide.coords, cells)
    assert slide.patch_size == 512
    records = imported(path.parent, tmp_path / "records", mpp=0.5)
    assert [(slide.slide_id, slide.cut) for slide in records.slides] == [("S1", "grid")]


def test_bare_tensors_are_cut_in_stored_order(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "run").mkdir()
    torch.save(torch.tensor(features(8)), tmp_path / "run" / "S1.pt")
    records = imported(tmp_path / "run", tmp_path / "records")
    assert [slide.cut for slide in records.slides] == ["scan"]


def test_features_as_pt_need_no_pytorch(tmp_path):
    """The reader's worker imports PyTorch only for what its own reader refuses."""
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')")
    code = (
        "import sys; from pathflip_jax.data.readers.features import read_features\n"
        "if __name__ == '__main__': print(read_features(sys.argv[1]).features.shape)"
    )
    (tmp_path / "read.py").write_text(code)
    command = [sys.executable, tmp_path / "read.py", GOLDEN / "slideflow" / "S1.pt"]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": tmp_path}
    )
    assert said.stdout == "(24, 8)\n"
    with pytest.raises(subprocess.CalledProcessError) as error:
        command[-1] = tmp_path / "old.pt"
        command[-1].write_bytes(b"\x80\x02cos\nsystem\n.")
        subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": tmp_path})
    assert "old.pt: reading this .pt file needs PyTorch; install the extra `torch`" in error.value.stderr


def test_hest_bench(tmp_path):
    """`embed_tiles` of HEST-bench: embeddings, barcodes and corners of patches about hexagonally packed spots."""
    spots = np.array([(400 * x + 200 * (y % 2), 346 * y) for y in range(4) for x in range(6)])
    path = tmp_path / "run" / "uni_v1" / "S1.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.update({"embeddings": features(8), "coords": spots, "barcodes": np.array([b"AAAC-1"] * 24)[:, None]})
    with pytest.raises(ValueError, match=r"S1\.h5: .*spots of an assay.*pass mpp"):
        read_features(path)
    slide = read_features(path, mpp=0.25)
    assert np.array_equal(slide.coords, spots) and np.array_equal(slide.features, features(8))
    assert slide.patch_size == 448 and "patches of HEST-bench: 112 um" in slide.notes[0]
    records = imported(tmp_path / "run", tmp_path / "records", mpp=0.25)
    assert [slide.slide_id for slide in records.slides] == ["S1"]
    (tmp_path / "run" / "patches").mkdir()
    with h5py.File(tmp_path / "run" / "patches" / "S1.h5", "w") as file:  # hestcore 1.0.6, `WSIPatcher.to_h5`
        file.update({"img": np.zeros((24, 4, 4, 3), np.uint8), "coords": spots, "barcode": np.array([[b"A"]] * 24)})
        file["coords"].attrs.update(patch_size_src=440, patch_size_target=224, downsample=1.96, pixel_size=0.2546)
    slide = read_features(path)
    assert (slide.patch_size, slide.mpp) == (440, 0.2546)
    with pytest.raises(ValueError, match=r"S1\.h5: images of patches .*not their features"):
        read_features(tmp_path / "run" / "patches" / "S1.h5")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"PAR1", "a Parquet table, expected patch features.*save a slide's features as HDF5"),
        (b"\x89PNG\r\n\x1a\n", r"a picture \(PNG\).*pass the file of the features extracted from it"),
        (b"II*\0", "a TIFF file, a slide or a mask"),
        (b"\x1f\x8b\x08", "a gzip archive.*unpack it"),
        ((90).to_bytes(8, "little") + b'{"blocks', "a safetensors file, usually the weights of a model"),
        (b"SQLite format 3\0", "an SQLite database"),
    ],
)
def test_other_files_say_what_they_are(tmp_path, start, said):
    path = tmp_path / "S1.dat"
    path.write_bytes(start + bytes(range(256)))
    with pytest.raises(ValueError, match=rf"S1\.dat: {said}"):
        read_features(path)
