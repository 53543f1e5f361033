"""Zarr stores of LazySlide and TIAToolbox, written by their own code, and stores that are incomplete or hostile."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import import_features
from data_prep.settings import ImportSettings
from pathflip_jax.data.readers import zarr_features
from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.features import read_features
from pathflip_jax.data.records.records import Records

zarr = pytest.importorskip("zarr", reason="the extra zarr is not installed")
GOLDEN = Path(__file__).parents[2] / "golden" / "features"
CELLS = np.array([(i % 6, i // 6) for i in range(24)])
FEATURES = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
TABLE = "tables/colour_tiles"


@pytest.fixture(params=["zarr2", "zarr3"])
def version(request):
    return request.param


@pytest.fixture
def store(tmp_path, version):
    """LazySlide's store of one slide."""
    with zipfile.ZipFile(GOLDEN / "lazyslide" / f"{version}.zip") as archive:
        archive.extractall(tmp_path / "run")
    return tmp_path / "run" / "S1.zarr"


@pytest.fixture(scope="module")
def expected():
    """The same as spatialdata, anndata and geopandas read it."""
    with np.load(GOLDEN / "lazyslide" / "expected.npz") as file:
        return dict(file)


def write_arrays(folder, zarr_format=3, **options):
    """A store of plain arrays as TIAToolbox's; `options` are those of the features."""
    root = zarr.open_group(store=folder, mode="w", zarr_format=zarr_format)
    bounds = np.concatenate([CELLS * 224, CELLS * 224 + 224], axis=1)
    root.create_array("features", **{"data": FEATURES, "chunks": (8, 4)} | options)
    root.create_array("coordinates", data=bounds)
    return folder


def chunks_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name[0] in "0123456789")


@pytest.mark.parametrize("encoder", ["colour", "contrast"])
def test_lazyslide(store, expected, encoder):
    slide = read_features(store, encoder=encoder)
    assert np.array_equal(slide.features, expected[encoder])
    assert np.array_equal(slide.coords, expected["bounds"][:, :2])
    assert (slide.encoder, slide.patch_size, slide.mpp, slide.width, slide.height) == (encoder, 128, 0.5, 1300, 900)
    assert slide.patch_size_source == "file" and not slide.notes


def test_lazyslide_folder(store, expected, tmp_path):
    report = import_features(store.parent, tmp_path / "records", ImportSettings(workers=1, encoder="colour"))
    assert not report.failed and not any("not read" in note for note in report.notes)
    records = Records(tmp_path / "records")
    assert [(slide.slide_id, slide.cut, slide.mpp) for slide in records.slides] == [("S1", "grid", 0.5)]


def test_an_encoder_has_to_be_chosen(store):
    with pytest.raises(ValueError, match=r"S1\.zarr: features of 2 encoders \(colour, contrast\).*--encoder"):
        read_features(store)
    with pytest.raises(ValueError, match="none is 'uni'"):
        read_features(store, encoder="uni")


def test_rows_follow_the_numbers_of_the_tiles(store, expected):
    """A table may hold its rows in another order than the shapes, and only some of them."""
    group = zarr.open_group(store=store / TABLE, mode="r+", use_consolidated=False)
    order = np.array([20, 3, 11, 0, 7])
    for name, data in (("X", expected["colour"][order]), ("obs/tile_id", order)):
        attributes = dict(group[name].attrs)
        del group[name]
        group.create_array(name, data=data).attrs.update(attributes)
    slide = read_features(store, encoder="colour")
    assert np.array_equal(slide.coords, expected["bounds"][order, :2])
    assert np.array_equal(slide.features, expected["colour"][order])
    group["obs/tile_id"][0] = 24
    with pytest.raises(ValueError, match="rows of tiles that the shapes lack"):
        read_features(store, encoder="colour")
    group["obs/tile_id"][0] = 3
    with pytest.raises(ValueError, match="several rows of one tile"):
        read_features(store, encoder="colour")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("zarr.json", "no zarr.json or .zgroup or .zarray in the folder"),
        (f"{TABLE}/zarr.json", r"1 of its \d+ groups and arrays are missing \(tables/colour_tiles/"),
        (f"{TABLE}/X/c", r"1 of the 1 chunks of 'tables/colour_tiles/X' are missing \(the first is "),
        (f"{TABLE}/obs/tile_id/c", "1 of the 1 chunks of 'tables/colour_tiles/obs/tile_id' are missing"),
        ("shapes/tiles/shapes.parquet", r"shapes/tiles/shapes\.parquet, the tiles of the features, is missing"),
        (TABLE, r"\d+ of its \d+ groups and arrays are missing"),
    ],
)
def test_a_store_that_was_copied_in_part(store, version, lost, said):
    names = {"zarr.json": ".zgroup", "c": "0.0" if "X" in lost else "0"} if version == "zarr2" else {}
    path = store.joinpath(*(names.get(part, part) for part in lost.split("/")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"{said}.*copied in part") as error:
        read_features(store, encoder="colour")
    assert str(store) in str(error.value)
    assert find_feature_files(store.parent).files == [store], "it is not left out without a word"


def test_damaged_files_of_a_store(store):
    chunk = chunks_of(store / TABLE / "X")[0]
    whole = chunk.read_bytes()
    for content in (whole[:-20], b"", bytes(len(whole))):
        chunk.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"S1\.zarr: "):
            read_features(store, encoder="colour")
    chunk.write_bytes(whole)
    read_features(store, encoder="colour")
    (store / "shapes" / "tiles" / "shapes.parquet").write_bytes(b"PAR1")
    with pytest.raises((ValueError, OSError), match=r"S1\.zarr: "):
        read_features(store, encoder="colour")
    root = next(file for file in (store / "zarr.json", store / ".zgroup") if file.is_file())
    root.write_text("{")
    with pytest.raises(ValueError, match=r"S1\.zarr/\S+ is damaged or empty; the store was copied in part"):
        read_features(store, encoder="colour")


