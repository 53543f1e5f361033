"""Files below a folder: links followed once, hidden files skipped, and placeholders distinguished from files."""

import pytest

from pathflip_jax.data.storage.folders import describe_placeholder, walk_files


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_links_are_followed_each_folder_once(tmp_path):
    touch(tmp_path, "store/deep/b.tif", "slides/a.tif", "slides/own/c.tif")
    slides = tmp_path / "slides"
    for name, target in (("linked", tmp_path / "store"), ("up", slides), ("twice", slides / "own")):
        (slides / name).symlink_to(target)
    (slides / "d.tif").symlink_to(slides / "a.tif")
    (slides / "itself").symlink_to("itself")
    found = walk_files(slides)
    assert [str(path.relative_to(slides)) for path in found.files] == [
        "a.tif", "d.tif", "linked/deep/b.tif", "own/c.tif"
    ]  # fmt: skip
    assert list(found.broken) == [slides / "itself"]


def test_what_leads_nowhere_is_told_with_its_cure(tmp_path):
    (tmp_path / "S1.svs").symlink_to("../.git/annex/objects/Xx/Zz/SHA256E-s9--ab.svs/SHA256E-s9--ab.svs")
    (tmp_path / "S2.svs").symlink_to("/mnt/gone/S2.svs")
    faults = walk_files(tmp_path).broken
    assert "git annex get" in faults[tmp_path / "S1.svs"]
    assert "a link to /mnt/gone/S2.svs, which is not there" in faults[tmp_path / "S2.svs"]


def test_hidden_files_are_passed_over_and_a_zarr_is_one_file(tmp_path):
    touch(tmp_path, "a.tif", "._a.tif", ".Trash-1000/files/a.tif", "b.zarr/0/0.0", "b.zarr/.zattrs")
    assert [path.name for path in walk_files(tmp_path).files] == ["a.tif", "b.zarr"]
    assert [path.name for path in walk_files(tmp_path / ".Trash-1000").files] == ["a.tif"], "one that was named itself"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        walk_files(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s9--ab.h5\n", "git annex get"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "download it again"),
        (b"\x89HDF\r\n\x1a\n", ""),
        (b"0,1,patch\n", ""),
        (b"", ""),
    ],
)
def test_what_stands_in_for_a_file(tmp_path, content, said):
    (tmp_path / "x.h5").write_bytes(content)
    found = describe_placeholder(tmp_path / "x.h5")
    assert (said in found) if said else not found
