"""Atomic writing of folders."""

from pathlib import Path

import pytest

from pathflip_jax.data.storage.atomic_folders import atomic_folder


def test_a_folder_takes_its_name_once_it_is_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as part:
        (part / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists() and part.parent == tmp_path / "a"
    assert (tmp_path / "a" / "b" / "x").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_folder_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as part:
        (part / "x").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_folder_with_content_is_not_written_over(tmp_path, there):
    place = tmp_path / "a"
    (place / "old").mkdir(parents=True) if there == "folder" else place.write_text("old")
    with (
        pytest.raises(FileExistsError, match="a: exists and is not empty; write to another folder"),
        atomic_folder(place),
    ):
        raise AssertionError("nothing is begun")
    place.rename(tmp_path / "b")
    place.mkdir()
    with atomic_folder(place):
        pass
    assert not list(place.iterdir())


def test_a_url_is_no_folder_to_write():
    with pytest.raises(ValueError, match="gs://b/out: .*local disk"), atomic_folder("gs://b/out"):
        raise AssertionError("nothing is begun")
    assert not Path("gs:").exists()
