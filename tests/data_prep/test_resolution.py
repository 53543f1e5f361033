"""Resolution metadata of files: correct, wrong and contradictory."""

from pathlib import Path

import pytest

from data_prep.resolution import find_resolution

SIZE = (2000, 1000)


def _said(vendor: str = "generic-tiff", mpp: float | None = None, power: float | None = None, ome: str = "") -> dict:
    said = {"openslide.vendor": vendor}
    said |= {} if mpp is None else {"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp)}
    said |= {} if power is None else {"openslide.objective-power": str(power)}
    return said | ({"tiff.ImageDescription": ome} if ome else {})


def _find(said: dict, **options):
    return find_resolution(Path("s.tif"), said, SIZE, **options)


def _ome(mpp: float, unit: str = "µm", power: str = "") -> str:
    used = f'<ObjectiveSettings ID="O1"/><!-- {power} -->' if power else ""
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Instrument ID="I"><Objective ID="O1" NominalMagnification="{power or 1}"/></Instrument>'
        '<Image ID="label"><Pixels SizeX="10" SizeY="10" PhysicalSizeX="99"/></Image>'
        f'<Image ID="0">{used}<Pixels SizeX="2000" SizeY="1000" PhysicalSizeX="{mpp}" PhysicalSizeXUnit="{unit}" '
        f'PhysicalSizeY="{mpp}" PhysicalSizeYUnit="{unit}"><Channel SamplesPerPixel="3"/></Pixels></Image></OME>'
    )


@pytest.mark.parametrize(
    ("vendor", "mpp", "power"),
    [
        ("aperio", 0.499, 20), ("aperio", 0.2527, 40), ("aperio", 0.2628, 40), ("hamamatsu", 0.2208, 40),
        ("hamamatsu", 0.4415, 20), ("leica", 0.5, 20), ("ventana", 0.2325, 40), ("mirax", 0.2425, 20),
        ("mirax", 0.3252, 20), ("zeiss", 0.22, 20), ("zeiss", 0.1725, 20), ("zeiss", 0.44, 10), ("dicom", 0.25, 40),
        ("philips", 0.25, None), ("generic-tiff", 0.243, None), ("generic-tiff", 0.5, None),
        ("generic-tiff", 0.22, None), ("generic-tiff", 0.44, None), ("generic-tiff", 1.0, None),
        ("generic-tiff", 2.0, None), ("generic-tiff", 4.0, None), ("generic-tiff", 0.274, None),
    ],
)  # fmt: skip
def test_what_scanners_state_is_taken_without_a_word(vendor, mpp, power):
    found = _find(_said(vendor, mpp, power))
    assert found.mpp == mpp and found.notes == ()


@pytest.mark.parametrize("true", [0.25, 0.243, 0.2628, 0.5, 0.499, 0.46])
@pytest.mark.parametrize("slip", [2.54, 1 / 2.54, 10])
def test_a_tag_in_another_unit_is_refused_with_both_readings(true, slip):
    tag = true * slip
    for options in ({}, {"assume_mpp": true}):
        with pytest.raises(ValueError, match=r"s.tif: its resolution tag says .*--override-mpp") as error:
            _find(_said(mpp=tag), **options)
        assert f"{tag:.4g}" in str(error.value)
    assert f"{true:.4g}" in str(error.value)
    found = _find(_said(mpp=tag), override_mpp=true)
    assert found.mpp == true and f"its resolution tag says {tag:.4g}" in found.notes[0]
    assert _find(_said("philips", mpp=tag)).mpp == tag  # a vendor's header has no such tag


@pytest.mark.parametrize(
    ("vendor", "mpp", "power"), [("aperio", 0.1965, 20), ("aperio", 1.27, 20), ("zeiss", 2.2, 20), ("zeiss", 0.055, 20)]
)
def test_a_size_that_contradicts_the_objective_is_refused_with_both_readings(vendor, mpp, power):
    with pytest.raises(
        ValueError, match=rf"two contradictory resolutions: {mpp} um .* 0.5 by its objective power of 20x.*--override"
    ):
        _find(_said(vendor, mpp, power))
    assert _find(_said(vendor, mpp, power), override_mpp=0.5).mpp == 0.5


def test_a_doubled_magnification_is_noted():
    found = _find(_said("aperio", 0.5, 40))
    assert found.mpp == 0.5 and "0.25 by its objective power of 40x" in found.notes[0]


def test_an_option_fills_in_what_is_lacking_and_says_when_it_is_not_used():
    assert _find(_said(), assume_mpp=0.5)[:2] == (0.5, "--assume-mpp")
    assert _find(_said(mpp=352.8), assume_mpp=0.5).mpp == 0.5  # 72 dpi is no size
    found = _find(_said(mpp=0.25), assume_mpp=0.5)
    assert found.mpp == 0.25 and found.notes == (
        "--assume-mpp 0.5 not used: its resolution tag says 0.25 um per pixel",
    )
    assert _find(_said(mpp=0.499), assume_mpp=0.5).notes == ()
    assert _find(_said(mpp=0.25), override_mpp=0.25).notes == ()
    assert _find(_said("aperio", power=40))[:2] == (0.25, "the nominal size at 40x")
    with pytest.raises(ValueError, match="--override-mpp 50"):
        _find(_said(), override_mpp=50)


def test_pixels_that_are_no_squares_are_refused_unless_told():
    said = _said(mpp=0.5) | {"openslide.mpp-y": "0.25"}
    with pytest.raises(ValueError, match=r"pixels of 0.5 x 0.25 um"):
        _find(said)
    assert _find(said, override_mpp=0.5).mpp == 0.5


@pytest.mark.parametrize(("mpp", "unit"), [(0.25, "µm"), (250, "nm"), (0.00025, "mm"), (2.5e-7, "m"), (0.25, "um")])
def test_sizes_of_ome_xml(mpp, unit):
    found = _find(_said(ome=_ome(mpp, unit)))
    assert found.mpp == pytest.approx(0.25) and found.source == "its OME-XML" and found.notes == ()
    found = _find(_said(mpp=0.635, ome=_ome(mpp, unit)))  # the tag's unit slipped: OME-XML states its own
    assert found.mpp == pytest.approx(0.25) and "its resolution tag says 0.635" in found.notes[0]


def test_ome_xml_that_says_no_size_or_contradicts_its_objective():
    assert _find(_said(mpp=0.5, ome=_ome(0.0)))[:2] == (0.5, "its resolution tag")
    assert _find(_said(ome=_ome(0.0, power="40"))).mpp == 0.25
    assert _find(_said(mpp=0.5, ome="<OME broken")).mpp == 0.5
    assert _find(_said(ome=_ome(0.22, power="20"))).mpp == 0.22
    with pytest.raises(ValueError, match="two contradictory resolutions"):
        _find(_said(ome=_ome(2.5, power="40")))
