"""Readers of other tools' feature files: each layout, and faults of a file reported with its name and the cure."""

import importlib.util
import os
import zipfile
import zlib
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.features import (
    SlideFeatures,
    UnknownPatchSize,
    all_finite,
    case_of,
    read_features,
    rows_lost_to_rounding,
)

REAL = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")) / "formats"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real feature files in {REAL}: set PATHFLIP_TEST_DATA")
FEATURES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
COORDS = np.array([[50, 9], [306, 9], [562, 9], [50, 265], [306, 265], [3000, 4001]])


def write_h5(path, attributes=None, file_attributes=None, **arrays):
    """An HDF5 file of arrays; `attributes` go on `coords`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        if attributes:
            file["coords"].attrs.update(attributes)
        file.attrs.update(file_attributes or {})
    return path


def write_csv(path, rows, header=None):
    header = header or [str(i) for i in range(FEATURES.shape[1])] + ["patch_name"]
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def slidechat_rows(name="{}_{}.png"):
    return [[*x, name.format(*xy)] for x, xy in zip(FEATURES.tolist(), COORDS.tolist(), strict=True)]


TRIDENT = {
    "patch_size": 256, "patch_size_level0": 512.0, "level0_magnification": 40.0, "target_magnification": 20,
    "overlap": 128, "level0_width": 4000.0, "level0_height": 5000, "name": "x",
}  # fmt: skip
CLAM = {
    "patch_size": 256, "patch_level": 1, "downsample": [4.0, 4.0], "level_dim": [1000, 1250], "name": "x",
}  # fmt: skip


def check_same(slide, coords=COORDS, features=FEATURES):
    assert np.array_equal(slide.features, features)
    assert slide.coords.dtype == np.int32 and np.array_equal(slide.coords, coords)
    return slide


def test_trident(tmp_path):
    slide = check_same(read_features(write_h5(tmp_path / "x.h5", TRIDENT, features=FEATURES, coords=COORDS)))
    assert (slide.patch_size, slide.mpp, slide.width, slide.height) == (512, 0.25, 4000, 5000)


def test_older_trident_has_no_level0_patch_size_and_a_leading_axis(tmp_path):
    attributes = {k: v for k, v in TRIDENT.items() if k != "patch_size_level0"}
    path = write_h5(tmp_path / "x.h5", attributes, features=FEATURES[None], coords=COORDS)
    assert check_same(read_features(path)).patch_size == 512


def test_trident_says_its_encoder_or_none(tmp_path):
    for written, expected in ((b"uni_v1", "uni_v1"), ("None", "")):
        path = write_h5(tmp_path / "x.h5", TRIDENT, features=FEATURES, coords=COORDS)
        with h5py.File(path, "a") as file:
            file["features"].attrs["encoder"] = written
        assert read_features(path).encoder == expected


@pytest.mark.parametrize(("sibling", "attributes"), [("x.h5", CLAM), ("x_patches.h5", TRIDENT)])
def test_patch_size_from_the_patches_folder_beside(tmp_path, sibling, attributes):
    path = write_h5(tmp_path / "features" / "x.h5", features=FEATURES, coords=COORDS.astype(np.int32))
    assert check_same(read_features(path)).patch_size == 256, "nothing beside it: the commonest gap"
    write_h5(tmp_path / "patches" / sibling, attributes, coords=COORDS)
    slide = check_same(read_features(path))
    assert (slide.patch_size, slide.width, slide.height) == (1024 if attributes is CLAM else 512, 4000, 5000)
    kept = read_features(path, patch_size=300)
    assert kept.patch_size == slide.patch_size and any("300 was not used" in note for note in kept.notes)


def test_the_patches_folder_of_a_linked_file(tmp_path):
    """A git-annex keeps the file itself elsewhere."""
    store = write_h5(tmp_path / "objects" / "key" / "x.h5", features=FEATURES, coords=COORDS)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "x.h5").symlink_to(store)
    write_h5(tmp_path / "patches" / "x.h5", CLAM, coords=COORDS)
    assert read_features(tmp_path / "features" / "x.h5").patch_size == 1024


def test_coordinates_of_another_level_stay_refused_whatever_is_passed(tmp_path):
    path = write_h5(tmp_path / "x.h5", TRIDENT | {"overlap": 0}, features=FEATURES, coords=COORDS)
    for patch_size in (None, 256, 512):
        with pytest.raises(ValueError, match=r"x\.h5: .*multiplied by 2 the coordinates would fit"):
            read_features(path, patch_size=patch_size)


def test_a_broken_patches_file_is_named(tmp_path):
    path = write_h5(tmp_path / "features" / "x.h5", features=FEATURES, coords=COORDS)
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n cut short")
    with pytest.raises(OSError, match="patches/x.h5"):
        read_features(path)


def test_the_commonest_gap_is_the_patch_size_though_pieces_are_out_of_step(tmp_path):
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 256
    coords = np.concatenate([grid, grid + [2000, 7]])  # 7 and 208 are gaps too
    path = write_h5(tmp_path / "x.h5", features=np.ones((72, 3), np.float16), coords=coords)
    assert read_features(path).patch_size == 256


def test_slidechat(tmp_path):
    for name in ("{}_{}.png", "{}_{}", "TCGA-1_{}_{}.jpg"):
        slide = check_same(read_features(write_csv(tmp_path / "x.csv", slidechat_rows(name))))
        assert slide.patch_size == 256 and slide.mpp == 0


def test_options_fill_what_a_file_lacks(tmp_path):
    """Values of the file are kept, with a note; only `override_mpp` replaces them."""
    path = write_h5(tmp_path / "x.h5", TRIDENT, features=FEATURES, coords=COORDS)
    assert read_features(path).notes == ()
    slide = read_features(path, mpp=0.5, patch_size=256, encoder="uni")
    assert (slide.patch_size, slide.mpp, slide.encoder) == (512, 0.25, "uni")
    assert slide.patch_size_source == "file" and slide.notes == (
        "the file says mpp 0.25: it was kept, 0.5 was not used",
        "the file says a patch size of 512 px: it was kept, 256 was not used",
    )
    assert not read_features(path, mpp=0.25, patch_size=512).notes
    slide = read_features(path, mpp=1.0, override_mpp=0.5)
    assert slide.mpp == 0.5 and slide.notes == ("the file says mpp 0.25: replaced by 0.5",)
    with h5py.File(path, "a") as file:
        file["features"].attrs["encoder"] = "uni_v1"
    assert read_features(path, encoder="UNI_v1").encoder == "uni_v1"
    slide = read_features(path, encoder="conch")
    assert slide.encoder == "uni_v1" and "names the encoder uni_v1: it was kept, conch was not used" in slide.notes[0]


def test_a_guessed_patch_size_says_so(tmp_path):
    path = write_h5(tmp_path / "x.h5", features=FEATURES, coords=COORDS)
    slide = read_features(path)
    assert (slide.patch_size, slide.patch_size_source) == (256, "gaps")
    assert slide.notes == ("patch size of 256 px inferred from the gaps between patches, as the file does not say it",)
    slide = read_features(path, patch_size=512)
    assert (slide.patch_size, slide.patch_size_source) == (512, "option")
    assert slide.notes == ("patches of 512 px are 256 px apart at level 0: check the patch size",)


def test_too_few_patches_tell_no_size(tmp_path):
    """A biopsy of two patches that are four apart; a cohort that knows its size may complete it."""
    path = write_h5(tmp_path / "x.h5", features=FEATURES[:2], coords=np.array([[0, 0], [1024, 0]]))
    with pytest.raises(UnknownPatchSize, match=r"x\.h5: .*2 patches \(1 gaps of 1024 px\); pass patch_size"):
        read_features(path)
    assert read_features(path, patch_size=256).patch_size == 256


def test_coordinates_counted_in_patches(tmp_path):
    """DSMIL's column_row: with the patch size they are pixels, without they are refused."""
    cells = [(column, row) for row in (3, 4) for column in (5, 6, 7)]
    rows = [[*x, "{}_{}.jpeg".format(*xy)] for x, xy in zip(FEATURES.tolist(), cells, strict=True)]
    path = write_csv(tmp_path / "x.csv", rows)
    with pytest.raises(
        ValueError, match=r"x\.csv: coordinates in steps of 1: they are counted in patches.*--patch-size"
    ):
        read_features(path)
    slide = read_features(path, patch_size=448)
    assert slide.coords[0].tolist() == [2240, 1344] and "multiplied by the patch size, 448 px" in slide.notes[0]
    path = write_h5(tmp_path / "y.h5", TRIDENT, features=FEATURES, coords=np.array(cells))
    with pytest.raises(ValueError, match=r"y\.h5: coordinates in steps of 1 .* they are counted in patches"):
        read_features(path)


