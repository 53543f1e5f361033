"""Feature formats: one made up here is entered in the table by one line, and every user of the table knows it."""

import codecs
import io
from pathlib import Path

import numpy as np
import pytest

from data_prep import build
from pathflip_jax.cli import main
from pathflip_jax.data.readers import formats
from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.feature_format import FeatureFormat, is_text
from pathflip_jax.data.readers.features import read_features
from pathflip_jax.data.records.records import Records

COORDS = np.stack(np.divmod(np.arange(36), 6), 1)[:, ::-1] * 256
FEATURES = np.random.default_rng(0).standard_normal((36, 8), np.float32)


def write_made_up(path: Path) -> None:
    stored = io.BytesIO()
    np.savez(stored, vectors=FEATURES, corners=COORDS)
    path.write_bytes(b"PPF1" + stored.getvalue())


def read_made_up(path: Path, mpp: float | None, encoder: str | None) -> dict:
    with np.load(io.BytesIO(path.read_bytes()[4:])) as file:
        return {"features": file["vectors"], "coords": file["corners"], "patch_size": 256, "mpp": 0.5}


MADE_UP = FeatureFormat(
    name="Made-up",
    extensions=(".feather",),
    tools=("PatchPress",),
    recognises=lambda start, path: start[:4] == b"PPF1",
    read=read_made_up,
)


@pytest.fixture(params=["first", "last"])
def made_up(request, monkeypatch):
    """The table with one entry more."""
    entered = (MADE_UP, *formats.FORMATS) if request.param == "first" else (*formats.FORMATS, MADE_UP)
    monkeypatch.setattr(formats, "FORMATS", entered)


def run_here(work, jobs, workers):
    """`run_each` without worker processes, which know nothing of a table changed by a test."""
    for job in jobs:
        yield job, work(job)


def test_a_format_is_one_entry(made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "run_each", run_here)
    (tmp_path / "features").mkdir()
    for name in ("S1", "S2"):
        write_made_up(tmp_path / "features" / f"{name}.feather")
    assert main(["import", str(tmp_path / "features"), "--out", str(tmp_path / "records")]) == 0
    assert "not read" not in capsys.readouterr().out
    records = Records(tmp_path / "records")
    assert [slide.slide_id for slide in records.slides] == ["S1", "S2"]
    slide = read_features(tmp_path / "features" / "S1.feather")
    assert np.array_equal(slide.features, FEATURES) and np.array_equal(slide.coords, COORDS)
    assert (slide.patch_size, slide.mpp) == (256, 0.5)


def test_help_and_errors_are_read_off_the_table(made_up, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    assert "PatchPress" in (said := " ".join(capsys.readouterr().out.split())) and ".feather" in said
    with pytest.raises(FileNotFoundError, match=r"no feature files \(.*\.feather"):
        find_feature_files(tmp_path)
    (tmp_path / "x.feather").write_text("no such file")
    with pytest.raises(OSError, match=r"x\.feather: text \('no such file'\), not a valid Made-up file"):
        read_features(tmp_path / "x.feather")
    (tmp_path / "x.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"x\.bin: neither .*Made-up \(\.feather\)"):
        read_features(tmp_path / "x.bin")


def test_without_the_entry_the_same_file_is_refused(tmp_path):
    write_made_up(tmp_path / "S1.feather")
    with pytest.raises(ValueError, match=r"S1\.feather: neither HDF5"):
        read_features(tmp_path / "S1.feather")
    with pytest.raises(FileNotFoundError, match=r"\.feather files are not read: 1"):
        find_feature_files(tmp_path)


def test_extensions_and_names_are_unambiguous():
    assert len(set(formats.extensions())) == len(formats.extensions())
    assert len({known.name for known in formats.FORMATS}) == len(formats.FORMATS)
    assert all(extension == extension.lower() and extension[0] == "." for extension in formats.extensions())


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (b"0,1,name\n", True),
        (codecs.BOM_UTF8 + b"0,1\r\n", True),
        ("größe_1,ü".encode()[:-1], True),  # a letter cut in two
        (b"\x89HDF\r\n\x1a\n", False),
        (b"PAR1\x15\x04", False),
        ("größe".encode("latin-1"), False),
    ],
)
def test_text_is_told_from_binary_files(start, text):
    assert is_text(start) is text
