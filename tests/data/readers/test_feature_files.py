"""Discovery of feature files below a folder: those read, those skipped, and reports of unreachable ones."""

import pytest

from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.feature_format import slide_id_of

TABLE = "0,1,patch_name\n0.5,1.5,0_0.png\n"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TABLE if path.suffix == ".csv" else "x")


def names(folder):
    return [str(path.relative_to(folder)) for path in find_feature_files(folder).files]


def test_ids():
    uuid = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291"
    assert slide_id_of(f"a/{uuid}.h5") == uuid
    assert slide_id_of("x_features.h5") == slide_id_of("x_patches.h5") == slide_id_of("x.pt") == "x"


def test_files_of_a_folder(tmp_path):
    """CLAM's and TRIDENT's folders as they lie: coordinates, lists and logs are no features, .h5 goes before .pt."""
    touch(tmp_path, "h5_files/a.h5", "h5_files/b.h5", "patches/a_patches.h5", "patches/b_patches.h5")
    touch(tmp_path, *(f"pt_files/{name}.pt" for name in "abc"), "visualization/a.h5")
    (tmp_path / "process_list_autogen.csv").write_text("slide_id,status,seg_level\na.svs,processed,2\n")
    assert names(tmp_path) == ["h5_files/a.h5", "h5_files/b.h5", "pt_files/c.pt"]
    assert not find_feature_files(tmp_path).notes
    touch(tmp_path, "d.csv")
    assert names(tmp_path)[-1] == "d.csv"


def test_hidden_files_and_copies_are_no_slides(tmp_path):
    touch(tmp_path, "S1.h5", "._S1.h5", ".ipynb_checkpoints/S1.h5", ".Trash-1000/files/S2.h5")
    assert names(tmp_path) == ["S1.h5"]


def test_links_are_followed_and_those_that_lead_nowhere_are_failures(tmp_path):
    touch(tmp_path, "store/S2.h5", "feats/S1.h5")
    folder = tmp_path / "feats"
    (folder / "more").symlink_to(tmp_path / "store")
    (folder / "S3.h5").symlink_to("/nowhere/S3.h5")
    (folder / "share").symlink_to("/nowhere/share")
    (folder / "README.md").symlink_to("/nowhere/README.md")
    (folder / "again.h5").symlink_to(folder / "S1.h5")
    found = find_feature_files(folder)
    assert [path.name for path in found.files] == ["S1.h5", "S2.h5", "again.h5"]
    assert [failure.slide for failure in found.unreachable] == ["S3", "share"]
    assert f"{folder / 'S3.h5'}: a link to /nowhere/S3.h5, which is not there" in found.unreachable[0].error


def test_one_file_by_two_ways_is_no_second_one(tmp_path):
    touch(tmp_path, "store/S1.h5")
    for name in ("a", "b"):
        (tmp_path / "feats" / name).mkdir(parents=True)
        (tmp_path / "feats" / name / "S1.h5").symlink_to(tmp_path / "store" / "S1.h5")
    assert names(tmp_path / "feats") == ["a/S1.h5"]


def test_two_encoders_below_one_folder_are_refused(tmp_path):
    touch(tmp_path, "features_uni/a.h5", "features_conch/a.h5")
    with pytest.raises(ValueError, match=r"slide a has two.*features_conch/a.h5 and features_uni/a.h5.*one encoder"):
        find_feature_files(tmp_path)


def test_files_that_are_left_out_are_told(tmp_path):
    """TRIDENT's slide embeddings lie beside the patch features, under the same names."""
    touch(tmp_path, "features_uni/a.h5", "slide_features_titan/a.h5", "b.npy", "c.npy", "d.zarr/0/0.0")
    (tmp_path / "d.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    found = find_feature_files(tmp_path)
    assert names(tmp_path) == ["features_uni/a.h5"]
    text = "\n".join(found.notes)
    assert ".npy files are not read: 2 (b.npy, c.npy); save features and coordinates together as HDF5" in text
    assert ".zarr files are not read: 1 (d.zarr)" in text
    assert "slide embeddings are not read: 1 (slide_features_titan/a.h5)" in text


def test_tables_that_are_not_read_are_told_where_others_are(tmp_path):
    touch(tmp_path, "S1.csv")
    (tmp_path / "S2.csv").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    (tmp_path / "S3.csv").write_bytes(b"")
    assert names(tmp_path) == ["S1.csv", "S2.csv"], "reading the pointer says what it is"
    assert find_feature_files(tmp_path).notes == ["csv files that are not feature tables are not read: 1 (S3.csv)"]


def test_a_folder_without_features(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature files"):
        find_feature_files(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        find_feature_files(tmp_path / "x")
    touch(tmp_path, "a.parquet")
    (tmp_path / "b.h5").symlink_to("/nowhere/b.h5")
    with pytest.raises(FileNotFoundError, match=r"no feature files.*/nowhere/b\.h5.*\.parquet files are not read: 1"):
        find_feature_files(tmp_path)
