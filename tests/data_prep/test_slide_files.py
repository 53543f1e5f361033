"""Slide folders as in hospitals and archives: the slides found, their ids, and reports of the rest."""

import os
import re
from pathlib import Path

import pytest

from data_prep.slide_files import find_slides


def _touch(path: Path, content: bytes = b"II*\0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_links_are_followed_once_and_hidden_files_are_none(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "slides"
    _touch(store / "batch/S1.svs")
    _touch(store / "abc.svs")
    _touch(folder / "S3.SVS")
    for name in ("._S3.svs", ".Trash-1000/files/S3.svs", "__MACOSX/S3.svs", "@eaDir/S3.svs", "notes.txt", "S3.png"):
        _touch(folder / name)
    (folder / "linked").symlink_to(store / "batch")
    (folder / "again").symlink_to(store / "batch")
    (folder / "S2.svs").symlink_to(store / "abc.svs")
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self2")
    (folder / "self2").symlink_to(folder / "self")
    found, failed = find_slides(folder)
    assert found == {"S1": folder / "again/S1.svs", "S2": folder / "S2.svs", "S3": folder / "S3.SVS"}
    assert [failure.slide for failure in failed] == ["self", "self2"]
    assert find_slides([folder / "S2.svs", store / "batch"]) == (
        {"S2": folder / "S2.svs", "S1": store / "batch/S1.svs"},
        [],
    )


def test_a_linked_mirax_slide_is_read_beside_its_folder(tmp_path):
    _touch(tmp_path / "store/abc.mrxs")
    _touch(tmp_path / "store/abc/Slidedat.ini")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/S1.mrxs").symlink_to(tmp_path / "store/abc.mrxs")
    assert find_slides(tmp_path / "slides") == ({"S1": tmp_path / "store/abc.mrxs"}, [])


def test_a_folder_goes_before_links_to_it(write_dicom, tmp_path):
    write_dicom(tmp_path / "slides/caseB/DCM_0.dcm")
    (tmp_path / "slides/a_link").symlink_to(tmp_path / "slides/caseB")
    assert list(find_slides(tmp_path / "slides")[0]) == ["caseB"]


def test_a_file_that_two_ids_name_is_said_and_one_id_of_two_files_is_refused(tmp_path):
    _touch(tmp_path / "a/S1.svs")
    (tmp_path / "a/T1.svs").symlink_to(tmp_path / "a/S1.svs")
    found, failed = find_slides(tmp_path / "a")
    assert found == {"S1": tmp_path / "a/S1.svs"}
    assert [failure.slide for failure in failed] == ["T1"] and "the same file as" in failed[0].error
    _touch(tmp_path / "b/S1.tif")
    with pytest.raises(ValueError, match=r"S1.svs and .*S1.tif have the same slide id, S1"):
        find_slides(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "slide", "said"),
    [
        ("S1.vsi", b"II", "S1", "an Olympus slide .*QuPath convert-ome S1.vsi S1.ome.tif"),
        ("S1.isyntax", b"x", "S1", "iSyntax.*export"),
        ("S1.sdpc", b"x", "S1", "vendor's own converter"),
        ("S1.jp2", b"x", "S1", "vips tiffsave S1.jp2 S1.tiff --tile"),
        ("S1.afi", b"x", "S1", "fluorescence.*H&E is needed"),
        ("S1.mrxs", b"x", "S1", "without its folder S1"),
        ("S1.svs", b"", "S1", "an empty file; copy it again"),
        (
            "S1.svs",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "S1",
            "git lfs pull --include S1.svs",
        ),
        ("S1.ndpi", b"/annex/objects/SHA256E-s1--0.ndpi\n", "S1", "git annex get S1.ndpi"),
        ("S1.svs.dvc", b"outs:", "S1", "dvc pull"),
        ("S1.svs.gz", b"x", "S1", "a compressed slide; unpack it"),
        ("S1.svs.partial", b"x", "S1", "unfinished download"),
        (".S1.svs.icloud", b"x", "S1", "in iCloud"),
        ("S1.ome.zarr/.zattrs", b"{}", "S1", "OME-Zarr"),
        ("S1.zarr/zarr.json", b'{"attributes": {"ome": {}}}', "S1", "OME-Zarr"),
    ],
)
def test_what_a_pathologist_would_call_a_slide_is_never_left_out_without_a_word(tmp_path, name, content, slide, said):
    _touch(tmp_path / name, content)
    found, (failure,) = find_slides(tmp_path)
    assert not found and failure.slide == slide and failure.file.startswith(str(tmp_path))
    assert re.search(said, failure.error) and failure.error.startswith(failure.file)


def test_links_that_lead_nowhere_are_said(tmp_path):
    for name, target in (
        ("S1.svs", "/gone/S1.svs"),
        ("batch2", "/gone/batch2"),
        ("S2.svs", ".git/annex/objects/aa/S2"),
        ("table.csv", "/gone.csv"),
    ):
        (tmp_path / name).symlink_to(target)
    found, failed = find_slides(tmp_path)
    assert not found and [failure.slide for failure in failed] == ["S1", "S2", "batch2"]
    assert "link to /gone/S1.svs" in failed[0].error and "git annex get S2.svs" in failed[1].error


def test_slides_of_more_than_one_file_or_suffix_are_one(tmp_path):
    _touch(tmp_path / "S1.mrxs")
    _touch(tmp_path / "S1/Slidedat.ini")
    _touch(tmp_path / "S2.ome.tif")
    _touch(tmp_path / "S3.OME.TIFF")
    _touch(tmp_path / "S4.2.tif")
    _touch(tmp_path / "S1.zarr/.zattrs", b"{}")  # tables of another tool
    assert list(find_slides(tmp_path)[0]) == ["S1", "S2", "S3", "S4.2"]
    assert find_slides(tmp_path)[1] == []


def test_dicom_is_found_by_what_is_in_it(write_dicom, tmp_path):
    write_dicom(tmp_path / "caseA/DCM_0.dcm", "1.1")
    write_dicom(tmp_path / "caseA/DCM_1.dcm", "1.1")
    write_dicom(tmp_path / "caseB/1.2.840.1", "1.2")
    write_dicom(tmp_path / "caseC/0", "1.3")
    write_dicom(tmp_path / "caseC/ct.dcm", "1.4", kind="1.2.840.10008.5.1.4.1.1.2")
    _touch(tmp_path / "caseC/README")
    _touch(tmp_path / "odd.dcm", b"no DICOM, but called so")
    found, failed = find_slides(tmp_path)
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()} == {
        "caseA": "caseA/DCM_0.dcm",
        "caseB": "caseB/1.2.840.1",
        "caseC": "caseC/0",
        "odd": "odd.dcm",
    }
    assert failed == []


def test_nothing_like_a_slide(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no slides in it or its subfolders \(\.svs"):
        find_slides(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: no such slide"):
        find_slides(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="an empty list"):
        find_slides([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_said(tmp_path):
    _touch(tmp_path / "a/S1.svs")
    (tmp_path / "b").mkdir(mode=0)
    found, (failure,) = find_slides(tmp_path)
    assert list(found) == ["S1"] and failure.slide == "b" and "cannot be read" in failure.error
