"""Runs that come with the package, by name."""

from pathlib import Path

from pathflip_jax.runs import bundled


def test_a_name_finds_its_folder_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "package")
    assert bundled.names() == [] and bundled.find("colon") == "colon"
    (tmp_path / "package" / "colon").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert bundled.names() == ["colon"]
    for place in ("colon", Path("colon")):
        assert bundled.find(place) == tmp_path / "package" / "colon"
    assert bundled.find("gs://bucket/colon") == "gs://bucket/colon" and bundled.find("runs/colon") == "runs/colon"
    (tmp_path / "colon").mkdir()
    assert bundled.find("colon") == "colon"
