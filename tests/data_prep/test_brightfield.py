"""Images that OpenSlide opens although they are not brightfield slides."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.brightfield import check_brightfield
from data_prep.slides import open_slide

RGB = np.random.default_rng(0).integers(100, 200, (256, 256, 3)).astype(np.uint8)
GREY = RGB[..., 0]
MICRONS = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}


def _channels(*names: str) -> dict:
    return {"axes": "CYX", "Channel": {"Name": list(names)}, **MICRONS}


def _write(path, image, **options):
    tifffile.imwrite(path, image, tile=(128, 128), **({"metadata": None} | options))
    return path


@pytest.mark.parametrize(
    ("image", "options", "said"),
    [
        (GREY, {}, "one grey channel of 8 bits: fluorescence, or a mask"),
        (GREY.astype(np.uint16), {}, "one grey channel of 16 bits"),
        (
            GREY,
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "a palette image of indexed colours, such as a mask",
        ),
        (np.stack([GREY] * 4), {"photometric": "minisblack"}, "4 channels of 8 bits, as in fluorescence"),
        (np.stack([GREY] * 3), {"photometric": "minisblack"}, "three planes without names.*if they are RGB: `python"),
        (
            np.stack([GREY] * 3),
            {"photometric": "minisblack", "ome": True, "metadata": _channels("DAPI", "CD3", "CD8")},
            r"3 channels of 8 bits \(DAPI, CD3, CD8\), as in fluorescence",
        ),
        (np.concatenate([RGB, RGB[..., :1]], -1), {"photometric": "separated"}, "4 channels of 8 bits in SEPARATED"),
    ],
)
def test_what_is_no_brightfield_slide_says_what_it_is(tmp_path, image, options, said):
    path = _write(tmp_path / "S1.ome.tif", image, **options)
    with pytest.raises(
        ValueError, match=rf"S1.ome.tif: {said}.*expected an 8-bit RGB brightfield slide: pass that file"
    ):
        open_slide(path, assume_mpp=0.5)


def test_rgb_in_its_forms_is_read(tmp_path):
    ome = {"ome": True, "metadata": {"axes": "YXS", **MICRONS}}
    for name, image, options in (
        ("interleaved.ome.tif", RGB, {"photometric": "rgb", **ome}),
        ("separate.tif", RGB.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        ("jpeg.tif", RGB, {"photometric": "rgb", "compression": "jpeg"}),
        ("alpha.tif", np.dstack([RGB, GREY * 0 + 255]), {"photometric": "rgb", "extrasamples": "unassalpha"}),
    ):
        with open_slide(_write(tmp_path / name, image, **options), assume_mpp=0.5) as slide:
            assert slide.mpp == 0.5 and slide.source == ("its OME-XML" if "ome" in name else "--assume-mpp")
            pixels = slide.read(0, 0, 0, 256, 256)
            assert "jpeg" in name or (pixels == RGB).all()


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"mirax.GENERAL.SLIDE_TYPE": "SLIDE_TYPE_FLUORESCENCE"}, "fluorescence"),
        ({"leica.illumination-source": "fluorescence"}, "fluorescence"),
        ({"dicom.SamplesPerPixel": "1"}, "one grey channel"),
    ],
)
def test_vendors_that_state_the_lamp(said, what):
    with pytest.raises(ValueError, match=f"s: {what}.*pass that file, or leave the slide out"):
        check_brightfield(Path("s"), said)
    check_brightfield(Path("s"), {"leica.illumination-source": "brightfield", "dicom.SamplesPerPixel": "3"})


def test_the_command_that_interleaves_planes_makes_a_slide(tmp_path):
    options = {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CYX", **MICRONS}}
    path = _write(tmp_path / "S1.ome.tif", RGB.transpose(2, 0, 1), **options)
    with pytest.raises(ValueError) as error:
        open_slide(path)
    code = re.search(r'`python -c "(.*)"`', str(error.value)).group(1)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with open_slide(tmp_path / "S1_rgb.tif") as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert np.abs(slide.read(0, 0, 0, 256, 256).mean((0, 1)) - RGB.mean((0, 1))).max() < 2