def test_an_impossible_patch_size_in_a_file(tmp_path):
    wrong = {key: value for key, value in TRIDENT.items() if key != "overlap"} | {"patch_size_level0": 3}
    path = write_h5(tmp_path / "x.h5", wrong, features=FEATURES, coords=COORDS)
    with pytest.raises(ValueError, match=r"x\.h5: .*impossible patch size of 3 px"):
        read_features(path)
    slide = read_features(path, patch_size=256)
    assert slide.patch_size == 256 and "the file says an impossible patch size of 3 px: 256 was used" in slide.notes


def test_patches_that_may_overlap_are_confirmed_by_their_size(tmp_path):
    """CLAM does not write down the overlap: steps of a half in the upper left quarter may be of another level."""
    attributes = {"patch_size": 512, "patch_level": 0, "downsample": [1.0, 1.0], "level_dim": [9000, 9000]}
    path = write_h5(tmp_path / "x.h5", attributes, features=FEATURES, coords=COORDS)
    with pytest.raises(ValueError, match=r"multiplied by 2 the coordinates would fit.*pass patch_size=512"):
        read_features(path)
    assert read_features(path, patch_size=512).patch_size == 512


def test_pointers_pages_and_arrays_say_what_they_are(tmp_path):
    path = tmp_path / "x.h5"
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (
            b"Access to model x is restricted\nlog in",
            r"text .'Access to model x is restricted'., not a valid HDF5",
        ),
        (b"<html><body>404</body></html>", "a web page"),
    ):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=said) as error:
            read_features(path)
        assert str(path) in str(error.value)
    np.save(tmp_path / "x.npy", FEATURES)
    with pytest.raises(ValueError, match=r"x\.npy: a NumPy array of shape \(6, 4\) without coordinates; save .* HDF5"):
        read_features(tmp_path / "x.npy")


