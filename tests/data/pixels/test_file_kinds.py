"""Files that are given for slides and are none: what they are, and what to give instead."""

import gzip
import io
import zipfile

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep.slides import open_slide
from pathflip_jax.data.pixels.file_kinds import describe
from pathflip_jax.data.readers import slide_pixels

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)


def picture(kind):
    with io.BytesIO() as out:
        Image.fromarray(PIXELS).save(out, kind)
        return out.getvalue()


def archive(*names):
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as file:
            for name in names:
                file.writestr(name, b"x")
        return out.getvalue()


def hdf5():
    with io.BytesIO() as out:
        with h5py.File(out, "w") as file:
            file["features"] = PIXELS[0]
        return out.getvalue()


def numpy_file():
    with io.BytesIO() as out:
        np.save(out, PIXELS)
        return out.getvalue()


KINDS = {
    "photo.jpg": (picture("JPEG"), r"a JPEG photograph of 60 x 40 pixels, not a whole slide .*vips .* photo\.jpg"),
    "photo.svs": (picture("JPEG"), "a JPEG photograph of 60 x 40 pixels"),
    "view.png": (picture("PNG"), "a PNG picture of 60 x 40 pixels"),
    "view.tiff": (picture("BMP"), "a BMP picture of 60 x 40 pixels"),
    "slides.zip": (archive("a.svs"), "a ZIP archive, not a whole slide image; unpack it"),
    "features.pt": (archive("archive/data.pkl"), "a PyTorch file, as of features.*`pathflip import`"),
    "features.npz": (archive("features.npy"), "NumPy arrays, as of features.*`pathflip import`"),
    "features.npy": (numpy_file(), "a NumPy array, as of features.*`pathflip import`"),
    "features.h5": (hdf5(), "an HDF5 file, as of features.*`pathflip import`"),
    "s.svs.gz": (gzip.compress(b"x" * 99), "a gzip file, not a whole slide image; unpack it"),
    "report.pdf": (b"%PDF-1.7 x", "a PDF document"),
    "lfs.svs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer.*git lfs pull"),
    "login.svs": (b"<!DOCTYPE html><html></html>", "a web page .*download it again, logged in"),
    "empty.svs": (b"", "an empty file; copy it again"),
    "s.mrxs": (picture("JPEG"), "a MIRAX slide without its folder s, which holds its pixels; copy it next to it"),
    "s.vms": (b"[Virtual Microscope Specimen]\nImageFile=a.jpg\nImageFile(1,0)=b.jpg\nMapFile=m.jpg\n",
              r"a Hamamatsu slide without 2 of its files \(b.jpg, m.jpg\); copy them next to it"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_no_slide_says_what_it_is(tmp_path, name):
    data, said = KINDS[name]
    (tmp_path / "a.jpg").write_bytes(picture("JPEG"))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OSError, match=rf"{name}: OpenSlide cannot open it .*{said}"):
        open_slide(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{said}.*; leave the picture out, or repair the file"):
        slide_pixels.measures(str(tmp_path / name))


def test_what_is_unknown_is_not_guessed(tmp_path):
    (tmp_path / "s.svs").write_bytes(b"\x07" * 500)
    assert describe(tmp_path / "s.svs") == ""
    tifffile.imwrite(tmp_path / "s.tif", PIXELS, photometric="rgb")
    assert describe(tmp_path / "s.tif") == ""
    with pytest.raises(
        OSError, match=r"s\.svs: OpenSlide cannot open it .*expected a complete whole slide image.*vips"
    ):
        open_slide(tmp_path / "s.svs")


def test_a_mask_with_labels_says_so(tmp_path):
    for name, options in (("tiled.tif", {"tile": (64, 64)}), ("strips.tif", {"rowsperstrip": 8})):
        tifffile.imwrite(tmp_path / name, PIXELS[..., 0] % 4, metadata=None, **options)
        with pytest.raises(
            (OSError, ValueError), match=rf"{name}: .*one grey channel of 8 bits: fluorescence, or a mask"
        ):
            open_slide(tmp_path / name)