def test_tiatoolbox(tmp_path):
    path = GOLDEN / "tiatoolbox" / "S1.zarr"
    with pytest.raises(ValueError, match=r"resolution at which patches of 224 px were read.*--patch-size"):
        read_features(path)
    slide = read_features(path, patch_size=448)
    expected = np.sin(np.arange(24)[:, None] * (1 + np.arange(8)[None]))
    np.testing.assert_allclose(slide.features, expected, atol=1e-6)
    assert np.array_equal(slide.coords, CELLS * 448) and slide.patch_size == 448
    report = import_features(path.parent, tmp_path / "records", ImportSettings(workers=1, patch_size=448, mpp=0.25))
    assert not report.failed and [slide.cut for slide in Records(tmp_path / "records").slides] == ["grid"]


@pytest.mark.parametrize("options", [{"zarr_format": 2}, {}, {"shards": (16, 4)}, {"compressors": None}])
def test_every_missing_chunk_is_told(tmp_path, options):
    """zarr itself reads the rows of a missing file as zeros, in either version, sharded and uncompressed."""
    for number in range(2 if "shards" in options else 3):
        path = write_arrays(tmp_path / f"S{number}.zarr", **options)
        assert np.array_equal(read_features(path, patch_size=448).features, FEATURES)
        chunks = chunks_of(path / "features")
        key = str(chunks[number].relative_to(path / "features"))
        chunks[number].unlink()
        assert not zarr.open_group(store=path, mode="r")["features"][:].all(), "zeros without a word"
        with pytest.raises(ValueError, match=rf"1 of the {len(chunks)} chunks of 'features' are missing .*is {key}\)"):
            read_features(path, patch_size=448)


@pytest.mark.parametrize("codec", ["default", "zstd", "blosc", "none"])
@pytest.mark.parametrize("options", [{"zarr_format": 2}, {}, {"shards": (16, 4)}], ids=["2", "3", "sharded"])
def test_truncated_chunks(tmp_path, options, codec):
    """The decoder of Blosc in numcodecs gives numbers from beyond the end."""
    numcodecs, is_2 = pytest.importorskip("numcodecs"), "zarr_format" in options
    codecs = {
        "zstd": numcodecs.Zstd() if is_2 else zarr.codecs.ZstdCodec(),
        "blosc": numcodecs.Blosc() if is_2 else zarr.codecs.BloscCodec(),
        "none": None,
    }
    options = options | ({"compressors": codecs[codec]} if codec in codecs else {})
    path = write_arrays(tmp_path / "S1.zarr", **options)
    chunk = chunks_of(path / "features")[1]
    whole = chunk.read_bytes()
    for size in (0, 13, len(whole) - 1) if codec == "blosc" else (len(whole) // 2,):
        chunk.write_bytes(whole[:size])
        with pytest.raises((ValueError, OSError), match=r"S1\.zarr: "):
            read_features(path, patch_size=448)


def test_no_codec_that_unpickles_is_run(tmp_path):
    """numcodecs has one; a metadata file may name it for any array."""
    path = write_arrays(tmp_path / "S1.zarr", zarr_format=2, compressors=None)
    file = path / "features" / ".zarray"
    for key, value in (("filters", [{"id": "pickle", "protocol": 5}]), ("compressor", {"id": "pickle"})):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=r"S1\.zarr: 'features' is encoded by 'pickle', expected "):
            read_features(path, patch_size=448)
        file.write_text(json.dumps(content))


def test_an_array_that_claims_to_be_huge(tmp_path):
    path = write_arrays(tmp_path / "S1.zarr")
    file = path / "features" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [10**12, 4]}))
    with pytest.raises(ValueError, match=r"S1\.zarr: 'features' of shape .* in a file of .* MB, expected at most"):
        read_features(path, patch_size=448)


def test_other_stores_say_what_they_are(tmp_path):
    image = tmp_path / "S1.zarr"
    root = zarr.open_group(store=image, mode="w")
    root.create_array("0", data=np.zeros((4, 4), np.uint8))
    root.attrs["ome"] = {"multiscales": [{"version": "0.5"}]}
    with pytest.raises(ValueError, match=r"S1\.zarr: a Zarr store that holds an image \(OME-Zarr\).*extract its"):
        read_features(image)
    with pytest.raises(FileNotFoundError, match=r"\.zarr files are not read: 1 \(S1\.zarr\)"):
        find_feature_files(tmp_path)
    zarr.create_array(store=tmp_path / "S2.zarr", data=np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"holds a single array of shape \(5, 3\)"):
        read_features(tmp_path / "S2.zarr")
    (tmp_path / "S3.zarr").mkdir()
    with pytest.raises(ValueError, match=r"S3\.zarr: no zarr\.json or .* so that it is no Zarr store"):
        read_features(tmp_path / "S3.zarr")
    with pytest.raises(ValueError, match=r"S1\.zarr: the store of one slide; pass the folder that contains"):
        find_feature_files(image)


def test_without_zarr_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_features, "ARRAYS", "pathflip_jax.data.readers.no_such_module:read")
    path = write_arrays(tmp_path / "S1.zarr")
    with pytest.raises(ImportError, match=r"S1\.zarr: .* needs the package zarr; install the extra `zarr`"):
        read_features(path)