def test_dictionaries_of_tensors(tmp_path):
    """Prov-GigaPath's tile encoder; of any other dictionary the names are told."""
    torch = pytest.importorskip("torch")
    path, tiles = tmp_path / "x.pt", torch.tensor(FEATURES)
    for coords in (torch.tensor(COORDS), torch.tensor(COORDS).float()):
        torch.save({"tile_embeds": tiles, "coords": coords}, path)
        assert check_same(read_features(path)).patch_size == 256
    torch.save({"features": tiles.bfloat16()}, path)
    assert read_features(path).coords is None and read_features(path).features.dtype == ml_dtypes.bfloat16
    for wrong, said in (
        ({"layer_11_embed": tiles, "last_layer_embed": tiles}, "layer_11_embed, last_layer_embed"),
        ({"tile_embeds": tiles, "coords": COORDS.tolist()}, "'coords' of type list"),
        ({"tile_embeds": tiles, "coords": torch.ones(6, 2, dtype=torch.bool)}, "its coords are torch.bool"),
        (FEATURES.astype(object), r"x\.pt: a pickled NumPy array of Python objects; save its numbers"),
        ({"blocks.0.weight": tiles, "blocks.0.bias": tiles[0]}, r"holds the weights of a model \(blocks\.0\.weight"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=said) as error:
            read_features(path)
        assert "\x1b" not in str(error.value)


def test_numbers_too_small_for_single_precision(tmp_path):
    path = write_h5(tmp_path / "x.h5", TRIDENT, features=FEATURES.astype(np.float64) * 1e-200, coords=COORDS)
    with pytest.raises(ValueError, match="features of 6 patches are too small for float32"):
        read_features(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rows_that_a_narrow_dtype_rounds_away(dtype):
    """Against the definition: a row changed by more than a hundredth of its length."""
    rng = np.random.default_rng(0)
    before = (rng.normal(size=(400, 40)) * 10.0 ** rng.uniform(-42, 2, (400, 1))).astype(np.float32)
    before[::50] = 0
    with np.errstate(under="ignore"):
        after = before.astype(dtype)
    error = np.linalg.norm(before.astype(np.float64) - after.astype(np.float64), axis=1)
    lost = error > 0.01 * np.linalg.norm(before.astype(np.float64), axis=1)
    assert rows_lost_to_rounding(before, after).tolist() == np.flatnonzero(lost).tolist() and 0 < lost.sum() < 390


def test_stamp_needs_mpp(tmp_path):
    where = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "ctranspath"}
    arrays = {"feats": FEATURES.astype(np.float16), "coords": (COORDS * 0.25).astype(np.float32)}
    path = write_h5(tmp_path / "x.h5", None, where, **arrays)
    with pytest.raises(ValueError, match=r"x\.h5: STAMP .*micrometres.*--mpp"):
        read_features(path)
    slide = check_same(read_features(path, mpp=0.25), features=FEATURES.astype(np.float16))
    assert (slide.patch_size, slide.mpp, slide.encoder) == (1024, 0.25, "ctranspath")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_alone(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(FEATURES).to(getattr(torch, dtype))
    torch.save(tensor, tmp_path / "x.pt")
    slide = read_features(tmp_path / "x.pt")
    assert slide.coords is None and slide.features.dtype.name == dtype
    assert (slide.features.astype(np.float32) == tensor.float().numpy()).all()


def test_a_pickle_is_never_run(tmp_path):
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Trap(), tmp_path / "trap.pt")
    torch.save({"layer_11_embed": torch.ones(2, 2)}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match=r"trap\.pt.*without running code"):
        read_features(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"dict\.pt.*holds a dict of 1 entries \(layer_11_embed\)"):
        read_features(tmp_path / "dict.pt")


def test_the_content_decides_not_the_extension(tmp_path):
    path = write_h5(tmp_path / "x.h5", TRIDENT, features=FEATURES, coords=COORDS)
    check_same(read_features(path.rename(tmp_path / "x.csv")))
    check_same(read_features(write_csv(tmp_path / "y.txt", slidechat_rows())))


BROKEN = {
    "lengths": (lambda p: write_h5(p, TRIDENT, features=FEATURES, coords=COORDS[:4]), "6 features and coords .*4"),
    "nan": (lambda p: write_h5(p, TRIDENT, features=np.where(FEATURES > 1, np.nan, FEATURES), coords=COORDS), "NaN"),
    "infinite": (lambda p: write_h5(p, TRIDENT, features=FEATURES * np.inf, coords=COORDS), "6 of 6 patches"),
    "empty": (lambda p: write_h5(p, features=np.zeros((0, 4), "f4"), coords=np.zeros((0, 2))), "no tissue"),
    "flat": (lambda p: write_h5(p, features=np.zeros(0, "f4"), coords=np.zeros(0)), "no tissue"),
    "slide level": (lambda p: write_h5(p, features=np.ones(768, "f4")), "a slide embedding, one vector of 768"),
    "integers": (lambda p: write_h5(p, features=np.ones((3, 3), "i8")), "features are int64"),
    "far": (lambda p: write_h5(p, TRIDENT, features=FEATURES, coords=COORDS * 2.0**31), "beyond 2"),
    "coordinates": (lambda p: write_h5(p, CLAM, coords=COORDS), "holds coordinates; pass the file of the features"),
    "foreign": (lambda p: write_h5(p, x=np.ones(3)), r"datasets \['x'\], expected 'features'"),
    "group": (lambda p: write_h5(p, **{"features/a/b": np.ones(3)}), "expected 'features'"),
    "lone": (lambda p: write_h5(p, features=FEATURES[:1], coords=COORDS[:1]), "pass patch_size"),
    "not hdf5": (lambda p: p.write_bytes(b"no such file"), "not a valid HDF5 file"),
    "nothing": (lambda p: p.write_bytes(b""), "0 bytes"),
    "short row": (lambda p: write_csv(p.with_suffix(".csv"), slidechat_rows() + [[1, 2]]), "line 8: 2 columns"),
    "word": (lambda p: write_csv(p.with_suffix(".csv"), [["a", 1, 1, 1, "1_1"]]), "line 2"),
    "no place": (lambda p: write_csv(p.with_suffix(".csv"), [[1, 1, 1, 1, "patch"]]), "ends in 'patch'"),
    "no rows": (lambda p: write_csv(p.with_suffix(".csv"), []), "no tissue"),
    "binary": (lambda p: p.with_suffix(".csv").write_bytes(bytes(range(256))), "neither HDF5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said_with_the_file(tmp_path, name):
    write, message = BROKEN[name]
    write(tmp_path / "slide.h5")
    (path,) = tmp_path.iterdir()
    with pytest.raises((ValueError, OSError), match=message) as error:
        read_features(path)
    assert str(path) in str(error.value)


def bomb(path, **how):
    """An array that is declared, or compressed, to be far larger than its file."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", **how)
    return path


HOSTILE = {
    "unwritten": (lambda p: bomb(p, shape=(10**12, 512), dtype="f4", chunks=(1024, 512)), r"2\.048e\+06 GB"),
    "compressed": (lambda p: bomb(p, data=np.zeros((2**17, 256), "f4"), chunks=(2**13, 256), compression=1), "0.134"),
    "external": (lambda p: bomb(p, shape=(10, 4), dtype="u1", external=[("/etc/passwd", 0, 40)]), "in another file"),
    "objects": (lambda p: bomb(p, data=[["a", "b"]], dtype=h5py.string_dtype()), "type object, expected numbers"),
    "flat coordinates": (lambda p: write_h5(p, features=FEATURES, coords=COORDS.ravel()), r"coords of shape \(12,\)"),
    "loop": (lambda p: bomb(p, data=FEATURES) and link(p, h5py.SoftLink("/features")), "not a valid HDF5 file"),
    "link": (lambda p: bomb(p, data=FEATURES) and link(p, h5py.ExternalLink("/etc/passwd", "x")), "link to another"),
    "scale": (lambda p: write_h5(p, TRIDENT | {"target_magnification": 1e-300, "patch_size_level0": 0},
                                 features=FEATURES[:1], coords=COORDS[:1]), "pass patch_size"),
    "long line": (lambda p: p.with_suffix(".csv").write_text("0,1,name\n" + "1," * 2**20), "1 million characters"),
    "long number": (lambda p: write_csv(p.with_suffix(".csv"), [[1, 1, 1, 1, "9" * 5000 + "_1"]]), "line 2"),
    "far number": (lambda p: write_csv(p.with_suffix(".csv"), [[1, 1, 1, 1, f"{2**63}_1"]]), "line 2"),
    "name": (lambda p: write_h5(p.with_name("x" * 230 + ".h5"), features=FEATURES, coords=COORDS), "plain file"),
}  # fmt: skip


def link(path, target):
    with h5py.File(path, "a") as file:
        del file["features"]
        file["features"] = target
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, name):
    write, message = HOSTILE[name]
    write(tmp_path / "slide.h5")
    (path,) = tmp_path.iterdir()
    with pytest.raises((ValueError, OSError), match=message) as error:
        read_features(path)
    assert str(path) in str(error.value)


def test_arrays_in_pieces_compressed_and_of_other_byte_orders(tmp_path):
    path = tmp_path / "x.h5"
    for how in ({"chunks": (2, 2)}, {"chunks": (6, 4), "compression": "gzip"}, {"dtype": ">f4"}):
        with h5py.File(path, "w", userblock_size=512 if "dtype" in how else 0) as file:
            file.create_dataset("features", data=FEATURES, **how)
        slide = read_features(path)
        assert np.array_equal(slide.features, FEATURES) and slide.features.dtype == np.float32


def test_a_tensor_of_strides_is_no_bomb(tmp_path):
    torch = pytest.importorskip("torch")
    for tensor, message in (
        (torch.as_strided(torch.ones(4), (10**12, 4), (0, 1)), "tensor of shape"),
        (torch.ones(3, 3).to_sparse(), "torch.sparse_coo"),
        (torch.ones(3, 3).to("meta"), "on meta"),
        (torch.ones(3, 3, dtype=torch.complex64), "torch.complex64"),
    ):
        torch.save(tensor, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
            read_features(tmp_path / "x.pt")


def test_a_zip_bomb_is_refused(tmp_path):
    """A storage of 1 GB in 5 MB: its allocation fails in the worker, not here."""
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(4, 2), tmp_path / "sound.pt")
    with zipfile.ZipFile(tmp_path / "sound.pt") as sound, zipfile.ZipFile(tmp_path / "x.pt", "w") as broken:
        for name in sound.namelist():
            if not name.endswith("data/0"):
                broken.writestr(name, sound.read(name))
                continue
            with broken.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                entry._compressor = zlib.compressobj(1, zlib.DEFLATED, -15)
                entry._zinfo.compress_type = zipfile.ZIP_DEFLATED
                for _ in range(32):
                    entry.write(bytes(2**25))
    assert (tmp_path / "x.pt").stat().st_size < 2**24
    with pytest.raises(ValueError, match=r"x\.pt: "):
        read_features(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "a\\b", "..", ".", "", "x\x00", "x\n", "x" * 201, "\udc80"])
def test_an_id_that_is_no_plain_file_name(name):
    with pytest.raises(ValueError, match="slide"):
        SlideFeatures(name, "", FEATURES)


def test_a_missing_file_and_wrong_options(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.h5"):
        read_features(tmp_path / "x.h5")
    path = write_h5(tmp_path / "x.h5", TRIDENT, features=FEATURES, coords=COORDS)
    for wrong in ({"mpp": -1.0}, {"mpp": float("nan")}, {"patch_size": 0}):
        with pytest.raises(ValueError, match="above 0"):
            read_features(path, **wrong)


@settings(max_examples=20, deadline=None)  # each ends a worker
@given(st.data())
def test_a_truncated_h5_is_an_error_with_its_name(tmp_path_factory, data):
    path = write_h5(tmp_path_factory.mktemp("cut") / "x.h5", TRIDENT, features=FEATURES, coords=COORDS)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises((ValueError, OSError), match=r"x\.h5"):
        read_features(path)


# What looks like a .pt file asks for PyTorch where that is not installed.
FAULTS = (ValueError, OSError) if importlib.util.find_spec("torch") else (ValueError, OSError, ImportError)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_error_with_their_name(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x.dat"
    path.write_bytes(data)
    with pytest.raises(FAULTS, match=r"x\.dat"):
        read_features(path)


def test_ids():
    uuid = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291"
    assert case_of(uuid) == "TCGA-3C-AALI"
    assert case_of("C3L-00001-21") == "C3L-00001" and case_of("slide 7") == "slide 7"
    slide = SlideFeatures(uuid, "", FEATURES)
    assert slide.case_id == "TCGA-3C-AALI" and SlideFeatures(uuid, "P1", FEATURES).case_id == "P1"


def test_bfloat16_is_taken_and_checked():
    features = FEATURES.astype(ml_dtypes.bfloat16)
    SlideFeatures("x", "", features)
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="slide x: 1 of 6 .*patch 2"):
        SlideFeatures("x", "", features)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_number_of_two_bytes_is_finite_or_not_as_numpy_says(dtype):
    with np.errstate(invalid="ignore"):  # some of the numbers are signalling NaNs
        numbers = np.arange(2**16, dtype=np.uint16).view(np.float16 if dtype == np.float32 else dtype).astype(dtype)
        expected = np.isfinite(numbers).tolist()
        assert [all_finite(numbers[i : i + 1, None]) for i in range(2**16)] == expected
    rows = np.zeros((500, 512), dtype)
    assert all_finite(rows)
    rows[-1, -1] = -np.inf
    assert not all_finite(rows) and not all_finite(rows[:, ::-1])


@real
@pytest.mark.parametrize("tool", ["clam", "trident", "slidechat_csv"])
def test_real_files_agree(tool):
    path = next(path for path in find_feature_files(REAL / tool).files if path.stem != "empty")
    slide = read_features(path)
    assert slide.slide_id == "cmu-1-small-region" and slide.features.shape == (50, 512) and slide.patch_size == 256
    assert (slide.mpp, slide.encoder) == ((0.5, "handcrafted512") if tool == "trident" else (0, ""))
    other = read_features(REAL / "trident" / "features_handcrafted512" / "cmu-1-small-region.h5")
    assert (slide.coords == other.coords).all() and slide.features == pytest.approx(other.features, abs=1e-5)


@real
def test_real_broken_files():
    with pytest.raises(OSError, match=r"truncated\.h5.*copy or extract"):
        read_features(REAL / "broken" / "truncated.h5")
    with pytest.raises(ValueError, match=r"empty\.h5.*no tissue"):
        read_features(REAL / "trident" / "features_handcrafted512" / "empty.h5")
    with pytest.raises(ValueError, match="holds coordinates"):
        read_features(REAL / "clam" / "patches" / "cmu-1-small-region.h5")
